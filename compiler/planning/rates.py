"""The cost of a piece on a CPU in nanoseconds, from the rates of torch's flash kernel and of the work around it.

Only ratios matter: they rank schedules. `runtime.measuring.calibration` measures the rates of a machine.

Selection and attention to selected blocks, which run without torch's kernel, have rates of their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from attnc.compiler.planning.cpu_plan import PlanPiece

ROWS = (32, 64, 128, 256, 512)
"""Numbers of rows of a stretch for which element rates are measured."""

WIDTHS = (64, 128)
"""Head dimensions for which element rates are measured."""

Table = tuple[tuple[float, ...], tuple[float, ...]]
"""Nanoseconds for one score element, by width and rows."""


KEY_BLOCK = 512
"""Number of keys of a block of the kernel; of a causal call the kernel skips only whole blocks."""


@dataclass(frozen=True)
class ChoiceRates:
    """Rates of a machine in nanoseconds, for fp32 and the number of threads with which they were measured.

    Selection: `node`, a node of the selection's expressions, whatever its size; `row`, a row that selects; `place`, a
    candidate block of a row that is ranked by its score; `ordered`, a candidate where a row's candidates are sorted;
    `product`, a dot product of two vectors of 64 elements; `operation`, an element of an operation of a score; `test`,
    an element of a node of a condition; `pooled`, an element of keys or values that is averaged.

    Attention: `listed`, a candidate of a row that is read to build lists; `piece` and `piece_backward`, a block with
    its gathered queries, whatever its size; `taken`, an element of rows that is gathered; `merged`, an element of
    partial results that is gathered, merged by log-sum-exp and scattered; `added`, an element of gradients of rows.
    """

    node: float
    row: float
    place: float
    ordered: float
    product: float
    operation: float
    test: float
    pooled: float
    listed: float
    piece: float
    piece_backward: float
    taken: float
    merged: float
    added: float


GUESSED = ChoiceRates(
    node=90_000.0,
    row=35.0,
    place=2.5,
    ordered=300.0,
    product=1.2,
    operation=0.6,
    test=3.0,
    pooled=1.0,
    listed=1.4,
    piece=60_000.0,
    piece_backward=70_000.0,
    taken=0.15,
    merged=1.5,
    added=0.8,
)
"""Rates of two threads of a CPU with AVX-512, torch 2.13."""


def computed(piece: PlanPiece, *, trimmed: bool = False) -> int:
    """Return the score elements that the kernel computes for a piece.

    `trimmed`: a masked piece is computed on and under the diagonal only, like a causal one.
    """
    rows, keys = piece.queries.length, piece.keys.length
    if piece.mask != "causal" and not trimmed:
        return piece.queries.count * rows * keys
    blocks, remaining_keys = divmod(min(rows, keys), KEY_BLOCK)
    # block j of keys is computed by the rows from 512 · j on; the last block is shorter
    whole_blocks = KEY_BLOCK * (blocks * rows - KEY_BLOCK * (blocks * (blocks - 1) // 2))
    last_block = (rows - KEY_BLOCK * blocks) * min(KEY_BLOCK, keys - KEY_BLOCK * blocks) if remaining_keys else 0
    return piece.queries.count * (whole_blocks + last_block)


@dataclass(frozen=True)
class Rates:
    """The rates of a machine in nanoseconds, for the number of threads with which they were measured.

    `elements`: a score element, by dtype, width and rows. `masked`: the factor of an element with an additive mask.
    `call`: the fixed cost of a piece. `merge`: an output element that is merged by log-sum-exp. `copy`: an element that
    is copied so that a brick is contiguous. `mask`: an element of a shared mask that is assembled. `evaluate`: an
    element of a mask evaluated as the piece runs, for each node of the relation. `backward`: the time of the backward
    over that of the forward, by dtype. `row`: the extra cost of a query row with few keys, by dtype, at `WIDTHS[0]`; a
    row of `KEY_BLOCK` keys has this cost in its elements. `peak`: an element of long dense calls, the fastest that the
    machine reaches, by dtype and width; a dtype without it uses the fastest of `elements`. `alone`: the factor of the
    backward with a single kv head, which torch's kernel gives to one thread, by dtype. `choices`: rates of selection
    and of attention to selected blocks. `source`: where the rates come from. `spread`: the largest factor between two
    minima of one measurement.
    """

    elements: Mapping[str, Table]
    masked: Mapping[str, float]
    call: float
    merge: float
    copy: float
    mask: float
    evaluate: float
    backward: Mapping[str, float]
    row: Mapping[str, float]
    peak: Mapping[str, tuple[float, float]]
    alone: Mapping[str, float]
    choices: ChoiceRates
    source: str
    spread: float = 1.0

    def element(self, dtype: str, rows: int, head_dim: int) -> float:
        """Return the nanoseconds of a score element in a stretch of `rows` rows, linear in the head dimension."""
        i = max(bisect_right(ROWS, rows) - 1, 0)
        narrow, wide = (row[i] for row in self.elements.get(dtype, self.elements["float32"]))
        slope = (wide - narrow) / (WIDTHS[1] - WIDTHS[0])
        return max(narrow + (head_dim - WIDTHS[0]) * slope, narrow / 4)

    def best(self, dtype: str, head_dim: int) -> float:
        """Return the nanoseconds of a score element at the fastest known rate."""
        result = min(self.element(dtype, rows, head_dim) for rows in ROWS)
        if dtype not in self.peak:
            return result
        narrow, wide = self.peak[dtype]
        slope = (wide - narrow) / (WIDTHS[1] - WIDTHS[0])
        return min(result, max(narrow + (head_dim - WIDTHS[0]) * slope, narrow / 4))

    def longer(self, dtype: str, kv_lanes: int, threads: int) -> float:
        """Return the time of torch's backward over its forward; the backward gives each kv head to one thread."""
        idle = max(threads - kv_lanes, 0) / max(threads - 1, 1)
        return self.backward.get(dtype, 2.5) * (1 + idle * (self.alone.get(dtype, 1.0) - 1))

    def piece(self, piece: PlanPiece, work: PieceWork, trimmed: bool = False) -> float:
        """Return the nanoseconds of all calls of a piece; `trimmed`: a mask is computed up to the diagonal only."""
        elements = computed(piece, trimmed=trimmed)
        time = elements * self.element(work.dtype, piece.queries.length, work.head_dim) * work.lanes
        if piece.mask not in ("full", "causal"):
            time *= self.masked.get(work.dtype, self.masked["float32"])
        missing_share = 1 - piece.keys.length / KEY_BLOCK
        if missing_share > 0:
            row = self.row.get(work.dtype, 0.0) * work.head_dim / WIDTHS[0]
            time += piece.queries.count * piece.queries.length * work.lanes * missing_share * row
        if isinstance(piece.mask, int):
            time += piece.queries.length * piece.keys.length * self.mask
        if piece.mask == "exact":
            time += piece.elements * work.nodes * self.evaluate
        if not piece.fresh:
            time += piece.queries.count * piece.queries.length * work.head_dim * work.lanes * self.merge
        if piece.queries.flat() is None or piece.keys.flat() is None:
            tokens = piece.queries.count * (piece.queries.length + piece.keys.length)
            time += 2 * tokens * work.head_dim * work.lanes * self.copy
        if piece.mask == "exact":
            return (time + self.call * piece.queries.count) * work.copies
        return time * work.copies + self.call * (work.copies if piece.queries.count > 1 else 1)


