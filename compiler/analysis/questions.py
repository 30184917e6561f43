"""Relations that read truth tensors, on boxes of pairs: either decided, or turned into a question about the tensors.

Interval analysis decides conditions that depend on positions alone. For a truth tensor it finds the entries that a box
reads, so that the owner of the tensor can answer: none of the entries is true, all are, or neither.
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
from attnc.compiler.ir.rewrite import walk

Int64 = NDArray[np.int64]
States = NDArray[np.int8]

Span = tuple[Int64, Int64]
"""The half-open range of entries that each box reads."""


@dataclass(frozen=True, eq=False)
class KnownAnswer:
    """An answer that does not depend on truth tensors: FALSE, UNKNOWN or TRUE on each box."""

    state: States


@dataclass(frozen=True, eq=False)
class ReadQuestion:
    """A question about a rectangle of rows and columns of a tensor: TRUE if all entries hold, FALSE if none does.

    `sure`: if given, the answer is TRUE where the only row holds at one of these places, instead.
    """

    tensor: Tensor
    rows: Span
    places: Span
    sure: Span | None = None


@dataclass(frozen=True, eq=False)
class JoinedQuestion:
    """The `and` or the `or` of questions."""

    op: Literal["and", "or"]
    parts: tuple[Question, ...]


@dataclass(frozen=True, eq=False)
class NegatedQuestion:
    """The negation of a question."""

    part: Question


@dataclass(frozen=True, eq=False)
class PickedQuestion:
    """The question `then if condition else otherwise`."""

    condition: Question
    then: Question
    otherwise: Question


Question = KnownAnswer | ReadQuestion | JoinedQuestion | NegatedQuestion | PickedQuestion


@dataclass(frozen=True)
class Asking:
    """The questions of a relation that reads truth tensors of one batch entry and head.

    `stretches`: for each aggregate `any` over the places of a tensor, its read and the ends of its range. All
    expressions are over the rows and keys of a call.
    """

    stretches: Mapping[Index, tuple[Lookup, Index, Index]]

    def of(self, relation: Index, boxes: Boxes) -> Question:
        """Return the question that a relation poses on boxes; its truth tensors have at most two dimensions."""
        return _Boxes(self, Analysis(boxes, keyed=False)).question(relation)


@dataclass(frozen=True)
class _Boxes:
    asking: Asking
    analysis: Analysis

    def question(self, node: Index) -> Question:
        if node in self.asking.stretches:
            return self._stretch(*self.asking.stretches[node])
        if not reads_data(node):
            return self._answer(self.analysis.truth(node).state)
        match node:
            case Bool(op=op, operands=operands):
                return joined(op, [self.question(operand) for operand in operands])
            case Not(operand=operand):
                return NegatedQuestion(self.question(operand))
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                return PickedQuestion(self.question(condition), self.question(then), self.question(otherwise))
            case Lookup() if is_bare(node):
                unit_span = self._span(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64))
                spans = [self._span(i.low, i.high + 1) for i in map(self.analysis.integer, node.indices)]
                rows, places = [unit_span] * (2 - len(spans)) + spans
                return ReadQuestion(node.tensor, rows, places)
            case _:
                assert is_truth(node)
                return self._answer(np.full(1, UNKNOWN, dtype=np.int8))

    def _stretch(self, read: Lookup, low: Index, high: Index) -> Question:
        """Ask whether the only row holds at a place in the ranges of all pairs, or nowhere in any pair's range."""
        rows = [self.analysis.integer(index) for index in read.indices[:-1]]
        first, end = self.analysis.integer(low), self.analysis.integer(high)
        zero = np.zeros(1, dtype=np.int64)
        row = rows[0] if rows else Ints(zero, zero, zero.astype(np.uint64), zero)
        single_row = row.low == row.high
        sure = self._span(first.high, np.where(single_row, end.low, first.high))
        return ReadQuestion(read.tensor, self._span(row.low, row.high + 1), self._span(first.low, end.high), sure)

    def _answer(self, state: States) -> KnownAnswer:
        return KnownAnswer(np.broadcast_to(state, self.analysis.size))

    def _span(self, first: Int64, end: Int64) -> Span:
        size = self.analysis.size
        return np.broadcast_to(first, size), np.broadcast_to(np.maximum(end, first), size)


def is_bare(node: Lookup) -> bool:
    """Whether a read is of a truth tensor of one batch entry and head, at indices that depend on positions alone."""
    tensor = node.tensor
    is_truth_tensor = (
        tensor.kind == "bool" and len(tensor.dims) <= 2 and not {"batch", "head", "kv_head"} & {*tensor.dims}
    )
    return is_truth_tensor and not any(map(reads_data, node.indices))


def reads_data(node: Index) -> bool:
    """Whether an expression reads inputs, the head or the batch entry."""
    return any(isinstance(below, Lookup | HeadIndex) for below in walk(node))


def joined(op: Literal["and", "or"], parts: list[Question]) -> Question:
    """Join questions by `and` or `or`, with all known answers merged into one part."""
    answers = [part.state for part in parts if isinstance(part, KnownAnswer)]
    questions: list[Question] = [part for part in parts if not isinstance(part, KnownAnswer)]
    if answers:
        questions.append(KnownAnswer(reduce(lambda a, b: junction_state(op, a, b), answers)))
    return questions[0] if len(questions) == 1 else JoinedQuestion(op, tuple(questions))


def reads_of(question: Question) -> list[ReadQuestion]:
    """Return all reads in a question."""
    match question:
        case KnownAnswer():
            return []
        case ReadQuestion():
            return [question]
        case JoinedQuestion(parts=parts):
            return [question_read for part in parts for question_read in reads_of(part)]
        case NegatedQuestion(part=part):
            return reads_of(part)
        case PickedQuestion():
            return [r for part in (question.condition, question.then, question.otherwise) for r in reads_of(part)]


def answered(question: Question, read: Callable[[ReadQuestion], States]) -> States:
    """Return the states of boxes, with the answers of `read`: int8 (…, boxes)."""
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
    """Return the states of boxes that hold for any contents of the truth tensors."""
    return answered(question, lambda read: np.full(read.rows[0].shape, UNKNOWN, dtype=np.int8))
