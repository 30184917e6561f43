"""Loops of a program over its live tiles: by loop bounds that it computes, or from lists that a plan has written.

A program owns a tile of rows (queries, or keys in kernels of key gradients) and walks tiles of columns. Full tiles are
computed without a mask, partial tiles with a mask, and all other tiles are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from attnc.compiler.analysis.token_ranges import TokenRange, ends
from attnc.compiler.ir import Arith, Const, HeadIndex, Index, Truth
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.kernels.brick_ranges import BrickRanges
from attnc.compiler.kernels.index_text import ExprText, IndexText, fits_32_bits
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.text_lines import Lines

SHORT = 256
"""Length in tokens below which a range's full tiles are not worth a loop without a mask."""

Body = Callable[[str, bool], None]
"""Emits the work on a tile, given the text of its number and whether it is partial."""

FullLoop = Callable[[str, str], None]
"""Emits the loop over full tiles, given the texts of the first tile and of the end, one past the last tile."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The names of a program's sides, `rows` and `columns` of their lengths; `row_tile`, `column_tile`: tile sides."""

    row: str
    rows: str
    row_tile: int
    column: str
    columns: str
    column_tile: int


@dataclass(frozen=True)
class RangedWalk:
    """Loop bounds that the kernel computes from the ranges of columns that a row sees, whose ends are formulas.

    `windows`: each row sees nothing outside its own window (documents).
    """

    ranges: tuple[TokenRange, ...]
    windows: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether the ends of the ranges need 64-bit integers."""
        return not all(map(fits_32_bits, _ends_and_conditions(self.ranges)))

    @property
    def has_inner_loops(self) -> bool:
        """Whether loops over tiles are nested in other loops."""
        return len(self.ranges) > 1 and not self._begins_short

    @property
    def reads_head(self) -> bool:
        """Whether query heads that share a kv head see different pairs."""
        return any(
            isinstance(n, HeadIndex) and n.name == "head"
            for end in _ends_and_conditions(self.ranges)
            for n in walk(end)
        )

    def arguments(self, sides: Sides) -> tuple[KernelArgument, ...]:
        """Return no arguments: the kernel computes its bounds."""
        return ()

    def start(self, lines: Lines, sides: Sides, texts: IndexText, moved: str) -> None:
        """Emit the lines before the loops; `moved` is added to a position to get the column's number."""
        lines.add(f"# The {sides.columns} that each {sides.row} sees are those from `first` to `last`.")
        for i, token_range in enumerate(self.ranges):
            self._emit_ends(lines, sides, texts, i, token_range, moved)
        for i in range(len(self.ranges)):
            self._emit_tile_bounds(lines, sides, i)
        if not self._is_sorted:
            _sort(lines, len(self.ranges))

    def _emit_ends(
        self, lines: Lines, sides: Sides, texts: IndexText, i: int, token_range: TokenRange, moved: str
    ) -> None:
        first = "window_first" if self.windows else "0"
        last = "window_last" if self.windows else f"{sides.columns} - 1"
        if self._has_first(i):
            end, default = token_range.low, f"first_{i} = {first}"
            lines.add(default if end is None else f"first_{i} = tl.maximum({_shifted(texts.of(end), moved)}, {first})")
        if self._has_last(i):
            end, default = token_range.high, f"last_{i} = {last}"
            lines.add(default if end is None else f"last_{i} = tl.minimum({_shifted(texts.of(end), moved)}, {last})")
        if self.is_wide:
            names = [
                n for n, exists in ((f"first_{i}", self._has_first(i)), (f"last_{i}", self._has_last(i))) if exists
            ]
            limit = f"{1 << 30}"
            lines.add(*(f"{name} = tl.minimum(tl.maximum({name}, -{limit}), {limit}).to(tl.int32)" for name in names))

    def _has_first(self, i: int) -> bool:
        return self.windows or self.ranges[i].low is not None

    def _has_last(self, i: int) -> bool:
        return self.windows or self.ranges[i].high is not None

    def _emit_tile_bounds(self, lines: Lines, sides: Sides, i: int) -> None:
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
        """Whether there are two ranges, the first of which holds only a few of the first tokens."""
        if not (self._is_sorted and len(self.ranges) == 2 and self._has_last(0)):
            return False
        end = self.ranges[0].high
        operands = end.operands if isinstance(end, Arith) and end.op == "min" else (end,)
        return any(isinstance(operand, Const) and operand.value < SHORT for operand in operands)

    @property
    def _is_sorted(self) -> bool:
        """Whether the ranges are known to begin in ascending order."""
        return len(self.ranges) == 1 or (len(self.ranges) == 2 and not self._has_first(0))

    def loops(self, lines: Lines, sides: Sides, body: Body, full_loop: FullLoop) -> None:
        """Emit the loops over partial tiles by `body`, and over full tiles by `full_loop`."""
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
                names = [_bound_of_range(name, len(self.ranges)) for name in ("low", "high", "full_low", "full_high")]
                lines.add(f"begin = tl.maximum({names[0]}, end)", f"end = tl.maximum({names[1]}, begin)")
                lines.add(f"full = tl.minimum(tl.maximum({names[2]}, begin), end)")
                lines.add(f"rest = tl.minimum(tl.maximum({names[3]}, full), end)")
                _split_loops(lines, body, full_loop)
            return
        if self._has_first(0):
            lines.add("begin = low_0", "end = tl.maximum(high_0, begin)")
            lines.add("full = tl.minimum(tl.maximum(full_low_0, begin), end)")
            lines.add("rest = tl.minimum(tl.maximum(full_high_0, full), end)")
            _split_loops(lines, body, full_loop)
            return
        lines.add("end = tl.maximum(high_0, 0)" if self._has_last(0) else "end = high_0")
        lines.add("rest = tl.minimum(tl.maximum(full_high_0, 0), end)" if self._has_last(0) else "rest = full_high_0")
        with lines.loop("tile", "rest", "end"):
            body("tile", True)
        full_loop("0", "rest")

    def live(self) -> str:
        """Return the condition that a tile may hold a visible pair."""
        tests = []
        for i in range(len(self.ranges)):
            low = f"(tile >= low_{i}) & " if self._has_first(i) or len(self.ranges) > 1 else ""
            tests.append(f"({low}(tile < high_{i}))")
        return " | ".join(tests)

    def visible(self, lines: Lines, sides: Sides, texts: IndexText) -> None:
        """Emit the mask of a partial tile."""
        for i in range(len(self.ranges)):
            tests = []
            if self._has_first(i):
                tests.append(f"(column[None, :] >= (first_{i} - tile * {sides.column_tile})[:, None])")
            if self._has_last(i):
                tests.append(f"(column[None, :] <= (last_{i} - tile * {sides.column_tile})[:, None])")
            else:
                tests.append(f"({sides.column}[None, :] < {sides.columns})")
            lines.add(
                f"visible = {'visible | ' if i else ''}{_parenthesised(' & '.join(tests), len(tests) > 1 and i > 0)}"
            )


