"""Relations that read truth tensors, on boxes of pairs: decided, or left as a question to the tensors.

Interval analysis decides what depends on places alone. Of a truth tensor it tells which of its entries a box reads, so
that whoever has them answers: none of them is true, all are, or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.box_values import FALSE, TRUE, UNKNOWN, Ints, junction_state
from attnc.compiler.analysis.intervals import Analysis, Boxes
from attnc.compiler.ir import Bool, ExactSelect, HeadIndex, Index, Lookup, Not, Tensor, is_truth
from attnc.compiler.rewrite import walk

Int64 = NDArray[np.int64]
States = NDArray[np.int8]

Span = tuple[Int64, Int64]
"""Entries from the first number to before the second, of each box."""


@dataclass(frozen=True, eq=False)
class KnownAnswer:
    """FALSE, UNKNOWN or TRUE on each box, whatever truth tensors hold."""

    state: States


@dataclass(frozen=True, eq=False)
class ReadQuestion:
    """TRUE where all entries of a rectangle of rows and places hold, FALSE where none does.

    `sure`: TRUE where one of these places holds in the one row, instead.
    """

    tensor: Tensor
    rows: Span
    places: Span
    sure: Span | None = None


@dataclass(frozen=True, eq=False)
class JoinedQuestion:
    """`and` or `or`."""

    op: Literal["and", "or"]
    parts: tuple[Question, ...]


@dataclass(frozen=True, eq=False)
class NegatedQuestion:
    """`not`."""

    part: Question


@dataclass(frozen=True, eq=False)
class PickedQuestion:
    """`then if condition else otherwise`."""

    condition: Question
    then: Question
    otherwise: Question


Question = KnownAnswer | ReadQuestion | JoinedQuestion | NegatedQuestion | PickedQuestion


@dataclass(frozen=True)
class Asking:
    """`read`: a truth tensor by row and place, of one batch entry and head; and what `any` over its places asks.

    `stretches`: of aggregates, that read and the ends of the places, by node. All are over the rows and keys of a call.
    """

    stretches: Mapping[Index, tuple[Lookup, Index, Index]]

    def of(self, relation: Index, boxes: Boxes) -> Question:
        """The question that a relation is on boxes. Every truth tensor in it has at most two dimensions."""
        return _Boxes(self, Analysis(boxes, keyed=False)).question(relation)


@dataclass(frozen=True)
class _Boxes:
    asking: Asking
    analysis: Analysis

    def question(self, node: Index) -> Question:
        if node in self.asking.stretches:
            return self._stretch(*self.asking.stretches[node])
        if not reads_data(node):
            return self._known(self.analysis.truth(node).state)
        match node:
            case Bool(op=op, operands=operands):
                return joined(op, [self.question(operand) for operand in operands])
            case Not(operand=operand):
                return NegatedQuestion(self.question(operand))
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                return PickedQuestion(self.question(condition), self.question(then), self.question(otherwise))
            case Lookup() if is_bare(node):
                none = self._span(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64))
                found = [self._span(i.low, i.high + 1) for i in map(self.analysis.integer, node.indices)]
                rows, places = [none] * (2 - len(found)) + found
                return ReadQuestion(node.tensor, rows, places)
            case _:
                assert is_truth(node)
                return self._known(np.full(1, UNKNOWN, dtype=np.int8))

    def _stretch(self, read: Lookup, low: Index, high: Index) -> Question:
        """Some of the places that are in the range on all of a box decide, in one row; of those of some pair, none."""
        rows = [self.analysis.integer(index) for index in read.indices[:-1]]
        first, end = self.analysis.integer(low), self.analysis.integer(high)
        none = np.zeros(1, dtype=np.int64)
        row = rows[0] if rows else Ints(none, none, none.astype(np.uint64), none)
        one = row.low == row.high
        sure = self._span(first.high, np.where(one, end.low, first.high))
        return ReadQuestion(read.tensor, self._span(row.low, row.high + 1), self._span(first.low, end.high), sure)

    def _known(self, state: States) -> KnownAnswer:
        return KnownAnswer(np.broadcast_to(state, self.analysis.size))

    def _span(self, first: Int64, end: Int64) -> Span:
        size = self.analysis.size
        return np.broadcast_to(first, size), np.broadcast_to(np.maximum(end, first), size)


def is_bare(node: Lookup) -> bool:
    """Whether it is an entry by row and place, told by places alone, of a truth tensor of one batch entry and head."""
    tensor = node.tensor
    plain = tensor.kind == "bool" and len(tensor.dims) <= 2 and not {"batch", "head", "kv_head"} & {*tensor.dims}
    return plain and not any(map(reads_data, node.indices))


def reads_data(node: Index) -> bool:
    """Whether an expression reads inputs, or what differs by head or batch entry."""
    return any(isinstance(below, Lookup | HeadIndex) for below in walk(node))


def joined(op: Literal["and", "or"], parts: list[Question]) -> Question:
    """A junction, in which what is known is one part."""
    known = [part.state for part in parts if isinstance(part, KnownAnswer)]
    others: list[Question] = [part for part in parts if not isinstance(part, KnownAnswer)]
    if known:
        others.append(KnownAnswer(reduce(lambda a, b: junction_state(op, a, b), known)))
    return others[0] if len(others) == 1 else JoinedQuestion(op, tuple(others))


def reads_of(question: Question) -> list[ReadQuestion]:
    """The reads in a question."""
    match question:
        case KnownAnswer():
            return []
        case ReadQuestion():
            return [question]
        case JoinedQuestion(parts=parts):
            return [read for part in parts for read in reads_of(part)]
        case NegatedQuestion(part=part):
            return reads_of(part)
        case PickedQuestion():
            return [r for part in (question.condition, question.then, question.otherwise) for r in reads_of(part)]


def answered(question: Question, read: Callable[[ReadQuestion], States]) -> States:
    """The states of boxes, with those that `read` says; int8 (…, boxes)."""
    match question:
        case KnownAnswer(state=state):
            return state
        case ReadQuestion():
            return read(question)
        case JoinedQuestion(op=op, parts=parts):
            return reduce(lambda a, b: junction_state(op, a, b), (answered(part, read) for part in parts))
        case NegatedQuestion(part=part):
            return -answered(part, read)
        case PickedQuestion():
            parts = (question.condition, question.then, question.otherwise)
            condition, then, otherwise = (answered(part, read) for part in parts)
            agreed = np.where(then == otherwise, then, UNKNOWN)
            return np.where(condition == TRUE, then, np.where(condition == FALSE, otherwise, agreed)).astype(np.int8)


def possible(question: Question) -> States:
    """The states of boxes, whatever truth tensors hold."""
    return answered(question, lambda read: np.full(read.rows[0].shape, UNKNOWN, dtype=np.int8))
