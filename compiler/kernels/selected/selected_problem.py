"""The description of attention to selected blocks from which its kernels are emitted."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnc.compiler.ir import Compare, Index, Linear, Truth, fold
from attnc.compiler.kernels.attention_problem import PAIRS
from attnc.compiler.kernels.index_text import (
    COLUMNS,
    ROWS,
    Axes,
    ExprText,
    IndexText,
    NotInKernelsError,
    aligned,
    fits_32_bits,
)
from attnc.compiler.kernels.kernel_source import BYTES, VECTOR, StrideUnits
from attnc.compiler.kernels.targets import Target

WIDEST = 256
"""Maximum width of a head."""


@dataclass(frozen=True)
class PairCondition:
    """The condition of a pair besides the selection, as text over tiles (queries, keys) and tiles (keys, queries).

    Its constants are arguments `n0`, `n1` and so on; `numbers` is their number. `wide`: positions are 64-bit integers.
    """

    by_query: str
    by_key: str
    numbers: int
    helpers: tuple[str, ...]
    wide: bool


@dataclass(frozen=True)
class SelectedProblem(StrideUnits):
    """The description of attention to selected blocks from which its kernels are emitted.

    `rest`: the condition of pairs besides the selection; None if every key of a selected block is visible. `ordered`:
    the keys of a block are adjacent in memory and not in the sequence. `stacked`: query heads of a group select for
    themselves, and their rows stand one head after another; otherwise `grouped`: query heads share a kv head and a
    selection. `columns`: maximum number of keys in a tile (`columns_for`).
    """

    dk: int
    dv: int
    dtype: str
    target: Target
    tf32: bool = False
    rest: PairCondition | None = None
    ordered: bool = False
    stacked: bool = False
    grouped: bool = False
    columns: int = 64

    def __post_init__(self) -> None:
        if max(self.dk, self.dv) > WIDEST:
            raise NotInKernelsError(
                f"selected blocks with heads of width {max(self.dk, self.dv)}, which exceeds {WIDEST}"
            )


COLUMNS_OF_TILES = (16, 32, 64)
"""Numbers of keys in a tile: small blocks leave large tiles mostly empty."""


def columns_for(largest: int) -> int:
    """Return the maximum number of keys in a tile, for blocks of up to `largest` keys."""
    return next((columns for columns in COLUMNS_OF_TILES if largest <= columns), COLUMNS_OF_TILES[-1])


def part_width(width: int) -> int:
    """Return the stride in fp32 numbers between rows of partial results."""
    unit = VECTOR // BYTES["float32"]
    return -(-width // unit) * unit


def rest_text(rest: Index) -> tuple[PairCondition | None, tuple[int, ...]]:
    """Return a specialised condition over queries and keys as text, and its numbers. Raises NotInKernelsError."""
    if isinstance(rest, Truth):
        return None, ()
    wide = not fits_32_bits(rest)
    by_query, by_key = (_lifted_writer(wide, *axes) for axes in ((ROWS, COLUMNS), (COLUMNS, ROWS)))
    texts = [writer.of(rest).over(PAIRS).at(6) for writer in (by_query, by_key)]
    assert by_query.values == by_key.values
    return PairCondition(texts[0], texts[1], len(by_query.values), tuple(by_query.helpers), wide), tuple(
        by_query.values
    )


def _lifted_writer(wide: bool, query_axes: Axes, key_axes: Axes) -> _Lifted:
    cast = ".to(tl.int64)" if wide else ""
    names: dict[Index, ExprText] = {
        fold.place("q"): ExprText(f"query{cast}", query_axes),
        fold.place("k"): ExprText(f"position{cast}", key_axes),
    }
    return _Lifted(names, _unread)


def _unread(*_: object) -> ExprText:
    raise NotInKernelsError("selections combined with inputs that are read pair by pair")


@dataclass
class _Lifted(IndexText):
    """A writer of texts whose constants are arguments, as they hold lengths; so one kernel serves all lengths."""

    values: list[int] = field(default_factory=list)

    def _sum(self, node: Linear) -> ExprText:
        if not node.constant:
            return super()._sum(node)
        return self._plus(self.of(fold.linear(node.terms, 0)), node.constant)

    def _comparison(self, node: Compare) -> ExprText:
        terms, constant = fold.parts(node.value)
        left = fold.linear([(t, c) for t, c in terms if c > 0], 0)
        right = fold.linear([(t, -c) for t, c in terms if c < 0], 0)
        moved = self._plus(self.of(left), constant)
        axes, (a, b) = aligned(moved, self.of(right))
        return ExprText(f"{a.at(5)} {'>=' if node.op == 'ge' else '=='} {b.at(5)}", axes, 3)

    def _plus(self, text: ExprText, constant: int) -> ExprText:
        if abs(constant) >= 1 << 62:
            raise NotInKernelsError("integers that may exceed 64 bits")
        name = f"n{len(self.values)}"
        self.values.append(constant)
        return ExprText(name) if text.text == "0" else ExprText(f"{text.at(5)} + {name}", text.axes, 5)
