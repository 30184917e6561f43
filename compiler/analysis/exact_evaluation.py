"""Exact evaluation of specialised relations on numpy arrays: what every partial tile and every mask comes from.

Values are int64 where interval analysis shows that 64 bits are enough for every step; otherwise Python integers, so
that an overflow is found and never wraps. A fault (overflow, division by zero, an index out of range) counts only in
lanes that `and`, `or` and `if` leave alive; elsewhere the operand is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce as accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.array_evaluator import Alive, Array, ArrayEvaluator, PointBatch
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
from attnc.spec.source import Span


def mask(
    relation: Index,
    rows: tuple[int, int],
    keys: tuple[int, int],
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool | None = None,
) -> NDArray[np.bool_]:
    """The relation on rows `start .. stop` and keys `start .. stop`: bool (rows, keys).

    `wide`: whether 64 bits may be too few there, where that is known. Raises EvaluationError on a fault, with the place
    in the source where it is known.
    """
    wide = not fits_word(relation, rows, keys) if wide is None else wide
    kind: Any = object if wide else np.int64
    q = np.arange(*rows, dtype=np.int64).astype(kind)[:, None]
    k = np.arange(*keys, dtype=np.int64).astype(kind)[None, :]
    evaluator = ArrayEvaluator(q, k, wide, origins or {})
    shape = (rows[1] - rows[0], keys[1] - keys[0])
    if 0 in shape:
        return np.zeros(shape, dtype=np.bool_)
    value = evaluator.truth(relation, np.ones((1, 1), dtype=np.bool_))
    return np.ascontiguousarray(np.broadcast_to(value, shape))


def values(
    node: Index,
    lanes: PointBatch,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> Array:
    """An integer or a condition that reads variables: its value in every lane.

    Raises EvaluationError on a fault.
    """
    if not len(lanes):
        return np.zeros(0, dtype=np.int64)
    evaluator = ArrayEvaluator(lanes.q[None], lanes.k[None], wide, origins or {})
    for variable, value in lanes.variables.items():
        evaluator.bind(variable, value[None])
    alive = np.ones((1, 1), dtype=np.bool_)
    found = evaluator.truth(node, alive) if is_truth(node) else evaluator.integer(node, alive)
    return np.asarray(np.broadcast_to(found, (1, len(lanes)))[0])


def mask_at(
    relation: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    alive: Alive,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> Alive:
    """The relation on rows `q` and keys `k` where `alive` (rows, keys) has them, false elsewhere.

    Raises EvaluationError on a fault there.
    """
    if not alive.any():
        return np.zeros_like(alive)
    evaluator = _evaluator(q, k, {}, origins, wide=wide)
    return np.asarray(evaluator.truth(relation, alive) & alive)


def integers_at(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    alive: Alive,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> NDArray[np.int64]:
    """An integer, or a condition as 0 and 1, on rows `q` and keys `k`: (rows, keys), anything where not `alive`.

    Raises EvaluationError on a fault where `alive`, and where a value does not fit in 64 bits.
    """
    evaluator = _evaluator(q, k, {}, origins, wide=wide)
    value = evaluator.truth(node, alive) if is_truth(node) else evaluator.integer(node, alive)
    found = np.broadcast_to(value, alive.shape)
    return np.where(alive, found, 0).astype(np.int64) if wide else found.astype(np.int64)


def _evaluator(
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    origins: Mapping[Index, Span] | None,
    *,
    wide: bool,
) -> ArrayEvaluator:
    """Return an evaluator for rows and keys by number, and for variables with these values."""
    kind: Any = object if wide else np.int64
    evaluator = ArrayEvaluator(q.astype(kind)[:, None], k.astype(kind)[None, :], wide, origins or {})
    for variable, value in variables.items():
        evaluator.bind(variable, value)
    return evaluator


def integers_in(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    alive: Alive,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> NDArray[np.int64]:
    """Return the integers of a node as `integers_at` does, given values of variables, (…, rows or 1, keys or 1)."""
    evaluator = _evaluator(q, k, variables, origins, wide=wide)
    found = evaluator.truth(node, alive) if is_truth(node) else evaluator.integer(node, alive)
    found = np.broadcast_to(found, np.broadcast_shapes(np.shape(found), alive.shape))
    return np.where(alive, found, 0).astype(np.int64) if wide else found.astype(np.int64)


def truths_in(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    alive: Alive,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> Alive:
    """A condition as it is, lanes as in `integers_in`."""
    evaluator = _evaluator(q, k, variables, origins, wide=wide)
    found = np.asarray(evaluator.truth(node, alive), dtype=np.bool_)
    shape = np.broadcast_shapes(found.shape, alive.shape)
    return found if found.shape == shape else np.array(np.broadcast_to(found, shape))


def floats_in(
    node: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    variables: Mapping[Var, NDArray[np.int64]],
    alive: Alive,
    fits: Callable[[Index], bool],
    origins: Mapping[Index, Span] | None = None,
) -> NDArray[np.float64]:
    """An integer on its way into floating point, in binary64, lanes as in `integers_in`.

    What `fits` 64 bits is exact until then; sums, products and tables of larger numbers are rounded, others fault where
    they pass 64 bits.
    """
    if fits(node):
        return integers_in(node, q, k, variables, alive, origins, wide=False).astype(np.float64)

    def of(part: Index, here: Alive = alive) -> NDArray[np.float64]:
        return floats_in(part, q, k, variables, here, fits, origins)

    match node:
        case Const() | Arith(op="pow", operands=(Const(), Const())):
            return np.full((1, 1), _rounded_constant(node))
        case Linear():
            return sum((of(term) * float(factor) for term, factor in node.terms), np.full((1, 1), float(node.constant)))
        case Arith(op="mul"):
            return of(node.operands[0]) * of(node.operands[1])
        case Arith(op="min" | "max"):
            extreme = np.minimum if node.op == "min" else np.maximum
            return accumulate(extreme, map(of, node.operands))
        case Arith(op="abs"):
            return np.abs(of(node.operands[0]))
        case TableRead():
            index = integers_in(node.index, q, k, variables, alive, origins, wide=not fits(node.index))
            inside = np.clip(index, 0, len(node.values) - 1)
            return np.where(alive & (index != inside), np.nan, np.array([float(v) for v in node.values])[inside])
        case ExactSelect():
            condition = integers_in(node.condition, q, k, variables, alive, origins, wide=not fits(node.condition)) != 0
            return np.where(condition, of(node.then, alive & condition), of(node.otherwise, alive & ~condition))
        case _:
            return integers_in(node, q, k, variables, alive, origins, wide=True).astype(np.float64)


def _rounded_constant(node: Const | Arith) -> float:
    if isinstance(node, Const):
        return float(node.value)
    base, exponent = (float(o.value) if isinstance(o, Const) else 0.0 for o in node.operands)
    return float(np.float64(base) ** exponent)


def mask_of_coordinates(relation: Index, coordinates: Mapping[Index, str], extent: int) -> NDArray[np.bool_]:
    """A relation that reads one axis, on all pairs of its `extent` coordinates: bool (rows, keys).

    `coordinates` says of which place, q or k, each of its coordinate nodes is. 64 bits must be enough. Raises
    EvaluationError on a fault.
    """
    axis = np.arange(extent, dtype=np.int64)
    places = {"q": axis[:, None], "k": axis[None, :]}
    evaluator = ArrayEvaluator(
        places["q"], places["k"], False, {}, {node: places[p] for node, p in coordinates.items()}
    )
    value = evaluator.truth(relation, np.ones((1, 1), dtype=np.bool_))
    return np.ascontiguousarray(np.broadcast_to(value, (extent, extent)))


def integers(node: Index, rows: tuple[int, int], keys: tuple[int, int]) -> NDArray[np.int64]:
    """An integer on rows and keys `start .. stop`: (rows, keys).

    Raises EvaluationError on a fault.
    """
    wide = not fits_word(node, rows, keys)
    kind: Any = object if wide else np.int64
    q = np.arange(*rows, dtype=np.int64).astype(kind)[:, None]
    k = np.arange(*keys, dtype=np.int64).astype(kind)[None, :]
    value = ArrayEvaluator(q, k, wide, {}).integer(node, np.ones((1, 1), dtype=np.bool_))
    return np.broadcast_to(value, (rows[1] - rows[0], keys[1] - keys[0])).astype(np.int64)
