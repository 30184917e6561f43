"""Exact evaluation of specialised relations on numpy arrays; every partial tile and every mask is computed here.

Values are int64 where interval analysis shows that 64 bits are enough for every step, and Python integers otherwise, so
that an overflow is detected and never wraps. A fault (overflow, division by zero, an index out of range) counts only in
lanes that `and`, `or` and `if` leave active; in all other lanes the operand is not evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from attnc.compiler.ir.array_evaluator import ONE_LANE, Active, ArrayEvaluator
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
    kind: Any = object if wide else np.int64
    q = np.arange(*rows, dtype=np.int64).astype(kind)[:, None]
    k = np.arange(*keys, dtype=np.int64).astype(kind)[None, :]
    evaluator = ArrayEvaluator(q, k, wide, origins or {}, decide=decide)
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
    evaluator = _evaluator(q, k, {}, origins, wide=wide)
    value = evaluator.truth(node, active) if is_truth(node) else evaluator.integer(node, active)
    integers = np.broadcast_to(value, active.shape)
    return np.where(active, integers, 0).astype(np.int64) if wide else integers.astype(np.int64)


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


def integers_in(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    active: Active,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> NDArray[np.int64]:
    """Evaluate as `integers_at` does a node that reads variables, whose values are (…, rows or 1, keys or 1)."""
    evaluator = _evaluator(q, k, variables, origins, wide=wide, tensors=tensors)
    value = evaluator.truth(node, active) if is_truth(node) else evaluator.integer(node, active)
    value = np.broadcast_to(value, np.broadcast_shapes(np.shape(value), active.shape))
    return np.where(active, value, 0).astype(np.int64) if wide else value.astype(np.int64)


def truths_in(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    active: Active,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> Active:
    """Return the truth values of a condition, with lanes as in `integers_in`."""
    evaluator = _evaluator(q, k, variables, origins, wide=wide, tensors=tensors)
    truths = np.asarray(evaluator.truth(node, active), dtype=np.bool_)
    shape = np.broadcast_shapes(truths.shape, active.shape)
    return truths if truths.shape == shape else np.array(np.broadcast_to(truths, shape))


def floats_in(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    active: Active,
    fits: Callable[[Index], bool],
    origins: Mapping[Index, Span] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> NDArray[np.float64]:
    """Evaluate an integer as binary64, with lanes as in `integers_in`.

    Subexpressions for which `fits` holds are exact before the conversion; sums, products and tables of larger numbers
    are rounded, and all other operations fault where they exceed 64 bits.
    """
    if fits(node):
        return integers_in(node, q, k, variables, active, origins, wide=False, tensors=tensors).astype(np.float64)

    def evaluate(part: Index, active: Active = active) -> NDArray[np.float64]:
        return floats_in(part, q, k, variables, active, fits, origins, tensors)

    match node:
        case Const() | Arith(op="pow", operands=(Const(), Const())):
            return np.full((1, 1), _rounded_constant(node))
        case Linear():
            return sum(
                (evaluate(term) * float(factor) for term, factor in node.terms), np.full((1, 1), float(node.constant))
            )
        case Arith(op="mul"):
            return evaluate(node.operands[0]) * evaluate(node.operands[1])
        case Arith(op="min" | "max"):
            extreme = np.minimum if node.op == "min" else np.maximum
            return accumulate(extreme, map(evaluate, node.operands))
        case Arith(op="abs"):
            return np.abs(evaluate(node.operands[0]))
        case TableRead():
            wide = not fits(node.index)
            index = integers_in(node.index, q, k, variables, active, origins, wide=wide, tensors=tensors)
            inside = np.clip(index, 0, len(node.values) - 1)
            return np.where(active & (index != inside), np.nan, np.array([float(v) for v in node.values])[inside])
        case ExactSelect():
            wide = not fits(node.condition)
            condition = integers_in(node.condition, q, k, variables, active, origins, wide=wide, tensors=tensors) != 0
            return np.where(
                condition, evaluate(node.then, active & condition), evaluate(node.otherwise, active & ~condition)
            )
        case _:
            return integers_in(node, q, k, variables, active, origins, wide=True, tensors=tensors).astype(np.float64)


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
    kind: Any = object if wide else np.int64
    q = np.arange(*rows, dtype=np.int64).astype(kind)[:, None]
    k = np.arange(*keys, dtype=np.int64).astype(kind)[None, :]
    value = ArrayEvaluator(q, k, wide, {}, decide=decide).integer(node, ONE_LANE)
    return np.broadcast_to(value, (rows[1] - rows[0], keys[1] - keys[0])).astype(np.int64)
