"""The tokens of a unit as ranges, so that an aggregate over a unit becomes an aggregate over ranges.

A stretch is `(x + shift) // size`: unit n holds the `size` tokens from `n * size - shift`. A tile divides coordinates:
its tokens are a product of ranges, one for each axis. Both hold only tokens that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold

Loop = tuple[ir.Var, Index, Index]


@dataclass(frozen=True, slots=True)
class Token:
    """A token inside a unit: the loops that reach it, its position, the condition that it exists, known coordinates."""

    loops: tuple[Loop, ...]
    position: Index
    condition: Index
    coordinates: tuple[Index, ...] | None


def row_major(counts: Sequence[Index], numbers: Sequence[Index]) -> Index:
    """The index of `numbers`, each below its count, among all numbers; the last number varies fastest."""
    flat = fold.const(0)
    for count, number in zip(counts, numbers, strict=True):
        flat = fold.add(fold.mul(flat, count), number)
    return flat


def unflattened(index: Index, counts: Sequence[Index]) -> tuple[Index, ...]:
    """The numbers whose index is `index`, as `row_major` counts it."""
    numbers = [fold.floordiv(index, fold.product(tuple(counts[i + 1 :]))) for i in range(len(counts))]
    return tuple(n if i == 0 else fold.mod(n, counts[i]) for i, n in enumerate(numbers))


@dataclass(frozen=True, slots=True)
class PositionRange:
    """The `count` positions from `first` that one side of a relation has; `all_tokens`: they are all tokens."""

    first: Index
    count: Index
    all_tokens: bool

    def holds(self, position: Index) -> Index:
        """The condition that a position is in the range."""
        if self.all_tokens:
            return fold.truth(True)
        beyond = fold.add(self.first, self.count)
        return fold.conjunction(fold.less_equal(self.first, position), fold.less(position, beyond))


@dataclass(frozen=True, slots=True)
class LinearUnit:
    """Units that are stretches: unit n holds the `size` positions from `n * size - shift`."""

    size: int
    shift: int
    hidden = 0

    def token(self, numbers: tuple[Index, ...], rows: PositionRange, variable: Callable[[], ir.Var]) -> Token:
        """Return a token of a unit, by a new variable."""
        start = fold.add(fold.times(numbers[0], self.size), fold.const(-self.shift))
        first_offset = fold.sub(rows.first, start)
        low = fold.maximum(fold.const(0), first_offset)
        high = fold.minimum(fold.const(self.size), fold.add(first_offset, rows.count))
        inside = variable()
        return Token(((inside, low, high),), fold.add(start, inside), fold.truth(True), None)


@dataclass(frozen=True, slots=True)
class GridUnit:
    """A unit that is a tile of a grid: the extent of each axis, and the tile's side along it.

    A unit's numbers are listed for the axes in this `order`. The last `hidden` axes are not divided by the pattern, and
    their numbers are always 0. `real`: the extents of the tokens where the grid is padded with keys that are zeros.
    """

    extents: tuple[Index, ...]
    sizes: tuple[Index, ...]
    order: tuple[int, ...]
    hidden: int
    real: tuple[Index, ...] | None = None

    def token(self, numbers: tuple[Index, ...], rows: PositionRange, variable: Callable[[], ir.Var]) -> Token:
        """Return a token of a unit, by new variables. The last unit of an axis may have fewer coordinates."""
        number_of_axis = dict(zip(self.order, numbers, strict=True))
        loops: list[Loop] = []
        coordinates: list[Index] = []
        for axis, (extent, size) in enumerate(zip(self.extents, self.sizes, strict=True)):
            inside, start = variable(), fold.mul(number_of_axis[axis], size)
            loops.append((inside, fold.const(0), fold.minimum(size, fold.sub(extent, start))))
            coordinates.append(fold.add(start, inside))
        position = row_major(self.real or self.extents, coordinates)
        if self.real is None:
            return Token(tuple(loops), position, rows.holds(position), tuple(coordinates))
        inside_all = fold.conjunction(*(fold.less(x, n) for x, n in zip(coordinates, self.real, strict=True)))
        position = fold.choice(inside_all, position, fold.const(ir.OUTSIDE))
        return Token(tuple(loops), position, fold.truth(True), tuple(coordinates))


@dataclass(frozen=True, slots=True)
class Numbered:
    """Units whose numbers an input holds, below `count`.

    `order` lists the tokens unit by unit, and `starts` says where each unit starts in `order`. Both are read at
    `indices`, the batch entry and head of the call.
    """

    count: int
    order: ir.Tensor
    starts: ir.Tensor
    indices: tuple[Index, ...]
    hidden = 0

    def token(self, numbers: tuple[Index, ...], rows: PositionRange, variable: Callable[[], ir.Var]) -> Token:
        """Return a token of a unit, by a new variable."""
        inside = variable()
        low, high = self.ends(numbers[0])
        position = fold.add(rows.first, fold.lookup(self.order, (*self.indices, inside)))
        return Token(((inside, low, high),), position, fold.truth(True), None)

    def ends(self, number: Index) -> tuple[Index, Index]:
        """Return where a unit begins and ends in `order`."""
        low = fold.lookup(self.starts, (*self.indices, number))
        return low, fold.lookup(self.starts, (*self.indices, fold.add(number, fold.const(1))))


Form = LinearUnit | GridUnit | Numbered


@dataclass(frozen=True, slots=True)
class UnitMembers:
    """The tokens of a unit by its numbers. Axes that the pattern does not divide have number 0."""

    form: Form
    rows: PositionRange

    def token(self, written: tuple[Index, ...], variable: Callable[[], ir.Var]) -> Token:
        """Return a token of the unit with the numbers `written`, by new variables."""
        numbers = (*written, *[fold.const(0)] * self.form.hidden)
        return self.form.token(numbers, self.rows, variable)

    def counts(self) -> tuple[Index, ...]:
        """The number of values, from 0, that each number in the pattern's text takes."""
        form = self.form
        if isinstance(form, LinearUnit):
            end = fold.add(self.rows.first, self.rows.count, fold.const(form.shift + form.size - 1))
            return (fold.floordiv(end, fold.const(form.size)),)
        if isinstance(form, Numbered):
            return (fold.const(form.count),)
        written = form.order[: len(form.order) - form.hidden]
        return tuple(_ceiling(form.extents[axis], form.sizes[axis]) for axis in written)


