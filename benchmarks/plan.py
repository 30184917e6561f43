"""Planning alone: time and memory of the plan of a long sequence, before anything runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any

from timing import as_json, interleaved

from attnc import compile_attention
from attnc.runtime.attention import Attention

Row = dict[str, object]

DISTANCES = """
pattern distances
    visible power_of_two(abs(q - k))
"""
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("causal", "causal", {}),
    ("window 4096", "sliding_window", {"window": 4096}),
    ("window 4096 + 7 sinks", "sliding_window", {"window": 4096, "sinks": 7}),
    ("power", "power", {}),
    ("|q - k| a power of two", DISTANCES, {}),
    ("dilated 16 × 64", "dilated_window", {"window": 16, "dilation": 64}),
    ("strided 128", "strided", {}),
)
TARGET_MS, TARGET_MB = 50.0, 64.0


def rows(lengths: list[int], rounds: int) -> Iterator[Row]:
    """A row for each pattern and length: a plan that nothing has cached, its time and its peak of Python memory."""
    for n in lengths:
        for name, spec, params in CASES:
            attention = compile_attention(spec, **params)
            plan = attention.plan(n)
            first = interleaved({"plan": partial(_Fresh(spec, params).plan, n)}, rounds, 1)["plan"]
            peak = _peak(compile_attention(spec, **params), n)
            yield {
                "pattern": name,
                "n": n,
                "plan_ms": as_json(first),
                "peak_mb": round(peak, 1),
                "live_tiles": plan.tiles.live,
                "pieces": sum(len(group.pieces) for group in plan.groups),
                "schedule": plan.schedule,
                "verdict": "ahead" if first.median <= TARGET_MS and peak <= TARGET_MB else "behind",
            }


class _Fresh:
    """Plans a spec that nothing has planned before, each time; compiling it is not what is measured."""

    def __init__(self, spec: str, params: dict[str, Any]) -> None:
        self._ready: list[Attention] = [compile_attention(spec, **params) for _ in range(32)]

    def plan(self, n: int) -> None:
        self._ready.pop().plan(n)


def _peak(attention: Attention, n: int) -> float:
    tracemalloc.start()
    attention.plan(n)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak


def line(row: Row) -> str:
    """A row for the terminal."""
    ms = row["plan_ms"]["median"]  # type: ignore[index]  # made above
    return (
        f"{row['pattern']!s:24} n={row['n']!s:8} {ms:8.1f} ms {row['peak_mb']!s:>7} MB  {row['pieces']!s:>5} pieces  "
        f"{row['schedule']}  {row['verdict']} (target {TARGET_MS:.0f} ms, {TARGET_MB:.0f} MB)"
    )
