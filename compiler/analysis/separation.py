"""Separation of relations over a grid of tokens into products over its axes.

Coordinates are the leaf variables; flattened positions are not supported. A relation becomes a list of disjoint
products, each with one relation per axis: `and` is a product already, `or` is split into its first alternative and the
rest without it, and a comparison that reads several axes is split by the values that its parts on one axis take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import (
    Bool,
    Compare,
    Const,
    Coord,
    ExactSelect,
    Index,
    Linear,
    Not,
    Position,
    Var,
    fold,
    is_truth,
)
from attnc.compiler.ir.rewrite import (
    rebuild,
    rewrite,
    substitute,
    walk,
)

MOST_PRODUCTS = 512
MOST_PAIRS = 1 << 16
"""Maximum number of pairs of coordinates of an axis for which its values are listed."""


@dataclass(frozen=True, slots=True)
class SeparatedAxis:
    """An axis of `extent` coordinates, `stride` tokens apart."""

    extent: int
    stride: int


TokenGrid = tuple[SeparatedAxis, ...]
"""The axes of a grid, the slowest first."""

Product = tuple[Index, ...]
"""A product of relations: one relation per axis, over the axis's coordinates."""


class NotSeparableError(Exception):
    """Raised where a relation reads positions besides coordinates, or has too many products."""


def grid_of(relation: Index, n: int) -> TokenGrid | None:
    """Return the grid of n tokens whose coordinates a relation reads; None where it reads none, or they fit no grid."""
    strides: dict[int, int | None] = {}
    for node in walk(relation):
        if isinstance(node, Coord):
            axis = _axis(node)
            if axis is None or strides.setdefault(axis[0], axis[1]) != axis[1]:
                return None
    return _filled(strides, n) if strides else None


def _axis(node: Coord) -> tuple[int, int | None] | None:
    """The stride and extent of a coordinate that counts from the first token; None for any other coordinate."""
    stride, extent = node.stride, node.extent
    if not isinstance(_origin(node), Position) or not isinstance(stride, Const) or not isinstance(extent, Const | None):
        return None
    return stride.value, None if extent is None else extent.value


def _origin(node: Coord) -> Index:
    """Return the expression that a coordinate divides: its position minus its offset."""
    offset = node.offset
    return node.position if isinstance(offset, Const) and offset.value == 0 else fold.sub(node.position, node.offset)


