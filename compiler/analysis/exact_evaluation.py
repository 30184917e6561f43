"""Exact evaluation of specialised relations on numpy arrays; every partial tile and every mask is computed here.

Values are int64 where interval analysis shows that 64 bits are enough for every step, and Python integers otherwise, so
that an overflow is detected and never wraps. A fault (overflow, division by zero, an index out of range) counts only in
lanes that `and`, `or` and `if` leave active; in all other lanes the operand is not evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce as accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.block_conditions import decide
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import (
    Arith,
    Const,
    ExactSelect,
    Index,
    Linear,
    TableRead,
    Var,
    is_truth,
)
from attnc.compiler.ir.array_evaluator import ONE_LANE, WORD, Active, ArrayEvaluator
from attnc.spec.source import Span


def mask(
    relation: Index,
    rows: tuple[int, int],
    keys: tuple[int, int],
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool | None = None,
) -> NDArray[np.bool_]:
    """Evaluate the relation on rows `start .. stop` and keys `start .. stop`: bool (rows, keys).

    `wide`: whether values may exceed 64 bits; None to find out by analysis. Raises EvaluationError on a fault, with the
    position in the source if `origins` has it.
    """
    wide = not fits_word(relation, rows, keys) if wide is None else wide
    evaluator = _evaluator(np.arange(*rows), np.arange(*keys), {}, origins, wide=wide)
    shape = (rows[1] - rows[0], keys[1] - keys[0])
    if 0 in shape:
        return np.zeros(shape, dtype=np.bool_)
    value = evaluator.truth(relation, ONE_LANE)
    return np.ascontiguousarray(np.broadcast_to(value, shape))


def mask_at(
    relation: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    active: Active,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> Active:
    """Evaluate the relation on rows `q` and keys `k` where `active` (rows, keys) is true; false elsewhere.

    Raises EvaluationError on a fault where `active` is true.
    """
    if not active.any():
        return np.zeros_like(active)
    evaluator = _evaluator(q, k, {}, origins, wide=wide)
    return np.asarray(evaluator.truth(relation, active) & active)


def integers_at(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    active: Active,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> NDArray[np.int64]:
    """Evaluate an integer, or a condition as 0 and 1, on rows `q` and keys `k`: (rows, keys), arbitrary off `active`.

    Raises EvaluationError on a fault where `active`, and where a value does not fit in 64 bits.
    """
    return _integers(_evaluator(q, k, {}, origins, wide=wide), node, active, wide=wide)


def _integers(evaluator: ArrayEvaluator, node: Index, active: Active, *, wide: bool) -> NDArray[np.int64]:
    value = evaluator.truth(node, active) if is_truth(node) else evaluator.integer(node, active)
    value = np.broadcast_to(value, np.broadcast_shapes(np.shape(value), active.shape))
    return np.where(active, value, 0).astype(np.int64) if wide else value.astype(np.int64)


def _evaluator(
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    origins: Mapping[Index, Span] | None,
    *,
    wide: bool,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> ArrayEvaluator:
    """Return an evaluator for rows and keys by number, and for variables with these values."""
    kind: Any = object if wide else np.int64
    rows, keys = q.astype(kind)[:, None], k.astype(kind)[None, :]
    evaluator = ArrayEvaluator(rows, keys, wide, origins or {}, decide=decide, tensors=tensors)
    for variable, value in variables.items():
        evaluator.bind(variable, value)
    return evaluator


@dataclass(frozen=True)
class PairLanes:
    """Pairs on which nodes that read variables are evaluated: rows `q`, keys `k`, and where pairs are `active`.

    The values of `variables` are (…, rows or 1, keys or 1). `counts`: the numbers of queries and keys of the window.
    `tensors`: the data of truth tensors that nodes leave open, by name.
    Results are arbitrary where pairs are not active; a fault in an active pair raises EvaluationError.
    """

    q: NDArray[np.int64]
    k: NDArray[np.int64]
    variables: Mapping[Var, NDArray[np.int64]]
    active: Active
    counts: tuple[int, int]
    origins: Mapping[Index, Span]
    tensors: Mapping[str, NDArray[Any]] | None = None

    def fits(self, node: Index) -> bool:
        """Check that 64 bits hold every intermediate of an exact expression, its constants included."""
        if not all(map(_is_word, node.below)):
            return False
        limits = {v: (int(x.min(initial=0)), int(x.max(initial=0))) for v, x in self.variables.items()}
        return fits_word(node, (0, self.counts[0]), (0, self.counts[1]), limits)

    def integers(self, node: Index) -> NDArray[np.int64]:
        """Evaluate an integer, or a condition as 0 and 1."""
        return self._integers(node, wide=not self.fits(node))

    def _integers(self, node: Index, *, wide: bool) -> NDArray[np.int64]:
        return _integers(self._evaluator(wide), node, self.active, wide=wide)

    def _evaluator(self, wide: bool) -> ArrayEvaluator:
        return _evaluator(self.q, self.k, self.variables, self.origins, wide=wide, tensors=self.tensors)

    def truths(self, node: Index) -> Active:
        """Evaluate a condition."""
        truths = np.asarray(self._evaluator(not self.fits(node)).truth(node, self.active), dtype=np.bool_)
        shape = np.broadcast_shapes(truths.shape, self.active.shape)
        return truths if truths.shape == shape else np.array(np.broadcast_to(truths, shape))

    def floats(self, node: Index) -> NDArray[np.float64]:
        """Evaluate an integer as binary64, even where it exceeds 64 bits.

        Subexpressions that fit in 64 bits are exact before the conversion; sums, products and tables of larger numbers
        are rounded, and all other operations fault where they exceed 64 bits.
        """
        if self.fits(node):
            return self._integers(node, wide=False).astype(np.float64)
        match node:
            case Const() | Arith(op="pow", operands=(Const(), Const())):
                return np.full((1, 1), _rounded_constant(node))
            case Linear():
                terms = (self.floats(term) * float(factor) for term, factor in node.terms)
                return sum(terms, np.full((1, 1), float(node.constant)))
            case Arith(op="mul"):
                return self.floats(node.operands[0]) * self.floats(node.operands[1])
            case Arith(op="min" | "max"):
                extreme = np.minimum if node.op == "min" else np.maximum
                return accumulate(extreme, map(self.floats, node.operands))
            case Arith(op="abs"):
                return np.abs(self.floats(node.operands[0]))
            case TableRead():
                index = self.integers(node.index)
                inside = np.clip(index, 0, len(node.values) - 1)
                entries = np.array([float(v) for v in node.values])[inside]
                return np.where(self.active & (index != inside), np.nan, entries)
            case ExactSelect():
                condition = self.integers(node.condition) != 0
                then, otherwise = (replace(self, active=self.active & side) for side in (condition, ~condition))
                return np.where(condition, then.floats(node.then), otherwise.floats(node.otherwise))
            case _:
                return self._integers(node, wide=True).astype(np.float64)


def _is_word(node: Index) -> bool:
    """Check that the constants of a node, without those of its operands, fit in 64 bits."""
    match node:
        case Const():
            return abs(node.value) < WORD
        case Linear():
            return all(abs(n) < WORD for n in (node.constant, *(factor for _, factor in node.terms)))
        case TableRead():
            return all(abs(n) < WORD for n in node.values)
        case _:
            return True


def _rounded_constant(node: Const | Arith) -> float:
    if isinstance(node, Const):
        return float(node.value)
    base, exponent = (float(o.value) if isinstance(o, Const) else 0.0 for o in node.operands)
    return float(np.float64(base) ** exponent)


def mask_of_coordinates(relation: Index, coordinates: Mapping[Index, str], extent: int) -> NDArray[np.bool_]:
    """Evaluate a relation that reads one axis, on all pairs of its `extent` coordinates: bool (rows, keys).

    `coordinates`: q or k for each coordinate node of the relation. Values must fit in 64 bits. Raises EvaluationError
    on a fault.
    """
    axis = np.arange(extent, dtype=np.int64)
    places = {"q": axis[:, None], "k": axis[None, :]}
    evaluator = ArrayEvaluator(
        places["q"], places["k"], False, {}, {node: places[p] for node, p in coordinates.items()}, decide=decide
    )
    value = evaluator.truth(relation, ONE_LANE)
    return np.ascontiguousarray(np.broadcast_to(value, (extent, extent)))


def integers(node: Index, rows: tuple[int, int], keys: tuple[int, int]) -> NDArray[np.int64]:
    """Evaluate an integer on rows and keys `start .. stop`: (rows, keys).

    Raises EvaluationError on a fault.
    """
    wide = not fits_word(node, rows, keys)
    value = _evaluator(np.arange(*rows), np.arange(*keys), {}, {}, wide=wide).integer(node, ONE_LANE)
    return np.broadcast_to(value, (rows[1] - rows[0], keys[1] - keys[0])).astype(np.int64)