def _parenthesised(text: str, is_needed: bool) -> str:
    return f"({text})" if is_needed else text


def _bound_of_range(name: str, count: int) -> str:
    """Return the bound `name` of the range with the number `which`, as text."""
    text = f"{name}_{count - 1}"
    for i in reversed(range(count - 1)):
        text = f"tl.where(which == {i}, {name}_{i}, {text})"
    return text


def _split_loops(lines: Lines, body: Body, full_loop: FullLoop) -> None:
    """Emit the loop over the partial tiles on both sides of the full ones, then the loop over the full tiles."""
    with lines.loop("step", "begin", "end - (rest - full)"):
        lines.add("tile = tl.where(step < full, step, step + (rest - full))")
        body("tile", True)
    full_loop("full", "rest")


def _ends_and_conditions(ranges: Sequence[TokenRange]) -> list[Index]:
    """Return the ends of ranges and the conditions that are not constant."""
    conditions = [token_range.condition for token_range in ranges if not isinstance(token_range.condition, Truth)]
    return [*ends(ranges), *conditions]


def _shifted(text: ExprText, moved: str) -> str:
    """Return the end of a range as a column's number for every row."""
    return f"{text.at(5)}{moved}{'' if text.axes else ' + tl.zeros_like(row)'}"


def _least(text: str) -> str:
    return f"tl.min({text}, 0)"


