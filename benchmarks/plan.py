"""Planning alone: time and memory of the plan of a long sequence, before anything runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timing import as_json, interleaved

from attnc import compile_attention
from attnc.compiler.lowering.lower import lower
from attnc.runtime.attention import Attention
from attnc.runtime.plans import Planner

Row = dict[str, object]
Inputs = Callable[[int], dict[str, Any]]

TARGET_MS, TARGET_MB = 50.0, 64.0

DISTANCES = """
pattern distances
    visible power_of_two(abs(q - k))
"""
SEGMENTS = """
pattern segments
    input seg: int[batch, token]
    visible seg[q] == seg[k] and k <= q
"""


def documents(count: int, least: int, most: int) -> Inputs:
    """Ids of so many documents, whose lengths are from `least` to `most` in proportion and make up the tokens."""

    def ids(n: int) -> dict[str, Any]:
        torch.manual_seed(0)
        weights = torch.randint(least, most + 1, (count,), dtype=torch.float64)
        lengths = (weights * (n / weights.sum())).long()
        lengths[-1] += n - lengths.sum()
        return {"doc": torch.repeat_interleave(torch.arange(count), lengths)[None]}

    return ids


def as_segments(inputs: Inputs) -> Inputs:
    """The same ids as an attribute that the relation compares."""
    return lambda n: {"seg": inputs(n)["doc"]}


@dataclass(frozen=True)
class Case:
    """A pattern; its inputs by length; its own length where it has one; targets, None where there is none."""

    name: str
    spec: str
    params: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = lambda n: {}
    n: int | None = None
    target_ms: float | None = TARGET_MS
    target_mb: float | None = TARGET_MB


VIDEO = {"frames": 30, "height": 48, "width": 80, "window": [18, 24, 24]}
TOKENS = 806_662
"""The tokens of the 32 documents."""

CASES = (
    Case("causal", "causal"),
    Case("window 4096", "sliding_window", {"window": 4096}),
    Case("window 4096 + 7 sinks", "sliding_window", {"window": 4096, "sinks": 7}),
    Case("power, no sink", "power", {"sink": 0}),
    Case("power", "power"),
    Case("|q - k| a power of two", DISTANCES),
    Case("dilated 16 × 64", "dilated_window", {"window": 16, "dilation": 64}),
    Case("strided 128", "strided"),
    Case("video 30×48×80", "neighborhood_3d", VIDEO, n=30 * 48 * 80, target_ms=5.0),
    Case("32 documents", "document", inputs=documents(32, 1, 9), n=TOKENS, target_ms=20.0),
    Case("8192 × 1024 documents", "document", {}, documents(8192, 1, 1), 8192 * 1024, None, None),
    Case("8192 ragged documents", "document", {}, documents(8192, 512, 1536), 8192 * 1024, None, None),
    Case("8192 short documents", "document", {}, documents(8192, 1, 99), 8192 * 50, None, None),
    Case("32 documents, compared", SEGMENTS, {}, as_segments(documents(32, 1, 9)), TOKENS, None, None),
)


def rows(lengths: list[int], rounds: int) -> Iterator[Row]:
    """A row for each pattern and length: a plan that nothing has cached, its time and its peak of Python memory.

    Patterns with a length of their own are planned at that one.
    """
    todo = [(case, n) for n in lengths for case in CASES if case.n is None]
    todo += [(case, case.n) for case in CASES if case.n is not None]
    for done, (case, n) in enumerate(todo, 1):
        yield {"of": f"{done}/{len(todo)}"} | _row(case, n, rounds)


def _row(case: Case, n: int, rounds: int) -> Row:
    inputs = case.inputs(n)
    time = interleaved({"plan": partial(_Fresh(case, rounds + 1).plan, n, inputs)}, rounds, 1)["plan"]
    peak = _peak(case, n, inputs)
    plan = _compiled(case).plan(n, **inputs)  # after the timing, so that nothing of a plan is left from before
    met = [value <= target for value, target in ((time.median, case.target_ms), (peak, case.target_mb)) if target]
    return {
        "pattern": case.name,
        "n": n,
        "plan_ms": as_json(time),
        "peak_mb": round(peak, 1),
        "target_ms": case.target_ms,
        "target_mb": case.target_mb,
        "live_tiles": plan.tiles.live,
        "pieces": sum(len(group.pieces) for group in plan.groups),
        "schedule": plan.schedule,
        "verdict": ("ahead" if all(met) else "behind") if met else "no target",
    }


def _compiled(case: Case) -> Attention:
    return compile_attention(case.spec, **case.params)


class _Fresh:
    """Plans a pattern as if nothing had planned it before, each time; compiling it is not what is measured."""

    def __init__(self, case: Case, times: int) -> None:
        self._attention = _compiled(case)
        self._ready = [Planner("", lower(self._attention.bound), strict=False) for _ in range(times)]

    def plan(self, n: int, inputs: dict[str, Any]) -> None:
        self._ready.pop().plan(self._attention._sizes(n, None, 1, None, inputs), inputs)


def _peak(case: Case, n: int, inputs: dict[str, Any]) -> float:
    fresh = _Fresh(case, 1)
    tracemalloc.start()
    fresh.plan(n, inputs)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak


def line(row: Row) -> str:
    """A row for the terminal."""
    ms = row["plan_ms"]["median"]  # type: ignore[index]  # made above
    targets = [f"{row[key]:.0f} {unit}" for key, unit in (("target_ms", "ms"), ("target_mb", "MB")) if row[key]]
    target = f" (target {', '.join(targets)})" if targets else ""
    return (
        f"[{row['of']!s:>5}] {row['pattern']!s:24} n={row['n']!s:8} {ms:8.1f} ms {row['peak_mb']!s:>7} MB  "
        f"{row['pieces']!s:>5} pieces  {row['schedule']}  {row['verdict']}{target}"
    )
