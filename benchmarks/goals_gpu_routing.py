"""The goals for selections on a GPU (PERFORMANCE 8, G5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmark_part import Row
from goals import Goal, Measurement, Rows
from goals_gpu_masks import best, percent, stood_in
from measures import break_even, each, speedup, timed

G5 = "PERFORMANCE 8, G5"
DENSE_RIVALS = ("sdpa_cudnn", "sdpa_flash", "flash_attention")


def _break_even(rows: Rows) -> list[Measurement]:
    """Return the break-even length with the best dense kernel, by pattern and direction."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in timed(rows):
        groups.setdefault((row["case"], row["direction"]), []).append(row)
    measurements = []
    for (case, direction), group in groups.items():
        gains = [(int(row["n"]), gain) for row in group if (gain := best(*DENSE_RIVALS)(row)) is not None]
        length = break_even(gains)
        if length is not None:
            measurements.append(Measurement(f"{case} {direction}", length, group[-1]))
    return measurements


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
        asks="times the speed of NSA-Triton's top-16 with given blocks at 32,768 tokens, forward",
        target=1.5,
        floor=1.2,
        read=each(stood_in("nsa_triton", "NSA-Triton", n=32768)),
        how="one value",
    ),
    *(
        _routing(
            key=f"G5.nsa.backward.{n // 1024}K",
            asks=f"times the speed of NSA-Triton's top-16 gradients at {n:,} tokens",
            target=target,
            read=each(stood_in("nsa_triton", "NSA-Triton", n=n), _top16_backward),
            how="one value",
            parts=("gpu-routing-backward",),
        )
        for n, target in ((32768, 1.5), (131072, 2.0))
    ),
    _routing(
        key="G5.dense",
        asks="times FlashAttention 2's speed at 131,072 tokens, selection included",
        target=25,
        read=each(lambda row: speedup(row, "sdpa_flash") if row["n"] == 131072 else None),
        how="one value",
    ),
    _routing(
        key="G5.break_even",
        asks="length from which selected keys beat the best dense kernel, selection included",
        target=8192,
        read=_break_even,
        least=False,
        how="most",
        unit="tokens",
        parts=("gpu-routing-16", "gpu-routing-8", "gpu-routing-backward", "gpu-routing-moba"),
    ),
    _routing(
        key="G5.choice",
        asks="share of the call spent on the selection",
        target=25,
        read=each(percent("choice_share"), _direction("forward")),
        least=False,
        how="most",
        unit="%",
        parts=("gpu-routing-16", "gpu-routing-8", "gpu-routing-moba"),
    ),
)
