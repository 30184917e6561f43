"""The goals for decoding on a GPU (PERFORMANCE 8, G3)."""

from __future__ import annotations

from functools import partial

from benchmark_part import Row
from goals import Goal, Measurement, Rows
from goals_gpu_masks import best, percent
from measures import each, median, over, timed

LARGE = 256 << 20
"""Minimum bytes of caches whose speed depends on the memory."""


def _large(row: Row) -> bool:
    return bool(row["cache_bytes"] >= LARGE)


def _beyond_live(rows: Rows) -> list[Measurement]:
    """Return a sparse step's time beyond its share of the cache, in percent of the whole step."""
    measurements = []
    for row in timed(rows):
        for name, live in row.get("live", {}).items():
            time = median(row, name)
            if name != "attnc" and time is not None and _large(row):
                beyond = time / float(row["ms"]["attnc"]["median"]) - live
                measurements.append(Measurement(f"{row['key']}, {name.removeprefix('attnc_')}", 100 * beyond, row))
    return measurements


def _microseconds(row: Row) -> float | None:
    return 1e3 * float(row["ms"]["attnc"]["median"]) if "attnc" in row.get("captured", ()) else None


_decode = partial(
    Goal,
    where="gpu",
    suite="decode",
    floor=None,
    least=True,
    unit="×",
    source="PERFORMANCE 8, G3",
    parts=("gpu-decode",),
)
DECODE = (
    _decode(
        key="G3.copy",
        asks="share of a copy's speed in the same run, caches of 256 MB or more",
        target=85,
        floor=70,
        read=each(percent("of_copy_speed"), _large),
        how="median",
        unit="%",
    ),
    _decode(
        key="G3.dense",
        asks="times the best of FlashInfer and FlashAttention over the whole cache",
        target=1.0,
        read=each(best("flashinfer", "flash_attention")),
    ),
    _decode(
        key="G3.flex", asks="times FlexAttention's speed over the whole cache", target=1.3, floor=1.0, read=over("flex")
    ),
    _decode(
        key="G3.sparse",
        asks="time beyond the share that is read, relative to the whole step: a window with sinks, the best pages",
        target=10,
        read=_beyond_live,
        least=False,
        how="most",
        unit="%",
    ),
    _decode(
        key="G3.graph",
        asks="time of a step of one sequence against 1,024 keys, as a CUDA graph",
        target=12,
        read=each(_microseconds, lambda row: bool(row["batch"] == 1 and row["n"] == 1024)),
        least=False,
        how="one value",
        unit="µs",
    ),
)
