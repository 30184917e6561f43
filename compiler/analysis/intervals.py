"""Interval analysis, vectorised over boxes: is a relation empty, full or partial on a box, and which boxes are alike?

Besides its interval, a value has a decomposition `value = shape + offset`, where `shape` is a 64-bit hash of a function
of the position inside the box and `offset` is an exact integer for the box. Two boxes whose undecided comparisons have
equal shapes and equal offsets hold the same relation, so a mask computed for one box serves the other: a translation
class. Comparisons that a box decides (`true`, `false`) do not enter the key. Bounds saturate at ±2^61: "unbounded".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce as accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.box_values import (
    FALSE,
    FAR,
    LIMIT,
    NO_OFFSET,
    NO_SHAPE,
    TRUE,
    TRUE_KEY,
    UNKNOWN,
    Int64,
    Ints,
    Truths,
    bounds_alone,
    computed_once,
    counted,
    decided,
    decided_truths,
    divided,
    function_bounds,
    is_positive_constant,
    junction,
    largest,
    named_hash,
    negated,
    picked,
    sum_hash,
    variable_name,
    wrapped_product,
)
from attnc.compiler.analysis.hashing import Hash, combine, constant_hash
from attnc.compiler.analysis.range_table import RangeTable
from attnc.compiler.ir import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    DataRead,
    ExactSelect,
    Index,
    Linear,
    Not,
    Position,
    Reduce,
    TableRead,
    Truth,
    UnitCondition,
    Var,
    fold,
    is_truth,
    not_a_truth,
    not_an_integer,
)
from attnc.compiler.ir.magnitude import is_small
from attnc.compiler.ir.rewrite import rewrite, variables
from attnc.compiler.ir.verify_ir import verified


@dataclass(frozen=True, slots=True)
class Boxes:
    """Rectangles of rows `q_low ..= q_high` and keys `k_low ..= k_high` (ends included), one per entry."""

    q_low: Int64
    q_high: Int64
    k_low: Int64
    k_high: Int64


def classify(relation: Index, boxes: Boxes) -> NDArray[np.int8]:
    """Return the state of a specialised relation on each box."""
    return Analysis(boxes, keyed=False).truth(relation).state


def fits_word(
    node: Index, rows: tuple[int, int], keys: tuple[int, int], loops: Mapping[Var, tuple[int, int]] | None = None
) -> bool:
    """Whether no step of evaluating a condition or integer on a rectangle can exceed 64 bits, guarded or not.

    `loops`: the least and greatest value of each free variable.
    """
    if not loops and is_small(node, max(rows[1], keys[1], 1)):
        return True
    ends = (rows[0], max(rows[1] - 1, rows[0]), keys[0], max(keys[1] - 1, keys[0]))
    boxes = Boxes(*(np.array([end], dtype=np.int64) for end in ends))
    ranges = {v: (np.array([low]), np.array([high])) for v, (low, high) in (loops or {}).items()}
    analysis = Analysis(boxes, keyed=False, variables=ranges)
    if is_truth(node):
        analysis.truth(node)
    else:
        analysis.integer(node)
    return not analysis.saturated


def bounds(node: Index, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[int, int]:
    """Return bounds of an integer on a rectangle, both inclusive."""
    ends = (rows[0], rows[1] - 1, keys[0], keys[1] - 1)
    analysed = Analysis(Boxes(*(np.array([end], dtype=np.int64) for end in ends)), keyed=False).integer(node)
    return int(np.min(analysed.low)), int(np.max(analysed.high))


@verified
def simplified(relation: Index, rows: tuple[int, int], keys: tuple[int, int]) -> Index:
    """Replace every condition that has the same value on all of a rectangle by that value."""
    ends = (rows[0], rows[1] - 1, keys[0], keys[1] - 1)
    analysis = Analysis(Boxes(*(np.array([end], dtype=np.int64) for end in ends)), keyed=False)

    def decide(node: Index) -> Index | None:
        if not is_truth(node) or variables(node):
            return None
        state = int(analysis.truth(node).state[0])
        return None if state == UNKNOWN else fold.truth(state == TRUE)

    return rewrite(relation, decide)


Ranges = Mapping[Var, tuple[Int64, Int64]]
"""The least and greatest values (included) of variables on each box."""

_NOWHERE = Boxes(*(np.zeros(1, dtype=np.int64) for _ in range(4)))


Refine = Callable[[Index, Ranges, NDArray[np.int8]], tuple[NDArray[np.int8], Hash]]
"""A function that decides conditions on units exactly on boxes of few units; see `block_conditions.refine`."""


def analyse_variables(ranges: Ranges, *, keyed: bool = True, refine: Refine | None = None) -> Analysis:
    """Return an analysis of conditions that read variables instead of positions."""
    return Analysis(_NOWHERE, keyed=keyed, refine=refine, variables=ranges)


class Analysis:
    """An analysis of relations on one set of boxes; every node is visited once.

    `refine`: decides conditions on units where boxes touch few of them.
    """

    def __init__(
        self, boxes: Boxes, *, keyed: bool = True, refine: Refine | None = None, variables: Ranges | None = None
    ) -> None:
        self._refine = refine
        self.saturated = False
        self.size = max([len(boxes.q_low), *(len(low) for low, _ in (variables or {}).values())])
        self._keyed = keyed
        self._places = {
            "q": self._leaf("q", boxes.q_low, boxes.q_high),
            "k": self._leaf("k", boxes.k_low, boxes.k_high),
        }
        ranges = variables or {}
        ends = [end for bounds in ranges.values() for end in bounds]
        self._box_hash = self._name("here", boxes.q_low, boxes.q_high, boxes.k_low, boxes.k_high, *ends)
        self._variables = {
            v: self._leaf(variable_name(v), self._clipped(low), self._clipped(high))
            for v, (low, high) in ranges.items()
        }
        self._ends: dict[Var, tuple[Index, Index]] = {}
        self._ints: dict[Index, Ints] = {}
        self._truths: dict[Index, Truths] = {}

    def _name(self, *parts: str | int | tuple[int, ...] | Hash | Int64) -> Hash:
        """Return a hash of names, constants, shapes and offsets; `NO_SHAPE` in an analysis without keys."""
        return named_hash(*parts) if self._keyed else NO_SHAPE

    def _decided(self, state: NDArray[np.int8], key: Hash) -> Truths:
        return decided_truths(state, key) if self._keyed else decided(state)

    def _leaf(self, name: str, low: Int64, high: Int64) -> Ints:
        if not self._keyed:
            return bounds_alone(low, high)
        return Ints(low, high, np.where(low == high, NO_SHAPE, self._name(name, high - low)), low)

    # --- truth values ---

    def truth(self, node: Index) -> Truths:
        """Analyse a condition."""
        return computed_once(self._truths, node, self._truth)

    def _truth(self, node: Index) -> Truths:
        match node:
            case Truth():
                return self._decided(np.full(1, TRUE if node.value else FALSE, dtype=np.int8), TRUE_KEY)
            case Compare():
                return self._compare(node)
            case Bool():
                return junction(node.op, [self.truth(operand) for operand in node.operands], keyed=self._keyed)
            case Not():
                return negated(self.truth(node.operand), keyed=self._keyed)
            case ExactSelect():
                return self._truth_choice(node)
            case DataRead():
                value = self._read(node)
                state = np.where(value.low > 0, TRUE, np.where(value.high <= 0, FALSE, UNKNOWN)).astype(np.int8)
                return self._decided(state, self._name(value.shape, value.offset))
            case Reduce():
                return self._quantified(node)
            case UnitCondition():
                return self._rounded(node)
            case _:
                not_a_truth(node)

    def _compare(self, node: Compare) -> Truths:
        value = self.integer(node.value)
        if node.op == "ge":
            true, false = value.low >= 0, value.high < 0
        else:
            true = (value.low == 0) & (value.high == 0)
            false = (value.low > 0) | (value.high < 0)
        state = np.where(true, TRUE, np.where(false, FALSE, UNKNOWN)).astype(np.int8)
        return self._decided(state, self._name(node.op, value.shape, value.offset))

    def _truth_choice(self, node: ExactSelect) -> Truths:
        condition, then, otherwise = self.truth(node.condition), self.truth(node.then), self.truth(node.otherwise)
        agreed = np.where(then.state == otherwise.state, then.state, UNKNOWN)
        state = picked(condition.state, then.state, otherwise.state, agreed).astype(np.int8)
        key = picked(
            condition.state,
            then.key,
            otherwise.key,
            self._name("if", condition.key, then.key, otherwise.key),
        )
        return self._decided(state, key)

    def _quantified(self, node: Reduce) -> Truths:
        low, high, inside = self._loop(node)
        body = self.truth(node.body)
        surely_empty = (low.low >= high.high) | (inside.state == FALSE)
        surely_some = (low.high < high.low) & (inside.state == TRUE)
        closing, neutral = (TRUE, FALSE) if node.op == "any" else (FALSE, TRUE)
        state = np.where(surely_empty | (body.state == neutral), neutral, UNKNOWN)
        state = np.where(surely_some & (body.state == closing), closing, state)
        return self._decided(state.astype(np.int8), self._loop_name(node, low, high, inside.key, body.key))

    def _loop(self, node: Reduce) -> tuple[Ints, Ints, Truths]:
        """Bind an aggregate's variable to its range, and return the range's ends and the condition on all of it."""
        low, high = self.integer(node.low), self.integer(node.high)
        last = np.maximum(high.high - 1, low.low)
        ends = (node.low, node.high)
        if self._ends.setdefault(node.var, ends) != ends:
            self._forget(node.var)
            self._ends[node.var] = ends
        self._variables[node.var] = self._normalised(self._leaf(variable_name(node.var), low.low, last))
        return low, high, self.truth(node.condition)

    def _loop_name(self, node: Reduce, low: Ints, high: Ints, *parts: Hash | Int64) -> Hash:
        """The shape of an aggregate, with its variable counted from the variable's least value on the box."""
        ends = (low.shape, low.offset - low.low, high.shape, high.offset - low.low)
        return self._name(node.op, *ends, *parts)

    def _rounded(self, node: UnitCondition) -> Truths:
        """Analyse a condition on the units that a box touches; few units are decided exactly."""
        units = [self.integer(unit) for _, unit in node.units]
        ranges = {var: (u.low, u.high) for (var, _), u in zip(node.units, units, strict=True)}
        analysis = analyse_variables(ranges, keyed=self._keyed and self._refine is None)
        truths = analysis.truth(node.keep)
        state, key = truths.state, truths.key
        self.saturated |= analysis.saturated
        if self._refine is not None:
            state, key = self._refine(node.keep, ranges, state)
        places = [part for u in units for part in (u.shape, u.offset - u.low)]
        return self._decided(state, self._name("round", key, *places))

    def _forget(self, variable: Var) -> None:
        """Drop results under another range of a variable: unrolled loops leave inner loops that share a variable."""
        caches: tuple[dict[Index, Any], ...] = (self._ints, self._truths)
        for cache in caches:
            for node in [n for n in cache if variable in variables(n)]:
                del cache[node]

    # --- integers ---

    def integer(self, node: Index) -> Ints:
        """Analyse an integer."""
        return computed_once(self._ints, node, self._integer)

    def _integer(self, node: Index) -> Ints:
        match node:
            case Const():
                return self._constant(node.value)
            case Position() | Var():
                return self._places[node.name] if isinstance(node, Position) else self._variables[node]
            case Linear():
                return self._linear(node)
            case Coord():
                return self._coordinate(node)
            case Arith():
                return self._arith(node)
            case TableRead():
                table = np.array(node.values, dtype=object)
                low, high = int(table.min()), int(table.max())
                index = self.integer(node.index)
                return self._opaque("table", low, high, self._name(node.values), index)
            case DataRead():
                return self._read(node)
            case ExactSelect():
                return self._choice(node)
            case Reduce():
                return self._aggregate(node)
            case _:
                not_an_integer(node)

    def _constant(self, value: int) -> Ints:
        bound = self._clipped(np.array([max(-LIMIT, min(LIMIT, value))], dtype=np.int64))
        return Ints(bound, bound, NO_SHAPE if abs(value) < LIMIT else constant_hash(value), bound)

    def _linear(self, node: Linear) -> Ints:
        total = self._constant(node.constant)
        for term, coefficient in node.terms:
            total = self._add(total, self._scaled(self.integer(term), coefficient))
        return total

    def _add(self, a: Ints, b: Ints) -> Ints:
        low, high = self._clipped(a.low + b.low), self._clipped(a.high + b.high)
        if self.saturated:  # otherwise no bound is at the limit
            low = np.where((a.low <= -LIMIT) | (b.low <= -LIMIT), -LIMIT, low)
            high = np.where((a.high >= LIMIT) | (b.high >= LIMIT), LIMIT, high)
        return self._normalised(Ints(low, high, sum_hash(a.shape, b.shape), a.offset + b.offset))

    def _scaled(self, a: Ints, factor: int) -> Ints:
        if factor == 1:
            return a
        low, high = self._scaled_bounds(a, factor)
        shape = np.where(a.shape == NO_SHAPE, NO_SHAPE, self._name("times", a.shape, factor))
        return self._normalised(Ints(low, high, shape, wrapped_product(a.offset, factor)))

    def _scaled_bounds(self, a: Ints, factor: int) -> tuple[Int64, Int64]:
        if abs(factor) >= LIMIT or max(largest(a.low), largest(a.high)) * abs(factor) >= LIMIT:
            return self._product_bounds(a, self._constant(factor))
        return (a.low * factor, a.high * factor) if factor > 0 else (a.high * factor, a.low * factor)

    def _product_bounds(self, a: Ints, b: Ints) -> tuple[Int64, Int64]:
        products = [self._product(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        return accumulate(np.minimum, products), accumulate(np.maximum, products)

    def _product(self, x: Int64, y: Int64) -> Int64:
        size = x.astype(np.float64) * y.astype(np.float64)
        small = np.abs(size) < float(LIMIT)
        unbounded = (np.abs(x) >= LIMIT) & (y != 0) | (np.abs(y) >= LIMIT) & (x != 0)
        small = small & ~unbounded
        exact = np.where(small, x, 0) * np.where(small, y, 0)
        return self._clipped(np.where(small, exact, np.where(size > 0, LIMIT, -LIMIT)))

    def _clipped(self, bound: Int64) -> Int64:
        over = (bound >= LIMIT) | (bound <= -LIMIT)
        if over.any():
            self.saturated = True
            return np.clip(bound, -LIMIT, LIMIT)
        return bound

    def _normalised(self, value: Ints) -> Ints:
        """Make points constants; where a bound saturates, replace the decomposition by one that no other box shares."""
        if not self._keyed:
            return bounds_alone(value.low, value.high)
        point = value.low == value.high
        shape, offset = np.where(point, NO_SHAPE, value.shape), np.where(point, value.low, value.offset)
        lost = (value.low <= -LIMIT) | (value.high >= LIMIT)
        return Ints(value.low, value.high, np.where(lost, self._box_hash, shape), offset)

    def _coordinate(self, node: Coord) -> Ints:
        position = self._add(self.integer(node.position), self._scaled(self.integer(node.offset), -1))
        value = self._floordiv(position, self.integer(node.stride))
        return value if node.extent is None else self._mod(value, self.integer(node.extent))

    def _arith(self, node: Arith) -> Ints:
        operands = [self.integer(operand) for operand in node.operands]
        match node.op:
            case "mul":
                low, high = self._product_bounds(*operands)
                return self._normalised(self._mixed("mul", low, high, *operands))
            case "floordiv":
                return self._floordiv(*operands)
            case "mod":
                return self._mod(*operands)
            case "min" | "max":
                return accumulate(lambda a, b: self._extreme(node.op, a, b), operands)
            case "abs":
                return self._absolute(operands[0])
            case _:
                return self._function(node.op, operands)

    def _floordiv(self, a: Ints, b: Ints) -> Ints:
        if not is_positive_constant(b):
            return self._general_division(a, b)
        c = b.low
        if not self._keyed:
            return bounds_alone(divided(a.low, c), divided(a.high, c))
        shape = np.where(a.shape == NO_SHAPE, NO_SHAPE, self._name("//", a.shape, a.offset % c, c))
        return self._normalised(Ints(divided(a.low, c), divided(a.high, c), shape, a.offset // c))

    def _general_division(self, a: Ints, b: Ints) -> Ints:
        """Bound quotients by their values at the corners; for a divisor that may be 0 or negative, |a| is the bound."""
        size = np.maximum(np.abs(a.low), np.abs(a.high))
        low, high = -size - 1, size
        positive = b.low > 0
        safe = np.where(positive, b.low, 1)
        safe_high = np.where(positive, b.high, 1)
        corners = [divided(x, y) for x in (a.low, a.high) for y in (safe, safe_high)]
        low = np.where(positive, accumulate(np.minimum, corners), low)
        high = np.where(positive, accumulate(np.maximum, corners), high)
        return self._mixed("//", self._clipped(low), self._clipped(high), a, b)

    def _mod(self, a: Ints, b: Ints) -> Ints:
        if not is_positive_constant(b):
            size = np.maximum(np.abs(b.low), np.abs(b.high))
            return self._mixed("%", np.where(b.low > 0, 0, -size), np.where(b.high < 0, 0, size), a, b)
        c = b.low
        bounded = (a.low > -LIMIT) & (a.high < LIMIT)
        straight = bounded & (a.low // c == a.high // c)
        low, high = np.where(straight, a.low % c, 0), np.where(straight, a.high % c, c - 1)
        if not self._keyed:
            return bounds_alone(low, high)
        wrapped = self._name("%", a.shape, a.offset % c, c)
        constant = a.shape == NO_SHAPE
        shape = np.where(straight, a.shape, np.where(constant, NO_SHAPE, wrapped))
        shifted = a.offset - a.low // c * c
        return self._normalised(
            Ints(low, high, shape, np.where(straight, shifted, np.where(constant, a.offset % c, 0)))
        )

    def _extreme(self, op: str, a: Ints, b: Ints) -> Ints:
        below, above = (a, b) if op == "min" else (b, a)
        extreme = np.minimum if op == "min" else np.maximum
        low, high = extreme(a.low, b.low), extreme(a.high, b.high)
        if not self._keyed:
            return bounds_alone(low, high)
        mixed = self._name(op, a.shape, a.offset - b.offset, b.shape)
        state = np.where(a.high <= b.low, TRUE, np.where(b.high <= a.low, FALSE, UNKNOWN))
        shape = picked(state, below.shape, above.shape, mixed)
        return Ints(low, high, shape, picked(state, below.offset, above.offset, b.offset))

    def _absolute(self, a: Ints) -> Ints:
        negative = self._scaled(a, -1)
        straddles = (a.low < 0) & (a.high > 0)
        low = np.where(straddles, 0, np.minimum(np.abs(a.low), np.abs(a.high)))
        high = np.maximum(np.abs(a.low), np.abs(a.high))
        if not self._keyed:
            return bounds_alone(low, high)
        state = np.where(a.low >= 0, TRUE, np.where(a.high <= 0, FALSE, UNKNOWN))
        mixed = self._name("abs", a.shape, a.offset)
        offset = picked(state, a.offset, negative.offset, np.zeros(1, dtype=np.int64))
        return Ints(low, high, picked(state, a.shape, negative.shape, mixed), offset)

    def _function(self, op: str, operands: list[Ints]) -> Ints:
        low, high = function_bounds(op, operands)
        return self._normalised(self._mixed(op, self._clipped(low), self._clipped(high), *operands))

    def _choice(self, node: ExactSelect) -> Ints:
        condition, then, otherwise = self.truth(node.condition), self.integer(node.then), self.integer(node.otherwise)
        low = picked(condition.state, then.low, otherwise.low, np.minimum(then.low, otherwise.low))
        high = picked(condition.state, then.high, otherwise.high, np.maximum(then.high, otherwise.high))
        if not self._keyed:
            return bounds_alone(low, high)
        mixed = self._name("if", condition.key, then.shape, then.offset - otherwise.offset, otherwise.shape)
        shape = picked(condition.state, then.shape, otherwise.shape, mixed)
        offset = picked(condition.state, then.offset, otherwise.offset, otherwise.offset)
        return Ints(low, high, shape, offset)

    def _aggregate(self, node: Reduce) -> Ints:
        low, high, inside = self._loop(node)
        body = self.integer(node.body)
        shape = self._loop_name(node, low, high, inside.key, body.shape, body.offset)
        if node.op != "sum":
            return self._normalised(Ints(body.low, body.high, shape, np.zeros(1, dtype=np.int64)))
        trips = np.maximum(self._clipped(high.high - low.low), 0)
        surely = np.where(inside.state == TRUE, np.maximum(high.low - low.high, 0), 0)
        most_trips, sure_trips = counted(trips), counted(surely)
        top = np.maximum(self._product(body.high, most_trips.high), self._product(body.high, sure_trips.high))
        bottom = np.minimum(self._product(body.low, most_trips.high), self._product(body.low, sure_trips.high))
        return self._normalised(Ints(bottom, top, shape, np.zeros(1, dtype=np.int64)))

    def _read(self, node: DataRead) -> Ints:
        indices = [self.integer(index) for index in node.indices]
        if node.data.cut is not None:
            assert not self._keyed and node.data.array.dtype == np.bool_
            return bounds_alone(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64))
        low, high = map(self._clipped, RangeTable.of(node.data).bounds([(i.low, i.high) for i in indices]))
        sizes = zip(indices, node.data.array.shape, strict=True)
        outside = [(index.low < 0) | (index.high >= size) for index, size in sizes]
        # An entry that is out of range may have any value; such pairs are evaluated one by one.
        if any(bool(lanes.any()) for lanes in outside):
            least, greatest = (0, 1) if node.data.array.dtype == np.bool_ else (-FAR, FAR)
            lanes = np.logical_or.reduce(np.broadcast_arrays(*outside))
            low, high = np.where(lanes, least, low), np.where(lanes, greatest, high)
        if not self._keyed:
            return bounds_alone(low, high)
        shape, offset = self._contents(node, indices)
        constant = low == high
        return Ints(low, high, np.where(constant, NO_SHAPE, shape), np.where(constant, low, offset))

    def _contents(self, node: DataRead, indices: list[Ints]) -> tuple[Hash, Int64]:
        """Hash what boxes read: the entries where an index moves with q or k, otherwise the box itself.

        In arrays of several axes, boxes that read the same entries in the same way are hashed by their indices.
        """
        if not node.data.array.size:
            return self._box_hash, NO_OFFSET
        if len(indices) != 1:
            return self._same_entries(node, indices), NO_OFFSET
        index, size = indices[0], len(node.data.array)
        inside = (index.low >= 0) & (index.high < size)
        walks = [(index.shape == p.shape) & (p.shape != NO_SHAPE) & inside for p in self._places.values()]
        walking = np.flatnonzero(np.broadcast_to(walks[0] | walks[1], self.size))
        if not len(walking):
            return self._box_hash, NO_OFFSET
        low, high = (np.broadcast_to(bound, self.size)[walking] for bound in (index.low, index.high))
        name, first = RangeTable.of(node.data).contents(low, high)
        shape = np.broadcast_to(self._box_hash, self.size).copy()
        shape[walking] = combine(name, np.broadcast_to(index.shape, self.size)[walking])
        offset = np.zeros(self.size, dtype=np.int64)
        offset[walking] = first
        return shape, offset

    def _same_entries(self, node: DataRead, indices: list[Ints]) -> Hash:
        sizes = zip(indices, node.data.array.shape, strict=True)
        inside = np.logical_and.reduce(
            np.broadcast_arrays(*((index.low >= 0) & (index.high < size) for index, size in sizes))
        )
        name = self._name("entries", id(node.data), *(part for i in indices for part in (i.shape, i.offset)))
        return np.where(inside, name, self._box_hash)

    # --- decompositions without structure ---

    def _mixed(self, op: str, low: Int64, high: Int64, *operands: Ints) -> Ints:
        """Bounds of a function of operands; its shape combines their shapes and offsets, and points are constants."""
        if not self._keyed:
            return bounds_alone(low, high)
        shape = self._name(op)
        for operand in operands:
            shape = self._name(shape, operand.shape, operand.offset)
        point = low == high
        return Ints(low, high, np.where(point, NO_SHAPE, shape), np.where(point, low, 0))

    def _opaque(self, op: str, low: int, high: int, name: Hash, index: Ints) -> Ints:
        ends = [self._clipped(np.array([max(-LIMIT, min(LIMIT, end))], dtype=np.int64)) for end in (low, high)]
        value = self._mixed(op, ends[0], ends[1], index)
        return Ints(value.low, value.high, self._name(value.shape, name), value.offset)