@dataclass(frozen=True, slots=True)
class PieceWork:
    """The size of a piece: `lanes` is batch × heads, `nodes` the number of nodes of the relation.

    `copies`: the number of equal pieces that this one represents; they are one call if the piece is a single stretch.
    """

    dtype: str
    head_dim: int
    lanes: int
    nodes: int
    copies: int = 1


_SINGLE: Table = ((1.99, 1.87, 1.41, 1.33, 1.02), (3.35, 2.78, 2.32, 1.95, 1.87))
_HALF: Table = ((1.19, 1.19, 0.93, 0.48, 0.40), (1.75, 1.75, 0.93, 0.64, 0.53))
_PLAIN_SINGLE: Table = ((3.90, 2.90, 2.80, 2.20, 2.10), (6.60, 5.50, 5.20, 4.60, 4.40))
_PLAIN_HALF: Table = ((3.30, 3.20, 3.00, 2.77, 2.70), (6.00, 5.50, 5.50, 4.90, 4.80))


def doubled(table: Table) -> Table:
    """Return the table with all rates doubled, which is the guess for fp64 from fp32."""
    narrow, wide = (tuple(2 * x for x in row) for row in table)
    return narrow, wide


AMX = Rates(
    elements={"float32": _SINGLE, "bfloat16": _HALF, "float16": _HALF, "float64": doubled(_SINGLE)},
    masked={"float32": 1.08, "bfloat16": 1.18, "float16": 1.18, "float64": 1.05},
    call=25_000.0,
    merge=5.0,
    copy=0.15,
    mask=1.0,
    evaluate=1.5,
    row={},
    peak={},
    alone={},
    choices=GUESSED,
    backward={"float32": 2.4, "bfloat16": 2.6, "float16": 2.6, "float64": 2.4},
    source="two threads of a CPU with AVX-512 and AMX, torch 2.13",
)
"""Rates of a machine that multiplies half types in hardware."""

PLAIN = Rates(
    elements={
        "float32": _PLAIN_SINGLE,
        "bfloat16": _PLAIN_HALF,
        "float16": _PLAIN_HALF,
        "float64": doubled(_PLAIN_SINGLE),
    },
    masked={"float32": 1.05, "bfloat16": 1.03, "float16": 1.03, "float64": 1.05},
    call=45_000.0,
    merge=5.0,
    copy=0.12,
    mask=AMX.mask,
    evaluate=AMX.evaluate,
    row={},
    peak={},
    alone={},
    choices=GUESSED,
    backward={"float32": 2.1, "bfloat16": 2.3, "float16": 2.3, "float64": 2.1},
    source="two threads of a CPU with AVX2, torch 2.13",
)
"""Rates of a machine that does not multiply half types in hardware."""