def _ceiling(extent: Index, size: Index) -> Index:
    return fold.floordiv(fold.add(extent, size, fold.const(-1)), size)


def form_of(
    values: tuple[Index, ...], place: Index, segment: ir.Segment | None, padded: tuple[Index, ...] | None = None
) -> Form | None:
    """The form of a unit with these values, None where it is not supported; `segment`: the pattern's only segment.

    `padded`: the extents of the grid of keys where it is padded beyond the tokens.
    """
    stretch = _stretch(values[0], place) if len(values) == 1 else None
    if segment is None or (stretch is not None and padded is None):
        return stretch
    axes = [_axis(value, place, segment) for value in values]
    sizes = dict(axis for axis in axes if axis is not None)
    if len(sizes) < len(values):
        return None
    hidden = tuple(axis for axis in range(len(segment.axes)) if axis not in sizes)
    tokens = tuple(extent for _, extent in segment.axes)
    extents = tokens if padded is None else padded
    sides = tuple(fold.const(sizes[axis]) if axis in sizes else extent for axis, extent in enumerate(extents))
    return GridUnit(extents, sides, (*sizes, *hidden), len(hidden), None if padded is None else tokens)


def numbers_of(value: Index, place: Index) -> tuple[ir.Lookup, int] | None:
    """The read and the bound of `input[place] % bound`; None for any other value."""
    if not (isinstance(value, ir.Arith) and value.op == "mod"):
        return None
    lookup, bound = value.operands
    if not (isinstance(lookup, ir.Lookup) and isinstance(bound, ir.Const) and bound.value > 0):
        return None
    return (lookup, bound.value) if lookup.indices[-1:] == (place,) and lookup.tensor.kind == "int" else None


def _stretch(value: Index, place: Index) -> LinearUnit | None:
    """The stretch `(place + shift) // size`; folding has reduced the shift below `size`. 0: one unit of all tokens."""
    if isinstance(value, ir.Const) and value.value == 0:
        return LinearUnit(1 << 40, 0)
    terms, units = fold.parts(value)
    if len(terms) != 1 or terms[0][1] != 1:
        return None
    inner, size = _divided(terms[0][0])
    inside, shift = fold.parts(inner)
    return LinearUnit(size, shift + units * size) if inside == ((place, 1),) else None


def _axis(value: Index, place: Index, segment: ir.Segment) -> tuple[int, int] | None:
    """The axis that a value divides, and the divisor; None where it divides no axis of the segment."""
    inner, size = _divided(value)
    if not isinstance(inner, ir.Coord) or inner.position is not place:
        return None
    return next(i for i, (name, _) in enumerate(segment.axes) if name == inner.name), size


def _divided(value: Index) -> tuple[Index, int]:
    if isinstance(value, ir.Arith) and value.op == "floordiv":
        inner, divisor = value.operands
        if isinstance(divisor, ir.Const) and divisor.value > 0:
            return inner, divisor.value
    return value, 1
