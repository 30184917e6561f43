"""The problem that kernels of selected blocks are emitted for, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnc.compiler import fold
from attnc.compiler.ir import Compare, Index, Linear, Truth
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
from attnc.compiler.kernels.kernel_source import VECTOR
from attnc.compiler.kernels.targets import Target
from attnc.compiler.simulation.gpu_clocks import BYTES

WIDEST = 256
"""Entries of a head, at most."""


@dataclass(frozen=True)
class PairCondition:
    """The condition of a pair besides the selection, as text over tiles (queries, keys) and tiles (keys, queries).

    Its constants are arguments, so many `numbers`: `n0`, `n1` and so on. `wide`: places are numbers of 64 bits.
    """

    by_query: str
    by_key: str
    numbers: int
    helpers: tuple[str, ...]
    wide: bool


@dataclass(frozen=True)
class SelectedProblem:
    """The problem that kernels of selected blocks are emitted for.

    `rest`: None where every key of a chosen place is visible. `ordered`: the keys of a place lie side by side in memory
    and not in the sequence. `stacked`: rows are those of all heads of a group, which choose for themselves, one head
    after another; else `grouped`: heads of queries share a head of keys, and what is chosen. `columns`: keys of a tile
    at most (`columns_for`).
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
                f"chosen places with heads of {max(self.dk, self.dv)}, which are wider than {WIDEST}"
            )

    @property
    def vector(self) -> int:
        """Entries in a unit of strides."""
        return VECTOR // BYTES[self.dtype]

    @property
    def precision(self) -> str:
        """The precision of fp32 products, as arguments of tl.dot."""
        if self.dtype != "float32":
            return ""
        return f', input_precision="{"tf32" if self.tf32 else "ieee"}"'


COLUMNS_OF_TILES = (16, 32, 64)
"""Keys of a tile: small places leave large tiles empty."""


def columns_for(largest: int) -> int:
    """The keys of a tile at most, for places of so many."""
    return next((columns for columns in COLUMNS_OF_TILES if largest <= columns), COLUMNS_OF_TILES[-1])


def part_width(width: int) -> int:
    """Numbers of fp32 from a row of parts to the next."""
    unit = VECTOR // BYTES["float32"]
    return -(-width // unit) * unit


def rest_text(rest: Index) -> tuple[PairCondition | None, tuple[int, ...]]:
    """The text of a specialised condition over queries and keys, and its numbers. Raises NotInKernelsError."""
    if isinstance(rest, Truth):
        return None, ()
    wide = not fits_32_bits(rest)
    by_query, by_key = (_lifted(wide, *axes) for axes in ((ROWS, COLUMNS), (COLUMNS, ROWS)))
    texts = [own.of(rest).over(PAIRS).at(6) for own in (by_query, by_key)]
    assert by_query.values == by_key.values
    return PairCondition(texts[0], texts[1], len(by_query.values), tuple(by_query.helpers), wide), tuple(
        by_query.values
    )


def _lifted(wide: bool, of_query: Axes, of_key: Axes) -> _Lifted:
    more = ".to(tl.int64)" if wide else ""
    names: dict[Index, ExprText] = {
        fold.place("q"): ExprText(f"query{more}", of_query),
        fold.place("k"): ExprText(f"position{more}", of_key),
    }
    return _Lifted(names, _unread)


def _unread(*_: object) -> ExprText:
    raise NotInKernelsError("a choice beside inputs that are read pair by pair")


@dataclass
class _Lifted(IndexText):
    """Texts whose constants are arguments: lengths stand in them, and equal texts are one kernel for all lengths."""

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
            raise NotInKernelsError("numbers past 64 bits")
        name = f"n{len(self.values)}"
        self.values.append(constant)
        return ExprText(name) if text.text == "0" else ExprText(f"{text.at(5)} + {name}", text.axes, 5)
