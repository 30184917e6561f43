"""How a program finds its live tiles: loop bounds that it computes, or lists that a plan has written.

A program has a tile of its own, of rows (queries, or keys where gradients of keys are made), and walks tiles of
columns. Full tiles are walked without a mask, partial ones with one, others not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from attnc.compiler.ir import Arith, Const, HeadIndex, Index, Truth
from attnc.compiler.kernels.brick_ranges import BrickRanges
from attnc.compiler.kernels.index_text import ROWS, ExprText, IndexText, fits_32_bits
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.ranges import TokenRange, ends
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.rewrite import walk

SHORT = 256
"""Tokens of a range whose tiles are not worth a loop without a mask."""

Body = Callable[[str, bool], None]
"""Writes what is done with a tile: (its number, whether it is partial)."""

FullLoop = Callable[[str, str], None]
"""Writes the loop over full tiles: (the first, one past the last)."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Names of a program's sides. `rows`, `columns`: how many there are; `row_tile`, `column_tile`: of a tile."""

    row: str
    rows: str
    row_tile: int
    column: str
    columns: str
    column_tile: int


@dataclass(frozen=True)
class RangedWalk:
    """Ranges of columns by row, whose ends are formulas (`ranges`): bounds are computed in the kernel.

    `windows`: each row has a window of its own, outside of which it sees nothing (documents).
    """

    ranges: tuple[TokenRange, ...]
    windows: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether the ends need numbers of 64 bits."""
        return not all(map(fits_32_bits, _told(self.ranges)))

    @property
    def has_inner_loops(self) -> bool:
        """Whether loops over tiles stand in others."""
        return len(self.ranges) > 1 and not self._begins_short

    @property
    def reads_head(self) -> bool:
        """Whether heads that share keys see different things."""
        return any(isinstance(n, HeadIndex) and n.name == "head" for end in _told(self.ranges) for n in walk(end))

    def arguments(self, sides: Sides) -> tuple[KernelArgument, ...]:
        """None of its own."""
        return ()

    def start(self, lines: Lines, sides: Sides, texts: IndexText, moved: str) -> None:
        """Emit the lines before the loops; `moved` is the offset of a position from its column's number."""
        lines.add(f"# The {sides.columns} that each {sides.row} sees are those from `first` to `last`.")
        for i, one in enumerate(self.ranges):
            self._ends(lines, sides, texts, i, one, moved)
        for i in range(len(self.ranges)):
            self._tiles(lines, sides, i)
        if not self._is_sorted:
            _sort(lines, len(self.ranges))

    def _ends(self, lines: Lines, sides: Sides, texts: IndexText, i: int, one: TokenRange, moved: str) -> None:
        first = "window_first" if self.windows else "0"
        last = "window_last" if self.windows else f"{sides.columns} - 1"
        if self._has_first(i):
            end, plain = one.low, f"first_{i} = {first}"
            lines.add(plain if end is None else f"first_{i} = tl.maximum({_shifted(texts.of(end), moved)}, {first})")
        if self._has_last(i):
            end, plain = one.high, f"last_{i} = {last}"
            lines.add(plain if end is None else f"last_{i} = tl.minimum({_shifted(texts.of(end), moved)}, {last})")
        if self.is_wide:
            names = [n for n, has in ((f"first_{i}", self._has_first(i)), (f"last_{i}", self._has_last(i))) if has]
            most = f"{1 << 30}"
            lines.add(*(f"{name} = tl.minimum(tl.maximum({name}, -{most}), {most}).to(tl.int32)" for name in names))

    def _has_first(self, i: int) -> bool:
        return self.windows or self.ranges[i].low is not None

    def _has_last(self, i: int) -> bool:
        return self.windows or self.ranges[i].high is not None

    def _tiles(self, lines: Lines, sides: Sides, i: int) -> None:
        size = sides.column_tile
        if self._has_first(i):
            lines.add(f"low_{i} = {_least(f'first_{i}')} // {size}")
            lines.add(f"full_low_{i} = ({_most(f'first_{i}')} + {size - 1}) // {size}")
        if self._has_last(i):
            lines.add(f"high_{i} = ({_most(f'last_{i}')} + {size}) // {size}")
            lines.add(f"full_high_{i} = ({_least(f'last_{i}')} + 1) // {size}")
        else:
            lines.add(f"high_{i} = ({sides.columns} + {size - 1}) // {size}")
            lines.add(f"full_high_{i} = {sides.columns} // {size}")
        if not self._has_first(i) and len(self.ranges) > 1:
            lines.add(f"low_{i} = 0", f"full_low_{i} = 0")

    @property
    def _begins_short(self) -> bool:
        """Whether there are two ranges, and the first holds few of the first tokens."""
        if not (self._is_sorted and len(self.ranges) == 2 and self._has_last(0)):
            return False
        end = self.ranges[0].high
        operands = end.operands if isinstance(end, Arith) and end.op == "min" else (end,)
        return any(isinstance(one, Const) and one.value < SHORT for one in operands)

    @property
    def _is_sorted(self) -> bool:
        """Whether the ranges are known to begin one after another."""
        return len(self.ranges) == 1 or (len(self.ranges) == 2 and not self._has_first(0))

    def loops(self, lines: Lines, sides: Sides, body: Body, full_loop: FullLoop) -> None:
        """The loops over partial tiles by `body`, and over full ones by `full_loop`."""
        if self._begins_short:
            lines.add("# The first range is short: all of its tiles are walked with a mask.")
            lines.add("short = tl.maximum(high_0, 0)", "begin = tl.maximum(low_1, short)")
            lines.add("end = tl.maximum(high_1, begin)")
            lines.add("full = tl.minimum(tl.maximum(full_low_1, begin), end)")
            lines.add("rest = tl.minimum(tl.maximum(full_high_1, full), end)")
            with lines.loop("step", "0", "short + (end - begin) - (rest - full)"):
                lines.add("tile = tl.where(step < short, step, step - short + begin)")
                lines.add("tile = tl.where((step < short) | (tile < full), tile, tile + (rest - full))")
                body("tile", True)
            full_loop("full", "rest")
            return
        if len(self.ranges) > 1:
            lines.add("end = 0")
            with lines.block(f"for which in range({len(self.ranges)}):"):
                names = [_nth(name, len(self.ranges)) for name in ("low", "high", "full_low", "full_high")]
                lines.add(f"begin = tl.maximum({names[0]}, end)", f"end = tl.maximum({names[1]}, begin)")
                lines.add(f"full = tl.minimum(tl.maximum({names[2]}, begin), end)")
                lines.add(f"rest = tl.minimum(tl.maximum({names[3]}, full), end)")
                _both_sides(lines, body, full_loop)
            return
        if self._has_first(0):
            lines.add("begin = low_0", "end = tl.maximum(high_0, begin)")
            lines.add("full = tl.minimum(tl.maximum(full_low_0, begin), end)")
            lines.add("rest = tl.minimum(tl.maximum(full_high_0, full), end)")
            _both_sides(lines, body, full_loop)
            return
        lines.add("end = tl.maximum(high_0, 0)" if self._has_last(0) else "end = high_0")
        lines.add("rest = tl.minimum(tl.maximum(full_high_0, 0), end)" if self._has_last(0) else "rest = full_high_0")
        with lines.loop("tile", "rest", "end"):
            body("tile", True)
        full_loop("0", "rest")

    def live(self) -> str:
        """Whether a tile may hold something."""
        tests = []
        for i in range(len(self.ranges)):
            low = f"(tile >= low_{i}) & " if self._has_first(i) or len(self.ranges) > 1 else ""
            tests.append(f"({low}(tile < high_{i}))")
        return " | ".join(tests)

    def visible(self, lines: Lines, sides: Sides, texts: IndexText) -> None:
        """The mask of a partial tile."""
        for i in range(len(self.ranges)):
            tests = []
            if self._has_first(i):
                tests.append(f"(column[None, :] >= (first_{i} - tile * {sides.column_tile})[:, None])")
            if self._has_last(i):
                tests.append(f"(column[None, :] <= (last_{i} - tile * {sides.column_tile})[:, None])")
            else:
                tests.append(f"({sides.column}[None, :] < {sides.columns})")
            lines.add(f"visible = {'visible | ' if i else ''}{_grouped(' & '.join(tests), len(tests) > 1 and i > 0)}")


