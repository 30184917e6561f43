"""Bricks of a grid of tokens: a tile is a box of neighbours, and live tiles are ranges along every axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from attnc.compiler.analysis.separation import NotSeparableError, SeparatedAxis, grid_of, separate_axes
from attnc.compiler.analysis.token_ranges import Side, TokenRange, find_ranges
from attnc.compiler.ir import Const, Coord, Extent, HeadIndex, Index, Lookup, Pattern, RoundToInt, fold
from attnc.compiler.ir.rewrite import rewrite, substitute, walk
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.index_text import ROWS, ExprText, IndexText, NotInKernelsError, fits_32_bits
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.planning.brick_work import BrickFinder, find_bricks
from attnc.spec.errors import EvaluationError

MOST_AXES = 3
"""Maximum number of axes: the hardware copies boxes of five dimensions, two of which are the lane and the width."""

MOST_PRODUCTS = 2
"""Maximum number of disjoint products of ranges that make up a relation."""

WORD = 31
"""Maximum number of bits in which a row marks what it sees of a brick: one bit per coordinate along each axis."""


@dataclass(frozen=True, slots=True)
class BrickGrid:
    """The axes of a grid of tokens, the slowest first, and the sides of the bricks of queries and of keys.

    `extents`, `strides`: those of the axes as the kernel text reads them, constants or sizes passed as arguments.
    """

    axes: tuple[SeparatedAxis, ...]
    q_brick: tuple[int, ...]
    k_brick: tuple[int, ...]
    extents: tuple[Index, ...]
    strides: tuple[Index, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of the whole grid."""
        return prod(axis.extent for axis in self.axes)

    @property
    def is_folded(self) -> bool:
        """Whether batch entries and heads form one dimension of the boxes, which have too many dimensions otherwise."""
        return len(self.axes) >= MOST_AXES

    def bricks(self, brick: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of bricks along every axis."""
        return tuple(-(-axis.extent // side) for axis, side in zip(self.axes, brick, strict=True))

    def __str__(self) -> str:
        q, k = ("×".join(map(str, brick)) for brick in (self.q_brick, self.k_brick))
        return f"bricks of {q} queries and {k} keys"


@dataclass(frozen=True)
class BrickRanges:
    """Loop bounds over bricks: for each product, the range of columns that a row sees along every axis.

    A row sees a column if the column's coordinate lies in the row's range along every axis. The products are disjoint.
    """

    brick: tuple[int, ...]
    products: tuple[tuple[TokenRange, ...], ...]
    row_place: Side

    is_wide: ClassVar[bool] = False
    reads_head: ClassVar[bool] = False
    has_inner_loops: ClassVar[bool] = True

    def arguments(self, sides: object) -> tuple[KernelArgument, ...]:
        """Return no arguments: the kernel computes its bounds."""
        return ()

    def start(self, lines: Lines, sides: object, texts: IndexText, moved: str) -> None:
        """Emit the lines before the loops."""
        lines.add("# Along every axis, the places that each row sees are those from `first` to `last`.")
        for p, ranges in enumerate(self.products):
            for a, token_range in enumerate(ranges):
                self._emit_ends(lines, texts, f"{p}_{a}", a, token_range)

    def _emit_ends(self, lines: Lines, texts: IndexText, name: str, a: int, token_range: TokenRange) -> None:
        axis_texts = IndexText(
            {**texts.names, fold.place(self.row_place): ExprText(f"at_{a}", ROWS)}, texts.read, texts.helpers
        )
        last_coordinate, side = f"extent_{a} - 1", self.brick[a]
        low, high = token_range.low, token_range.high
        over_rows = " + tl.zeros_like(row)"
        first = "tl.zeros_like(row)" if low is None else f"tl.maximum({_text_over_rows(axis_texts, low)}, 0)"
        last = (
            f"{last_coordinate}{over_rows}"
            if high is None
            else f"tl.minimum({_text_over_rows(axis_texts, high)}, {last_coordinate})"
        )
        lines.add(f"first_{name} = {first}", f"last_{name} = {last}")
        lines.add(f"low_{name} = tl.min(first_{name}, 0) // {side}")
        lines.add(f"high_{name} = (tl.max(last_{name}, 0) + {side}) // {side}")
        lines.add(f"full_low_{name} = (tl.max(first_{name}, 0) + {side - 1}) // {side}")
        lines.add(f"full_high_{name} = (tl.min(last_{name}, 0) + 1) // {side}")

    def loops(
        self,
        lines: Lines,
        sides: object,
        body: Callable[[str, bool], None],
        full_loop: Callable[[str, str], None],
    ) -> None:
        """Emit a loop over bricks along every axis; the last axis has a separate loop over the bricks that are full."""
        for p in range(len(self.products)):
            for a in range(len(self.brick)):
                lines.add(f"first_{a} = first_{p}_{a}", f"last_{a} = last_{p}_{a}")
            self._nest(lines, p, 0, body, full_loop)

    def _nest(
        self,
        lines: Lines,
        p: int,
        a: int,
        body: Callable[[str, bool], None],
        full_loop: Callable[[str, str], None],
    ) -> None:
        if a < len(self.brick) - 1:
            with lines.block(f"for brick_{a} in range(low_{p}_{a}, high_{p}_{a}):"):
                self._nest(lines, p, a + 1, body, full_loop)
            return
        tests = [f"(brick_{i} >= full_low_{p}_{i}) & (brick_{i} < full_high_{p}_{i})" for i in range(a)]
        lines.add(f"begin = low_{p}_{a}", f"end = tl.maximum(high_{p}_{a}, begin)")
        full = f"tl.minimum(tl.maximum(full_low_{p}_{a}, begin), end)"
        rest = f"tl.minimum(tl.maximum(full_high_{p}_{a}, full), end)"
        if tests:
            lines.add(f"whole = {' & '.join(tests)}")
            full, rest = f"tl.where(whole, {full}, end)", f"tl.where(whole, {rest}, end)"
        lines.add(f"full = {full}", f"rest = {rest}")
        with lines.loop("step", "begin", "end - (rest - full)"):
            lines.add("tile = tl.where(step < full, step, step + (rest - full))")
            body("tile", True)
        full_loop("full", "rest")

    def visible(self, lines: Lines, sides: object, texts: object) -> None:
        """Emit the mask of a partial brick: a pair is visible if the row's bits include all bits of the column."""
        offset = 0
        words = []
        for a, side in enumerate(self.brick):
            brick = f"{'tile' if a == len(self.brick) - 1 else f'brick_{a}'} * {side}"
            lines.add(
                f"low = tl.maximum(first_{a} - {brick}, 0)",
                f"high = tl.minimum(last_{a} - {brick}, {side - 1})",
                f"seen_{a} = tl.where(low <= high, (2 << tl.maximum(high, 0)) - (1 << tl.minimum(low, {side})), 0)",
            )
            words.append(f"(seen_{a} << {offset})" if offset else f"seen_{a}")
            offset += side
        lines.add(f"visible = (~({' | '.join(words)})[:, None] & column_bits[None, :]) == 0")


def _text_over_rows(texts: IndexText, end: Index) -> str:
    text = texts.of(end)
    return text.at(5) if text.axes else f"{text.at(5)} + tl.zeros_like(row)"


@dataclass(frozen=True)
class Bricked:
    """A relation in bricks, walked by rows of queries and by rows of keys."""

    grid: BrickGrid
    by_query: BrickRanges
    by_key: BrickRanges


Tiles = tuple[int, int]
_Shape = tuple[tuple[int, ...], tuple[int, ...]]

MENU = 2
"""Number of brick shapes that grids with open extents choose from, so that grids of many sizes share kernels."""

USUAL = 128
"""Extents up to this size choose from the same brick shapes."""


def find_bricked(pattern: Pattern, relation: Index, wanted: Sequence[Tiles]) -> list[Bricked] | None:
    """Return the relation in bricks for each wanted tile of (queries, keys); None if bricks do not fit.

    Brick shapes are chosen to leave few bricks live. Every query and every key must be a token of the grid, and the
    relation must be known before a call: it may not read selections, other inputs or rounded numbers, which are tables
    of a call. Extents of the pattern are left open if possible, and all extents choose from a few brick shapes, so that
    grids of other sizes share the kernels.
    """
    if any(isinstance(node, Lookup | RoundToInt) for node in walk(relation)):
        return None
    tokens = _tokens(pattern)
    axes = None if tokens is None else grid_of(relation, tokens)
    finder = None if tokens is None else _finder(relation, tokens)
    if tokens is None or axes is None or finder is None:
        return None
    extents = tuple(fold.const(axis.extent) for axis in axes)
    strides = tuple(fold.const(axis.stride) for axis in axes)
    opened = _open_extents(pattern, relation, axes)
    ranges = None if opened is None else find_separable(opened.relation, tokens)
    if opened is not None and ranges is not None:
        extents, strides = opened.extents, opened.strides
    else:
        opened, ranges = None, find_separable(relation, tokens)
    if ranges is None:
        return None
    by_query, by_key = ranges
    relations = []
    for tiles in wanted:
        shape = _shape(finder, None if opened is None else opened.usual, tiles, len(axes))
        if shape is None:
            return None
        grid = BrickGrid(axes, *shape, extents, strides)
        q_brick, k_brick = shape
        relations.append(Bricked(grid, BrickRanges(k_brick, by_query, "q"), BrickRanges(q_brick, by_key, "k")))
    return relations


def _shape(finder: BrickFinder, usual: BrickFinder | None, tiles: Tiles, axes: int) -> _Shape | None:
    """Return the sides of query and key bricks: the best for this grid of the shapes that suit usual extents."""
    menu: list[_Shape] = []
    for shape in _fitting(usual or finder, tiles, axes) or _fitting(finder, tiles, axes):
        if len(menu) < MENU and all(shape[0] != other[0] for other in menu):
            menu.append(shape)
    return min(menu, key=lambda shape: finder.live(*shape), default=None)


def _fitting(finder: BrickFinder, tiles: Tiles, axes: int) -> list[_Shape]:
    """Return the brick shapes that kernels can have, the fewest live bricks first."""
    try:
        shapes = finder.best(*tiles)
    except EvaluationError:
        return []
    fitting = [(q, k) for q, k in shapes if len(q) == axes and sum(q) <= WORD and sum(k) <= WORD]
    return [(q, k) for q, k in fitting if (prod(q), prod(k)) == tiles]


@dataclass(frozen=True, slots=True)
class _Opened:
    """A relation whose extents are left open, except inside coordinates, where they are constants.

    `usual`: the brick search for extents of a usual size.
    """

    relation: Index
    extents: tuple[Index, ...]
    strides: tuple[Index, ...]
    usual: BrickFinder | None


def _open_extents(pattern: Pattern, relation: Index, axes: tuple[SeparatedAxis, ...]) -> _Opened | None:
    """Return the relation with its extents left open; None if they cannot be."""
    general = pattern.general
    opened = None if general is None else general.known.get(relation)
    if general is None or opened is None:
        return None
    strides = [fold.const(1)]
    for extent in reversed(general.extents[1:]):
        strides.insert(0, fold.mul(extent, strides[0]))
    numbers = general.numbers
    if [(_number(e, numbers), _number(s, numbers)) for e, s in zip(general.extents, strides, strict=True)] != [
        (axis.extent, axis.stride) for axis in axes
    ]:
        return None

    def bind_coordinate(node: Index) -> Index | None:
        if not isinstance(node, Coord):
            return None
        extent = None if node.extent is None else substitute(node.extent, numbers)
        return fold.coord(
            node.position, substitute(node.offset, numbers), substitute(node.stride, numbers), extent, node.name
        )

    usual = {fold.extent(name): fold.const(_usual(value)) for name, value in general.sizes.items()}
    count = prod(_number(extent, usual) or 0 for extent in general.extents)
    finder = _finder(substitute(opened, usual), count)
    return _Opened(checked(rewrite(opened, bind_coordinate)), general.extents, tuple(strides), finder)


def _usual(extent: int) -> int:
    """Return the extent for which bricks are chosen: the next power of two, at least USUAL."""
    return max(USUAL, 1 << (extent - 1).bit_length())


def _number(size: Index, numbers: Mapping[Index, Index]) -> int | None:
    """Return the value of a size for known numbers; None if it is not a constant then."""
    folded = substitute(size, numbers)
    return folded.value if isinstance(folded, Const) else None


def _finder(relation: Index, tokens: int) -> BrickFinder | None:
    """Return the search for bricks; None if the relation reads what only a call knows, or its evaluation fails."""
    if any(isinstance(node, Extent | HeadIndex | Lookup) for node in walk(relation)):
        return None
    try:
        return find_bricks(relation, tokens, tokens, _never)  # type: ignore[arg-type]
    except EvaluationError:
        return None


_Products = tuple[tuple[TokenRange, ...], ...]


def find_separable(relation: Index, tokens: int) -> tuple[_Products, _Products] | None:
    """Return a relation's ranges along its axes, of keys by query and of queries by key; None if not separable."""
    axes = grid_of(relation, tokens)
    if axes is None or not 2 <= len(axes) <= MOST_AXES:
        return None
    try:
        products = separate_axes(relation, axes)
    except (NotSeparableError, EvaluationError):
        return None
    if not 1 <= len(products) <= MOST_PRODUCTS:
        return None
    token_ranges: list[list[tuple[TokenRange, ...]]] = [[], []]
    for product in products:
        for side, parts in zip(("k", "q"), token_ranges, strict=True):
            ranges = [find_ranges(condition, side) for condition in product]  # type: ignore[arg-type]
            if any(axis_ranges is None or len(axis_ranges) != 1 for axis_ranges in ranges):
                return None
            product_ranges = [token_range for axis_ranges in ranges for token_range in axis_ranges or ()]
            ends = [
                end for token_range in product_ranges for end in (token_range.low, token_range.high) if end is not None
            ]
            if not all(map(fits_32_bits, ends)):
                return None
            parts.append(tuple(product_ranges))
    return tuple(token_ranges[0]), tuple(token_ranges[1])


def _tokens(pattern: Pattern) -> int | None:
    """Return the number of tokens of a pattern with one segment of fixed extents; None for any other pattern."""
    if len(pattern.segments) != 1:
        return None
    extents = [extent for _, extent in pattern.segments[0].axes]
    if not all(isinstance(extent, Const) for extent in extents):
        return None
    return prod(extent.value for extent in extents if isinstance(extent, Const))


def _never(*_: object) -> object:
    raise NotInKernelsError("parts of a relation without a grid")
