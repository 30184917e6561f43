"""What a piece costs on a CPU: measured rates of torch's flash kernel, in nanoseconds.

Source: two threads of an AVX-512 + AMX machine, torch 2.13, head dimension 64. Only ratios matter here: they rank
schedules.
"""

from __future__ import annotations

from attnc.compiler.planning.plan import Piece

_ROWS = (32, 64, 128, 256, 512)
_RATES = {
    "float32": (1.99, 1.87, 1.41, 1.33, 1.02),
    "bfloat16": (1.19, 1.35, 0.93, 0.48, 0.40),
    "float16": (1.19, 1.35, 0.93, 0.48, 0.40),
    "float64": (4.0, 3.7, 2.8, 2.6, 2.0),
}
_MASKED = {"float32": 1.08, "bfloat16": 1.18, "float16": 1.18, "float64": 1.05}

CALL = 25_000.0
"""One piece, whatever its size."""

MERGE = 1.0
"""One element of the output merged by log-sum-exp."""

COPY = 0.35
"""One element of a tensor copied to where a brick stands together."""

MASK = 1.0
"""One element of a mask put together for a piece, whatever the number of heads."""

EVALUATE = 1.5
"""One element of a mask, one node of the relation, evaluated when the piece runs."""


def element_rate(dtype: str, rows: int, head_dim: int) -> float:
    """Time of one score element in a stretch of `rows` rows."""
    rates = _RATES.get(dtype, _RATES["float32"])
    at = max((i for i, r in enumerate(_ROWS) if r <= rows), default=0)
    return rates[at] * max(head_dim, 16) / 64


def piece_cost(piece: Piece, *, dtype: str, head_dim: int, lanes: int, nodes: int, copies: int = 1) -> float:
    """Estimated time of one piece for `lanes` (batch × head) problems whose relation has `nodes` nodes.

    `copies`: the piece stands for so many alike, which are one call if it is a single stretch.
    """
    work = piece.elements * element_rate(dtype, piece.queries.length, head_dim) * lanes
    if piece.mask not in ("full", "causal"):
        work *= _MASKED.get(dtype, 1.08)
    if isinstance(piece.mask, int):
        work += piece.queries.length * piece.keys.length * MASK
    if piece.mask == "exact":
        work += piece.elements * nodes * EVALUATE
    if not piece.fresh:
        work += piece.queries.count * piece.queries.length * head_dim * lanes * MERGE
    if piece.queries.flat() is None or piece.keys.flat() is None:
        tokens = piece.queries.count * (piece.queries.length + piece.keys.length)
        work += 2 * tokens * head_dim * lanes * COPY
    if piece.mask == "exact":
        return (work + CALL * piece.queries.count) * copies
    return work * copies + CALL * (copies if piece.queries.count > 1 else 1)
