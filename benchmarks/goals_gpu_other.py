"""The goals for a GPU of decoding, recurrences and chosen places (PERFORMANCE 8, G3 to G5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from goals import Found, Goal, Rows
from goals_gpu_masks import best, percent, stood_in
from measures import break_even, each, median, over, speedup, timed
from part import Row

# --- decode ----------------------------------------------------------------------------------------------------------

LARGE = 256 << 20
"""Bytes of a cache that the memory's speed decides about."""


def _large(row: Row) -> bool:
    return bool(row["cache_bytes"] >= LARGE)


def _beyond_live(rows: Rows) -> list[Found]:
    """Percent of the whole step that a sparse one takes beyond the share of the cache that it reads."""
    found = []
    for row in timed(rows):
        for name, live in row.get("live", {}).items():
            own = median(row, name)
            if name != "attnc" and own is not None and _large(row):
                beyond = own / float(row["ms"]["attnc"]["median"]) - live
                found.append(Found(f"{row['key']}, {name.removeprefix('attnc_')}", 100 * beyond, row))
    return found


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
        asks="of a copy's speed in the same run, caches of 256 MB or more",
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
        asks="of the whole step beyond the share that is read: a window with sinks, the best pages",
        target=10,
        read=_beyond_live,
        least=False,
        how="most",
        unit="%",
    ),
    _decode(
        key="G3.graph",
        asks="a step of one sequence against 1,024 keys, as a CUDA graph",
        target=12,
        read=each(_microseconds, lambda row: bool(row["batch"] == 1 and row["n"] == 1024)),
        least=False,
        how="one value",
        unit="µs",
    ),
)

# --- recurrences -----------------------------------------------------------------------------------------------------

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


def _drift(rows: Rows) -> list[Found]:
    """By how many percent tokens a second of a system differ, at most, from those at its shortest length."""
    groups: dict[str, list[Row]] = {}
    for row in timed(rows):
        groups.setdefault(row["system"], []).append(row)
    found = []
    for system, own in groups.items():
        first, *rest = sorted(own, key=lambda row: int(row["n"]))
        gaps = [abs(100 * (row["tokens_per_second"] / first["tokens_per_second"] - 1)) for row in rest]
        if gaps:
            found.append(Found(system, max(gaps), rest[-1]))
    return found


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
        asks="of the memory's published speed from 8,192 tokens on, forward",
        target=50,
        read=each(percent("of_hbm"), lambda row: bool(row["n"] >= 8192)),
        how="median",
        unit="%",
        parts=(*FORWARD_PARTS, "gpu-recurrence-lengths"),
    ),
    _recurrence(
        key="G4.tokens",
        asks="change of tokens a second from 8,192 to 131,072 tokens",
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
        asks="no shape slower with backward; width 256, where its gradient takes seconds, apart",
        target=1.0,
        read=over("fla", _counted),
        how="least",
        source="PERFORMANCE 8, G4b",
        parts=TRAINING_PARTS,
    ),
)

# --- routing ---------------------------------------------------------------------------------------------------------

G5 = "PERFORMANCE 8, G5"
DENSE_RIVALS = ("sdpa_cudnn", "sdpa_flash", "flash_attention")


def _break_even(rows: Rows) -> list[Found]:
    """The length from which on a pattern beats the best dense kernel, by pattern and direction."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in timed(rows):
        groups.setdefault((row["case"], row["direction"]), []).append(row)
    found = []
    for (case, direction), own in groups.items():
        gains = [(int(row["n"]), gain) for row in own if (gain := best(*DENSE_RIVALS)(row)) is not None]
        length = break_even(gains)
        if length is not None:
            found.append(Found(f"{case} {direction}", length, own[-1]))
    return found


def _direction(direction: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["direction"] == direction)


def _top16_backward(row: Row) -> bool:
    return bool(row["case"] == "top-16" and row["direction"] == "backward")


_routing = partial(
    Goal, where="gpu", suite="routing", floor=None, least=True, unit="×", source=G5, parts=("gpu-routing-16",)
)
ROUTING = (
    _routing(
        key="G5.nsa",
        asks="times NSA-Triton's top-16 at 32,768 tokens, which is given the blocks, forward",
        target=1.5,
        floor=1.2,
        read=each(stood_in("nsa_triton", "NSA-Triton", n=32768)),
        how="one value",
    ),
    *(
        _routing(
            key=f"G5.nsa.backward.{n // 1024}K",
            asks=f"times NSA-Triton's top-16 gradients at {n:,} tokens",
            target=target,
            read=each(stood_in("nsa_triton", "NSA-Triton", n=n), _top16_backward),
            how="one value",
            parts=("gpu-routing-backward",),
        )
        for n, target in ((32768, 1.5), (131072, 2.0))
    ),
    _routing(
        key="G5.dense",
        asks="times FlashAttention 2's speed at 131,072 tokens, the choice included",
        target=25,
        read=each(lambda row: speedup(row, "sdpa_flash") if row["n"] == 131072 else None),
        how="one value",
    ),
    _routing(
        key="G5.break_even",
        asks="tokens from which on it beats the best dense kernel, the choice included",
        target=8192,
        read=_break_even,
        least=False,
        how="most",
        unit="tokens",
        parts=("gpu-routing-16", "gpu-routing-8", "gpu-routing-backward", "gpu-routing-moba"),
    ),
    _routing(
        key="G5.choice",
        asks="of the call is the choice",
        target=25,
        read=each(percent("choice_share"), _direction("forward")),
        least=False,
        how="most",
        unit="%",
        parts=("gpu-routing-16", "gpu-routing-8", "gpu-routing-moba"),
    ),
)