def _filled(strides: Mapping[int, int | None], n: int) -> TokenGrid | None:
    """Return all axes of the grid, including axes between them that are not read; None where they fit no grid."""
    axes: list[SeparatedAxis] = []
    below = 1
    for stride, extent in sorted(strides.items()):
        if stride % below or n % stride:
            return None
        if stride > below:
            axes.append(SeparatedAxis(stride // below, below))
        below = n if extent is None else stride * extent
        axes.append(SeparatedAxis(below // stride, stride))
    if n % below:
        return None
    if n > below:
        axes.append(SeparatedAxis(n // below, below))
    return tuple(reversed(axes))


def separate(relation: Index, leaves: CoordinateLeaves) -> list[Product]:
    """Split a relation over `leaves` into disjoint products whose union is the relation.

    Raises NotSeparableError, and EvaluationError where a part has a fault outside its guard.
    """
    products: list[Product] = []
    stack: list[tuple[Index, ...]] = [_conjuncts(relation)]
    while stack:
        conjuncts = stack.pop()
        parts = _first_split(conjuncts, leaves)
        if parts is None:
            products.append(leaves.product(conjuncts))
        else:
            stack.extend(map(_flat, reversed(parts)))
        if len(products) + len(stack) > MOST_PRODUCTS:
            raise NotSeparableError
    return [product for product in products if not any(r == fold.truth(False) for r in product)]


def separate_axes(relation: Index, grid: TokenGrid) -> list[Product]:
    """Separate a relation, and write each axis's relation over positions q and k."""
    leaves = CoordinateLeaves(relation, grid)
    return [tuple(leaves.alone(r, i) for i, r in enumerate(product)) for product in separate(relation, leaves)]


def _flat(conjuncts: Iterable[Index]) -> tuple[Index, ...]:
    return _conjuncts(fold.conjunction(*conjuncts))


def _conjuncts(relation: Index) -> tuple[Index, ...]:
    return relation.operands if isinstance(relation, Bool) and relation.op == "and" else (relation,)


class CoordinateLeaves:
    """The coordinates that a relation reads, as leaves over a grid, and the axes that each node reads."""

    def __init__(self, relation: Index, grid: TokenGrid) -> None:
        self.grid = grid
        by_stride = {axis.stride: i for i, axis in enumerate(grid)}
        self._leaf: dict[Index, tuple[str, int]] = {}
        for node in walk(relation):
            if isinstance(node, Coord):
                origin, stride_and_extent = _origin(node), _axis(node)
                assert isinstance(origin, Position)
                assert stride_and_extent is not None
                self._leaf[node] = origin.name, by_stride[stride_and_extent[0]]
        self._read: dict[Index, frozenset[int]] = {}
        self._serial = 0

    def axes(self, node: Index) -> frozenset[int]:
        """Return the axes that a node reads. Raises NotSeparableError for a position outside a coordinate."""
        axes_read = self._read.get(node)
        if axes_read is None:
            if isinstance(node, Position):
                raise NotSeparableError
            leaf = self._leaf.get(node)
            axes_read = frozenset([leaf[1]] if leaf else ())
            for child in () if leaf else node.children():
                below = self.axes(child)
                axes_read = axes_read if below <= axes_read else axes_read | below
            self._read[node] = axes_read
        return axes_read

    def coordinates(self, axis: int) -> dict[Index, str]:
        """Return the coordinate nodes of an axis, each with q or k."""
        return {node: place for node, (place, i) in self._leaf.items() if i == axis}

    def product(self, conjuncts: Sequence[Index]) -> Product:
        """Return the product of conjuncts that each read at most one axis."""
        by_axis: list[list[Index]] = [[] for _ in self.grid]
        for conjunct in conjuncts:
            by_axis[min(self.axes(conjunct), default=0)].append(conjunct)
        return tuple(fold.conjunction(*c) for c in by_axis)

    def alone(self, node: Index, axis: int) -> Index:
        """Rewrite a node that reads one axis, with its coordinates as positions q and k."""
        places: dict[Index, Index] = {
            leaf: fold.place("q" if name == "q" else "k") for leaf, name in self.coordinates(axis).items()
        }
        return rewrite(node, places.get)

    def fresh(self) -> Var:
        """Return an unused variable."""
        self._serial += 1
        return fold.var("part", self._serial)


def _first_split(conjuncts: Sequence[Index], leaves: CoordinateLeaves) -> list[tuple[Index, ...]] | None:
    """Split the first conjunct that reads several axes into disjoint lists of conjuncts; None if no conjunct does."""
    for i, conjunct in enumerate(conjuncts):
        if len(leaves.axes(conjunct)) > 1:
            before, after = tuple(conjuncts[:i]), tuple(conjuncts[i + 1 :])
            return [(*before, *part, *after) for part in _alternatives(conjunct, leaves)]
    return None


def _alternatives(node: Index, leaves: CoordinateLeaves) -> list[tuple[Index, ...]]:
    match node:
        case Bool(op="and"):
            return [node.operands]
        case Bool():
            first, rest = _grouped(node.operands, leaves)
            return [(first,), (fold.negation(first), rest)]
        case Not(operand=Bool() as inner):
            dual = fold.disjunction if inner.op == "and" else fold.conjunction
            return [(dual(*map(fold.negation, inner.operands)),)]
        case ExactSelect() if is_truth(node):
            return [(node.condition, node.then), (fold.negation(node.condition), node.otherwise)]
        case Not(operand=ExactSelect() as inner):
            return [
                (inner.condition, fold.negation(inner.then)),
                (fold.negation(inner.condition), fold.negation(inner.otherwise)),
            ]
        case Compare():
            return _by_values(node, node, leaves)
        case Not(operand=Compare() as sign):
            return _by_values(node, sign, leaves)
        case _:
            raise NotSeparableError


def _grouped(operands: Sequence[Index], leaves: CoordinateLeaves) -> tuple[Index, Index]:
    """Split alternatives into those that read the axes of the simplest alternative, and the rest."""
    key = min((leaves.axes(o) for o in operands), key=lambda axes: (len(axes), sorted(axes)))
    together = [o for o in operands if leaves.axes(o) == key]
    if len(key) > 1:
        together = together[:1]
    return fold.disjunction(*together), fold.disjunction(*(o for o in operands if o not in together))


def _by_values(node: Index, sign: Compare, leaves: CoordinateLeaves) -> list[tuple[Index, ...]]:
    """Split a comparison by the combinations of values that its parts on one axis take."""
    choices = []
    for axis in leaves.axes(sign):
        if leaves.grid[axis].extent ** 2 <= MOST_PAIRS:
            parts: dict[Var, Index] = {}
            rest = _without(node, axis, leaves, parts)
            choices.append((_values([leaves.alone(p, axis) for p in parts.values()], leaves.grid[axis]), parts, rest))
    if not choices:
        raise NotSeparableError
    values, parts, rest = min(choices, key=lambda c: len(c[0]))
    if len(values) > MOST_PRODUCTS:
        raise NotSeparableError
    result = []
    for row in values.tolist():
        constants: dict[Index, Index] = {v: fold.const(x) for v, x in zip(parts, row, strict=True)}
        conditions = [fold.equal(p, fold.const(x)) for p, x in zip(parts.values(), row, strict=True)]
        result.append((*conditions, substitute(rest, constants)))
    return result


def _without(node: Index, axis: int, leaves: CoordinateLeaves, parts: dict[Var, Index]) -> Index:
    """Replace the largest integer parts that read only this axis by variables, and record them in `parts`."""
    axes_read = leaves.axes(node)
    if axis not in axes_read:
        return node
    if axes_read == {axis} and not is_truth(node):
        return _named(node, leaves, parts)
    if isinstance(node, Linear):
        axis_terms = [(t, c) for t, c in node.terms if leaves.axes(t) == {axis}]
        others = [(_without(t, axis, leaves, parts), c) for t, c in node.terms if leaves.axes(t) != {axis}]
        terms = [fold.times(t, c) for t, c in others]
        if axis_terms:
            terms.append(_named(fold.linear(axis_terms, 0), leaves, parts))
        return fold.add(fold.const(node.constant), *terms)
    return rebuild(node, tuple(_without(child, axis, leaves, parts) for child in node.children()))


def _named(part: Index, leaves: CoordinateLeaves, parts: dict[Var, Index]) -> Var:
    existing = next((v for v, p in parts.items() if p is part), None)
    variable = existing or leaves.fresh()
    parts[variable] = part
    return variable


def _values(parts: Sequence[Index], axis: SeparatedAxis) -> NDArray[np.int64]:
    """The distinct combinations of values of integers over all pairs of coordinates of an axis, one per row."""
    span = (0, axis.extent)
    return np.unique(np.stack([exact_evaluation.integers(part, span, span).ravel() for part in parts], axis=1), axis=0)