def _most(text: str) -> str:
    return f"tl.max({text}, 0)"


def _sort(lines: Lines, count: int) -> None:
    """Emit the exchanges that sort ranges by their first tile."""
    for last in range(count - 1, 0, -1):
        for i in range(last):
            lines.add(f"swap = low_{i + 1} < low_{i}")
            for name in ("low", "full_low", "full_high", "high"):
                a, b = f"{name}_{i}", f"{name}_{i + 1}"
                lines.add(f"lower, upper = tl.where(swap, {b}, {a}), tl.where(swap, {a}, {b})")
                lines.add(f"{a}, {b} = lower, upper")


WORD = 32
"""Bits of a mask in one integer."""


@dataclass(frozen=True)
class ListedWalk:
    """Tile lists by row: full tiles one by one or as runs of adjacent tiles, partial tiles with a kind each.

    Tiles of one kind share a mask of one bit per pair: rows of `column_tile` bits in words of 32.
    """

    runs: bool

    is_wide: ClassVar[bool] = False
    reads_head: ClassVar[bool] = True
    has_inner_loops: ClassVar[bool] = False

    def arguments(self, sides: Sides) -> tuple[KernelArgument, ...]:
        """Return the arguments for the lists and masks."""
        names = ["list_of_lane", "tile_order", "full_pointers", "full_tiles", "partial_pointers", "partial_tiles"]
        return tuple(KernelArgument(name, "*i32") for name in [*names, "partial_kinds", "masks"])

    def start(self, lines: Lines, sides: Sides, texts: IndexText, moved: str) -> None:
        """Emit the bounds of the row's lists and the offsets of its mask's words."""
        words = max(sides.column_tile // WORD, 1)
        self.pointers(lines)
        lines.add(
            f"word = tl.arange(0, {words})",
            f"word_rows = tl.arange(0, {sides.row_tile})[:, None] * {words} + word[None, :]",
        )

    def pointers(self, lines: Lines) -> None:
        """Emit the loads of where the row's lists begin and end."""
        lines.add(
            "# Live tiles are listed.",
            "full_begin = tl.load(full_pointers + entry)",
            "full_end = tl.load(full_pointers + entry + 1)",
            "partial_begin = tl.load(partial_pointers + entry)",
            "partial_end = tl.load(partial_pointers + entry + 1)",
        )

    def number(self, lines: Lines) -> None:
        """Emit the loads of a partial tile's number and of its kind."""
        lines.add("tile = tl.load(partial_tiles + at)", "kind = tl.load(partial_kinds + at)")

    def loops(self, lines: Lines, sides: Sides, body: Body, full_loop: FullLoop) -> None:
        """Emit the loops over partial and full tiles."""
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
        """Emit the mask of a partial tile, from one bit per pair."""
        rows, columns = sides.row_tile, sides.column_tile
        words, bits = max(columns // WORD, 1), min(columns, WORD)
        lines.add(
            f"words = tl.load(masks + kind * {rows * words} + word_rows)",
            f"bits = words[:, :, None] >> tl.arange(0, {bits})[None, None, :]",
            f"visible = tl.reshape((bits & 1) != 0, ({rows}, {columns}))",
        )


Walk = RangedWalk | ListedWalk | BrickRanges
Form = Literal["ranges", "bricks", "runs", "lists", "content"]
