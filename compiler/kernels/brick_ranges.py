"""Bricks of a grid of tokens: a tile is a box of neighbours, and live tiles are ranges along every axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from attnc.compiler import fold
from attnc.compiler.analysis.separation import NotSeparableError, SeparatedAxis, grid_of, separate_axes
from attnc.compiler.ir import Const, Coord, Extent, HeadIndex, Index, Lookup, Pattern, RoundToInt
from attnc.compiler.kernels.index_text import ROWS, ExprText, IndexText, NotInKernelsError, fits_32_bits
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.ranges import Side, TokenRange, find_ranges
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.rewrite import rewrite, substitute, walk
from attnc.compiler.simulation.brick_work import BrickFinder, find_bricks
from attnc.compiler.verify_ir import checked
from attnc.spec.errors import EvaluationError

MOST_AXES = 3
"""The hardware copies boxes of five sides, of which one is the width of a head and one the lane."""

MOST_PRODUCTS = 2

WORD = 31
"""Bits in which a row says which places of a brick it sees: one for each place along each axis."""


@dataclass(frozen=True, slots=True)
class BrickGrid:
    """The axes of a grid of tokens, the slowest first, and the sides of bricks of queries and of keys.

    `extents`, `strides`: as a text has them, numbers or sizes that it is told.
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
        """Whether batch entries and heads are one side of the boxes that are copied, so that there are not too many."""
        return len(self.axes) >= MOST_AXES

    def bricks(self, brick: tuple[int, ...]) -> tuple[int, ...]:
        """How many bricks lie along every axis."""
        return tuple(-(-axis.extent // side) for axis, side in zip(self.axes, brick, strict=True))

    def __str__(self) -> str:
        q, k = ("×".join(map(str, brick)) for brick in (self.q_brick, self.k_brick))
        return f"bricks of {q} queries and {k} keys"


@dataclass(frozen=True)
class BrickRanges:
    """Ranges of columns by row along every axis, for one product after another, which share no pair.

    Along every axis a row sees what lies in its range of the product.
    """

    brick: tuple[int, ...]
    products: tuple[tuple[TokenRange, ...], ...]
    row_place: Side

    is_wide: ClassVar[bool] = False
    reads_head: ClassVar[bool] = False
    has_inner_loops: ClassVar[bool] = True

    def arguments(self, sides: object) -> tuple[KernelArgument, ...]:
        """None of its own."""
        return ()

    def start(self, lines: Lines, sides: object, texts: IndexText, moved: str) -> None:
        """Emit the lines before the loops."""
        lines.add("# Along every axis, the places that each row sees are those from `first` to `last`.")
        for p, ranges in enumerate(self.products):
            for a, one in enumerate(ranges):
                self._ends(lines, texts, f"{p}_{a}", a, one)

    def _ends(self, lines: Lines, texts: IndexText, name: str, a: int, one: TokenRange) -> None:
        own = IndexText(
            {**texts.names, fold.place(self.row_place): ExprText(f"at_{a}", ROWS)}, texts.read, texts.helpers
        )
        most, side = f"extent_{a} - 1", self.brick[a]
        low, high = one.low, one.high
        flat = " + tl.zeros_like(row)"
        first = "tl.zeros_like(row)" if low is None else f"tl.maximum({_of(own, low)}, 0)"
        last = f"{most}{flat}" if high is None else f"tl.minimum({_of(own, high)}, {most})"
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
        """A loop over bricks along every axis; along the last one full bricks apart, where the others are full."""
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
        """The mask of a partial brick: what a row may not see, in bits, and the bits of a column."""
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


def _of(texts: IndexText, end: Index) -> str:
    found = texts.of(end)
    return found.at(5) if found.axes else f"{found.at(5)} + tl.zeros_like(row)"


@dataclass(frozen=True)
class Bricked:
    """A relation in bricks, by rows of queries and by rows of keys."""

    grid: BrickGrid
    by_query: BrickRanges
    by_key: BrickRanges


Tiles = tuple[int, int]
_Shape = tuple[tuple[int, ...], tuple[int, ...]]

MENU = 2
"""Grids of all sizes that are left open share so many shapes of bricks."""

USUAL = 128
"""Extents up to this have the same shapes to choose from."""


def find_bricked(pattern: Pattern, relation: Index, wanted: Sequence[Tiles]) -> list[Bricked] | None:
    """The relation in bricks of so many queries and keys, which leave few live, each; None where it has none.

    Every query and every key must be a token of the grid, and the relation told before a call: what is chosen, or what
    other inputs hold, makes no bricks, nor do rounded numbers, which are tables of a call. Where the pattern's
    extents can be left open they are, and the bricks are few for all extents, so that grids of other sizes have the
    same kernels.
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
    opened = _opened(pattern, relation, axes)
    found = None if opened is None else find_separable(opened.relation, tokens)
    if opened is not None and found is not None:
        extents, strides = opened.extents, opened.strides
    else:
        opened, found = None, find_separable(relation, tokens)
    if found is None:
        return None
    by_query, by_key = found
    bricked = []
    for tiles in wanted:
        shape = _shape(finder, None if opened is None else opened.usual, tiles, len(axes))
        if shape is None:
            return None
        grid = BrickGrid(axes, *shape, extents, strides)
        q_brick, k_brick = shape
        bricked.append(Bricked(grid, BrickRanges(k_brick, by_query, "q"), BrickRanges(q_brick, by_key, "k")))
    return bricked


def _shape(finder: BrickFinder, usual: BrickFinder | None, tiles: Tiles, axes: int) -> _Shape | None:
    """The sides of the bricks of queries and keys: of those that are good for usual extents the best for these."""
    menu: list[_Shape] = []
    for shape in _fitting(usual or finder, tiles, axes) or _fitting(finder, tiles, axes):
        if len(menu) < MENU and all(shape[0] != other[0] for other in menu):
            menu.append(shape)
    return min(menu, key=lambda shape: finder.live(*shape), default=None)


def _fitting(finder: BrickFinder, tiles: Tiles, axes: int) -> list[_Shape]:
    """Shapes that a kernel can have, those that leave the fewest bricks live first."""
    try:
        shapes = finder.best(*tiles)
    except EvaluationError:
        return []
    fitting = [(q, k) for q, k in shapes if len(q) == axes and sum(q) <= WORD and sum(k) <= WORD]
    return [(q, k) for q, k in fitting if (prod(q), prod(k)) == tiles]


@dataclass(frozen=True, slots=True)
class _Opened:
    """A relation whose extents are left open, but for those that its coordinates are told apart by.

    `usual`: the relation for extents of a usual size.
    """

    relation: Index
    extents: tuple[Index, ...]
    strides: tuple[Index, ...]
    usual: BrickFinder | None


def _opened(pattern: Pattern, relation: Index, axes: tuple[SeparatedAxis, ...]) -> _Opened | None:
    """The relation with its extents left open, where they can be."""
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

    def told(node: Index) -> Index | None:
        if not isinstance(node, Coord):
            return None
        extent = None if node.extent is None else substitute(node.extent, numbers)
        return fold.coord(
            node.position, substitute(node.offset, numbers), substitute(node.stride, numbers), extent, node.name
        )

    usual = {fold.extent(name): fold.const(_usual(value)) for name, value in general.sizes.items()}
    count = prod(_number(extent, usual) or 0 for extent in general.extents)
    finder = _finder(substitute(opened, usual), count)
    return _Opened(checked(rewrite(opened, told)), general.extents, tuple(strides), finder)


def _usual(extent: int) -> int:
    """The extent for which bricks are chosen: the next power of two."""
    return max(USUAL, 1 << (extent - 1).bit_length())


def _number(size: Index, numbers: Mapping[Index, Index]) -> int | None:
    found = substitute(size, numbers)
    return found.value if isinstance(found, Const) else None


def _finder(relation: Index, tokens: int) -> BrickFinder | None:
    """The search for bricks; None where the relation reads what only a call knows, or faults."""
    if any(isinstance(node, Extent | HeadIndex | Lookup) for node in walk(relation)):
        return None
    try:
        return find_bricks(relation, tokens, tokens, _never)  # type: ignore[arg-type]
    except EvaluationError:
        return None


_Products = tuple[tuple[TokenRange, ...], ...]


def find_separable(relation: Index, tokens: int) -> tuple[_Products, _Products] | None:
    """The ranges of a relation along its axes, of keys by query and of queries by key; None for none."""
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
            ranges = [find_ranges(one, side) for one in product]  # type: ignore[arg-type]
            if any(one is None or len(one) != 1 for one in ranges):
                return None
            ends = [end for one in ranges for r in one or () for end in (r.low, r.high) if end is not None]
            if not all(map(fits_32_bits, ends)):
                return None
            parts.append(tuple(one[0] for one in ranges if one))
    return tuple(token_ranges[0]), tuple(token_ranges[1])


def _tokens(pattern: Pattern) -> int | None:
    """The tokens of a pattern whose only segment has fixed extents."""
    if len(pattern.segments) != 1:
        return None
    extents = [extent for _, extent in pattern.segments[0].axes]
    if not all(isinstance(extent, Const) for extent in extents):
        return None
    return prod(extent.value for extent in extents if isinstance(extent, Const))


def _never(*_: object) -> object:
    raise NotInKernelsError("parts of a relation without a grid")
