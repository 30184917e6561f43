"""Selections that look ahead: the selection of a row depends on tokens after the row's first query."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.block_conditions import values_at
from attnc.compiler.ir import Index, Value, fold
from attnc.compiler.ir.array_evaluator import PointBatch
from attnc.compiler.ir.rewrite import substitute
from attnc.compiler.lowering.lower_attention import TOKENS
from attnc.compiler.lowering.specialise import CallSizes, Slices, Window, specialise
from attnc.compiler.passes.attentions import content_masks, content_masks_of_selection, might_hold
from attnc.spec.errors import EvaluationError

Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

SHORTEST, LONGEST = 192, 2048
"""The shortest and longest sample, in tokens."""
PLACES = 4
"""Minimum number of items in a sample."""
ROWS = 48
"""Number of rows of a sample to evaluate."""


@dataclass(frozen=True)
class Ahead:
    """A witness of foresight: a query, a place that it may select, and a later token that the place's score reads."""

    selection: str
    query: int
    place: int
    token: int


def looks_ahead(pattern: ir.Pattern) -> Ahead | None:
    """Find a witness that a causal pattern selects by later tokens; None where the samples show none."""
    for item in pattern.selections:
        readers = [node for node in pattern.nodes if item in _decisive(pattern, node)]
        sample = _SelectionSample.of(item)
        if sample is None or not readers or not all(_is_causal(node, sample.tokens) for node in readers):
            continue
        witness = sample.witness()
        if witness is not None:
            return witness
    return None


def _decisive(pattern: ir.Pattern, node: ir.Attend) -> list[ir.Selection]:
    """The selections that a relation reads, directly or through other selections."""
    masks_read, result = content_masks([node.visible]), list[ir.Selection]()
    while True:
        new = [item for item in pattern.selections if item.given in masks_read and item not in result]
        if not new:
            return result
        result += new
        masks_read = masks_read.union(*(content_masks_of_selection(item) for item in new))


def _is_causal(node: ir.Attend, n: int) -> bool:
    """Whether no query sees a later key, whatever selections select."""
    if node.keys is not None:
        return False
    relation = might_hold(node.visible, content_masks([node.visible]))
    relations = [relation]
    if node.family is not None:
        variable, low, high = node.family
        ends = {_count(low, n), max(_count(high, n) - 1, _count(low, n))}
        relations = [substitute(relation, {variable: fold.const(end)}) for end in ends]
    masks = [exact_evaluation.mask(_specialised(variant, n), (0, n), (0, n)) for variant in relations]
    return not any(bool(np.triu(mask, 1).any()) for mask in masks)


def _specialised(node: Index, n: int) -> Index:
    other_sizes = {name: PLACES for below in node.below if isinstance(below, ir.Extent) for name in [below.name]}
    sizes = CallSizes({**other_sizes, "heads": 1, "kv_heads": 1, "group": 1, "dk": 8, "dv": 8, TOKENS: n})
    return specialise(node, sizes, Slices({}), Window(0, 0, n, n, 0), batch=0, head=0, group=1)


@dataclass
class _SelectionSample:
    """A sample of a selection's rows and items over a number of tokens: one lane for each pair."""

    item: ir.Selection
    tokens: int
    lanes: PointBatch
    limit: Int64
    """The first query of the row of each lane."""
    active: Bools
    _variables: dict[ir.Var, Int64] = field(default_factory=dict)

    @classmethod
    def of(cls, item: ir.Selection) -> _SelectionSample | None:
        """Return a sample with at least `PLACES` items; None where the selection cannot be sampled."""
        n = SHORTEST
        try:
            while _count(item.items, n) < PLACES and n < LONGEST:
                n *= 2
            rows, places = _count(item.rows, n), _count(item.items, n)
            row_of = exact_evaluation.integers(_specialised(item.row_of, n), (0, n), (0, 1))[:, 0]
            sampled_rows = np.unique(np.linspace(0, rows - 1, ROWS).astype(np.int64))
            first = np.array([int(np.argmax(row_of == row)) if (row_of == row).any() else n for row in sampled_rows])
            q, k = np.repeat(sampled_rows, places), np.tile(np.arange(places), len(sampled_rows))
            sample = cls(item, n, PointBatch({}, q, k), np.repeat(first, places), np.ones(len(q), dtype=np.bool_))
            candidates = might_hold(item.candidates, content_masks([item.candidates]))
            sample.active = sample._holds(candidates) & (sample.limit < n)
        except (AssertionError, KeyError, EvaluationError):
            return None  # the selection reads unknown sizes, or has a fault, which a call reports
        return sample

    def witness(self) -> Ahead | None:
        """Return the first lane whose score reads a token after its query; None where no lane does."""
        try:
            token = self._last(self.item.score, self.active)
        except (AssertionError, KeyError, EvaluationError):
            return None
        (ahead,) = np.nonzero(self.active & (token > self.limit))
        if not len(ahead):
            return None
        lane = int(ahead[0])
        return Ahead(self.item.name, int(self.limit[lane]), int(self.lanes.k[lane]), int(token[lane]))

    def _numbers(self, node: Index) -> Int64:
        points = PointBatch(self._variables, self.lanes.q, self.lanes.k)
        return np.asarray(values_at(_specialised(node, self.tokens), points, wide=False), dtype=np.int64)

    def _holds(self, condition: Index) -> Bools:
        return np.asarray(self._numbers(condition) != 0)

    def _last(self, node: Value, active: Bools) -> Int64:
        """The last token that a value reads in each lane; -1 for no token."""
        nothing = np.full(len(active), -1, dtype=np.int64)
        if not active.any():
            return nothing
        match node:
            case ir.Vec(at=at):
                return np.where(active, self._numbers(at), -1)
            case ir.Element(tensor=tensor, indices=indices):
                pairs = zip(tensor.dims, indices, strict=False)
                last = [self._numbers(i) for dim, i in pairs if dim in ("key", "token", "query")]
                return np.where(active, np.maximum.reduce([nothing, *last]), -1)
            case ir.FloatSelect(condition=condition, then=then, otherwise=otherwise):
                holds = self._holds(condition)
                return np.maximum(self._last(then, active & holds), self._last(otherwise, active & ~holds))
            case ir.ValueReduce():
                return self._last_in_range(node, active)
            case ir.VisibleReduce(body=body):
                last = self._last(body, self.active).reshape(-1, len(np.unique(self.lanes.k))).max(1)
                return np.asarray(np.where(active, np.repeat(last, len(active) // max(len(last), 1)), -1))
            case _:
                inner = [self._last(child, active) for child in node.children() if isinstance(child, ir.VALUES)]
                return np.asarray(np.maximum.reduce([nothing, *inner]))

    def _last_in_range(self, node: ir.ValueReduce, active: Bools) -> Int64:
        """The last token that an aggregate reads, at the ends of its range; all other reads lie in between."""
        low, high = self._numbers(node.low), self._numbers(node.high)
        nonempty = active & (low < high)
        result = np.full(len(active), -1, dtype=np.int64)
        outer_variables = dict(self._variables)
        for end in (low, high - 1):
            self._variables = {**outer_variables, node.var: np.where(nonempty, end, low)}
            result = np.maximum(result, self._last(node.body, nonempty & self._holds(node.condition)))
        self._variables = outer_variables
        return result


def _count(node: Index | None, n: int) -> int:
    if node is None:
        return n
    specialised = _specialised(node, n)
    if isinstance(specialised, ir.Const):
        return specialised.value
    return int(exact_evaluation.integers(specialised, (0, 1), (0, 1))[0, 0])