def _grouped(text: str, is_needed: bool) -> str:
    return f"({text})" if is_needed else text


def _nth(name: str, count: int) -> str:
    """The number of the range whose turn it is."""
    text = f"{name}_{count - 1}"
    for i in reversed(range(count - 1)):
        text = f"tl.where(which == {i}, {name}_{i}, {text})"
    return text


def _both_sides(lines: Lines, body: Body, full_loop: FullLoop) -> None:
    with lines.loop("step", "begin", "end - (rest - full)"):
        lines.add("tile = tl.where(step < full, step, step + (rest - full))")
        body("tile", True)
    full_loop("full", "rest")


def _told(ranges: Sequence[TokenRange]) -> list[Index]:
    conditions = [one.condition for one in ranges if not isinstance(one.condition, Truth)]
    return [*ends(ranges), *conditions]


def _shifted(text: ExprText, moved: str) -> str:
    """An end as a number for every row."""
    return f"{text.at(5)}{moved}{'' if text.axes else ' + tl.zeros_like(row)'}"


def _least(text: str) -> str:
    return f"tl.min({text}, 0)"


def _most(text: str) -> str:
    return f"tl.max({text}, 0)"


def _sort(lines: Lines, count: int) -> None:
    """Ranges in the order in which they begin."""
    for last in range(count - 1, 0, -1):
        for i in range(last):
            lines.add(f"swap = low_{i + 1} < low_{i}")
            for name in ("low", "full_low", "full_high", "high"):
                a, b = f"{name}_{i}", f"{name}_{i + 1}"
                lines.add(f"lower, upper = tl.where(swap, {b}, {a}), tl.where(swap, {a}, {b})")
                lines.add(f"{a}, {b} = lower, upper")


