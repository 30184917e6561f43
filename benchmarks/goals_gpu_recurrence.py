"""The goals for recurrences on a GPU (PERFORMANCE 8, G4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmark_part import Row
from goals import Goal, Measurement, Rows
from goals_gpu_masks import percent
from measures import each, over, timed

G4 = "PERFORMANCE 8, G4"
FORWARD_PARTS = ("gpu-recurrence-gates", "gpu-recurrence-delta")
TRAINING_PARTS = ("gpu-training-gates", "gpu-training-delta")
SMS = 132


def _few_heads(row: Row) -> bool:
    return bool(row["shape"][0] * row["shape"][2] < SMS)


def _counted(row: Row) -> bool:
    return not row["apart"]


def _width_128(row: Row) -> bool:
    return bool(row["shape"][3] == 128)


def _drift(rows: Rows) -> list[Measurement]:
    """Return the largest change of a system's tokens per second from its shortest length, in percent."""
    groups: dict[str, list[Row]] = {}
    for row in timed(rows):
        groups.setdefault(row["system"], []).append(row)
    measurements = []
    for system, system_rows in groups.items():
        first, *rest = sorted(system_rows, key=lambda row: int(row["n"]))
        gaps = [abs(100 * (row["tokens_per_second"] / first["tokens_per_second"] - 1)) for row in rest]
        if gaps:
            measurements.append(Measurement(system, max(gaps), rest[-1]))
    return measurements


def _system(name: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["system"] == name)


_recurrence = partial(
    Goal, where="gpu", suite="recurrence", floor=None, least=True, unit="×", source=G4, parts=FORWARD_PARTS
)
RECURRENCE = (
    _recurrence(
        key="G4.fla",
        asks="times flash-linear-attention's speed, forward, its six shapes",
        target=1.5,
        floor=1.0,
        read=over("fla"),
    ),
    _recurrence(
        key="G4.fla.few",
        asks="times flash-linear-attention's speed where batch × heads are fewer than the SMs",
        target=2.0,
        read=over("fla", _few_heads),
    ),
    _recurrence(
        key="G4.memory",
        asks="share of the memory's published speed from 8,192 tokens on, forward",
        target=50,
        read=each(percent("of_hbm"), lambda row: bool(row["n"] >= 8192)),
        how="median",
        unit="%",
        parts=(*FORWARD_PARTS, "gpu-recurrence-lengths"),
    ),
    _recurrence(
        key="G4.tokens",
        asks="change of tokens per second from 8,192 to 131,072 tokens",
        target=10,
        read=_drift,
        least=False,
        how="most",
        unit="%",
        parts=("gpu-recurrence-lengths",),
    ),
    _recurrence(
        key="G4.lightning",
        asks="times Lightning Attention-2's speed",
        target=4.0,
        read=over("lightning", _system("lightning")),
        parts=("gpu-recurrence-authors",),
    ),
    _recurrence(
        key="G4.ssd",
        asks="times the speed of Mamba-2's SSD",
        target=1.3,
        read=over("mamba", _system("mamba2_ssd")),
        parts=("gpu-recurrence-authors",),
    ),
    _recurrence(
        key="G4b.fla",
        asks="times flash-linear-attention's speed with backward, widths of 128",
        target=1.8,
        floor=1.1,
        read=over("fla", _width_128),
        source="PERFORMANCE 8, G4b",
        parts=TRAINING_PARTS,
    ),
    _recurrence(
        key="G4b.least",
        asks="no shape slower with backward, except width 256, for which the rival's gradient takes seconds",
        target=1.0,
        read=over("fla", _counted),
        how="least",
        source="PERFORMANCE 8, G4b",
        parts=TRAINING_PARTS,
    ),
)