WORD = 32
"""Bits of a mask in one number."""


@dataclass(frozen=True)
class ListedWalk:
    """Tiles from lists by row: full ones one by one, or as runs of adjacent ones; partial ones with a kind each.

    The mask of a kind is a bit for every pair, rows of `column_tile` bits in words of 32.
    """

    runs: bool

    is_wide: ClassVar[bool] = False
    reads_head: ClassVar[bool] = True
    has_inner_loops: ClassVar[bool] = False

    def arguments(self, sides: Sides) -> tuple[KernelArgument, ...]:
        """The lists."""
        names = ["list_of_lane", "tile_order", "full_pointers", "full_tiles", "partial_pointers", "partial_tiles"]
        return tuple(KernelArgument(name, "*i32") for name in [*names, "partial_kinds", "masks"])

    def start(self, lines: Lines, sides: Sides, texts: IndexText, moved: str) -> None:
        """Where the row's lists are."""
        words = max(sides.column_tile // WORD, 1)
        self.pointers(lines)
        lines.add(
            f"word = tl.arange(0, {words})",
            f"word_rows = tl.arange(0, {sides.row_tile})[:, None] * {words} + word[None, :]",
        )

    def pointers(self, lines: Lines) -> None:
        """Where the row's lists begin and end."""
        lines.add(
            "# Live tiles are listed.",
            "full_begin = tl.load(full_pointers + entry)",
            "full_end = tl.load(full_pointers + entry + 1)",
            "partial_begin = tl.load(partial_pointers + entry)",
            "partial_end = tl.load(partial_pointers + entry + 1)",
        )

    def number(self, lines: Lines) -> None:
        """A partial tile's number, and what kind it is of."""
        lines.add("tile = tl.load(partial_tiles + at)", "kind = tl.load(partial_kinds + at)")

    def loops(self, lines: Lines, sides: Sides, body: Body, full_loop: FullLoop) -> None:
        """The loops."""
        with lines.loop("at", "partial_begin", "partial_end"):
            self.number(lines)
            body("tile", True)
        if self.runs:
            with lines.block("for at in range(full_begin, full_end):"):
                lines.add("begin = tl.load(full_tiles + 2 * at)", "end = tl.load(full_tiles + 2 * at + 1)")
                full_loop("begin", "end")
            return
        lines.add("# The number of the next tile is on its way while one is worked on.")
        lines.add("tile = tl.load(full_tiles + full_begin)")
        with lines.loop("at", "full_begin", "full_end"):
            lines.add("following = tl.load(full_tiles + at + 1)")
            body("tile", False)
            lines.add("tile = following")

    def visible(self, lines: Lines, sides: Sides, texts: IndexText) -> None:
        """The mask of a partial tile: a bit for each pair."""
        rows, columns = sides.row_tile, sides.column_tile
        words, bits = max(columns // WORD, 1), min(columns, WORD)
        lines.add(
            f"words = tl.load(masks + kind * {rows * words} + word_rows)",
            f"bits = words[:, :, None] >> tl.arange(0, {bits})[None, None, :]",
            f"visible = tl.reshape((bits & 1) != 0, ({rows}, {columns}))",
        )


Walk = RangedWalk | ListedWalk | BrickRanges
Form = Literal["ranges", "bricks", "runs", "lists", "asked"]

__all__ = ["ROWS", "Body", "Form", "ListedWalk", "RangedWalk", "Sides", "Walk"]
