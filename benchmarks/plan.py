"""Planning: time and memory of the plan of a long sequence before any call, and its share in the call that follows."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from benchmark_part import Row, Setting
from timing import as_json, interleaved

from attnc import compile_attention
from attnc.compiler.lowering.lower import lower
from attnc.runtime.api.attention import Attention
from attnc.runtime.executors.cpu.cpu_plans import CpuPlans
from attnc.runtime.planning.plans import Planner

Inputs = Callable[[int], dict[str, Any]]

MILLION, ROUNDS = 1 << 20, 7

DISTANCES = """
pattern distances
    visible power_of_two(abs(q - k))
"""
SEGMENTS = """
pattern segments
    input seg: int[batch, token]
    visible seg[q] == seg[k] and k <= q
"""


def documents(count: int, least: int, greatest: int) -> Inputs:
    """Draw the ids of `count` documents with lengths in proportion to numbers from `least` to `most`."""

    def ids(n: int) -> dict[str, Any]:
        torch.manual_seed(0)
        weights = torch.randint(least, greatest + 1, (count,), dtype=torch.float64)
        lengths = (weights * (n / weights.sum())).long()
        lengths[-1] += n - lengths.sum()
        return {"doc": torch.repeat_interleave(torch.arange(count), lengths)[None]}

    return ids


def as_segments(inputs: Inputs) -> Inputs:
    """Return document ids as an attribute that the relation compares."""
    return lambda n: {"seg": inputs(n)["doc"]}


@dataclass(frozen=True)
class PlanCase:
    """A pattern; its inputs by length; its own length if it has one; its own target in ms."""

    name: str
    spec: str
    params: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = lambda n: {}
    n: int | None = None
    aim_ms: float | None = None


VIDEO = {"frames": 30, "height": 48, "width": 80, "window": [18, 24, 24]}
TOKENS = 806_662
"""The number of tokens of the 32 documents."""

CASES = (
    PlanCase("causal", "causal"),
    PlanCase("window 4096", "sliding_window", {"window": 4096}),
    PlanCase("window 4096 + 7 sinks", "sliding_window", {"window": 4096, "sinks": 7}),
    PlanCase("power, no sink", "power", {"sink": 0}),
    PlanCase("power", "power"),
    PlanCase("|q - k| a power of two", DISTANCES),
    PlanCase("dilated 16 × 64", "dilated_window", {"window": 16, "dilation": 64}),
    PlanCase("strided 128", "strided"),
    PlanCase("video 30×48×80", "neighborhood_3d", VIDEO, n=30 * 48 * 80, aim_ms=5.0),
    PlanCase("32 documents", "document", inputs=documents(32, 1, 9), n=TOKENS, aim_ms=20.0),
    PlanCase("8192 × 1024 documents", "document", {}, documents(8192, 1, 1), 8192 * 1024),
    PlanCase("8192 ragged documents", "document", {}, documents(8192, 512, 1536), 8192 * 1024),
    PlanCase("8192 short documents", "document", {}, documents(8192, 1, 99), 8192 * 50),
    PlanCase("32 documents, compared", SEGMENTS, {}, as_segments(documents(32, 1, 9)), TOKENS),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each pattern: uncached plans, their time and peak of Python memory; then `shares`."""
    for case in CASES:
        n = case.n or MILLION
        if setting.toy and n > MILLION:
            continue
        if (key := f"plan of {case.name} n={n}") not in setting.done:
            yield {"key": key} | _row(case, n, 1 if setting.toy else ROUNDS)
    yield from _shares(setting)


def _row(case: PlanCase, n: int, rounds: int) -> Row:
    inputs = case.inputs(n)
    time = interleaved({"plan": partial(_Fresh(case, rounds + 1).plan, n, inputs)}, rounds, 1)["plan"]
    peak = _peak(case, n, inputs)
    plan = _compiled(case).plan(n, **inputs)  # after the timing, so that no cached plan was left from before
    return {
        "pattern": case.name,
        "n": n,
        "ms": {"attnc": as_json(time)},
        "peak_mb": round(peak, 1),
        "aim_ms": case.aim_ms,
        "live_tiles": plan.tiles.live,
        "pieces": sum(len(group.pieces) for group in plan.groups),
        "schedule": plan.schedule,
    }


SHARED = ("window 4096", "window 4096 + 7 sinks", "power", "32 documents, compared")


def _shares(setting: Setting) -> Iterator[Row]:
    """Measure planning as a share of one forward call, 4 heads of 64 in fp32, which includes its plan."""
    for case in (case for case in CASES if case.name in SHARED):
        for n in (2048,) if setting.toy else (8192, 32768):
            if (key := f"plan and call of {case.name} n={n}") in setting.done:
                continue
            torch.manual_seed(0)
            inputs, rounds = case.inputs(n), 1 if setting.toy else ROUNDS
            q, k, v = (torch.randn(1, 4, n, 64) for _ in range(3))
            plan = partial(_Fresh(case, rounds + 1).plan, n, inputs)
            call = partial(_compiled(case), q, k, v, **inputs)
            with torch.no_grad():
                times = interleaved({"attnc": call, "attnc, plan alone": plan}, rounds, 1)
            ms = {name: as_json(time) for name, time in times.items()}
            yield {"key": key, "pattern": case.name, "n": n, "d": 64, "direction": "forward", "ms": ms}


def _compiled(case: PlanCase) -> Attention:
    return compile_attention(case.spec, **case.params)


class _Fresh:
    """Plans a pattern without any cached plan, each time; compilation is not measured."""

    def __init__(self, case: PlanCase, times: int) -> None:
        self._attention = _compiled(case)
        self._ready = [CpuPlans(Planner("", lower(self._attention.bound), strict=False)) for _ in range(times)]

    def plan(self, n: int, inputs: dict[str, Any]) -> None:
        self._ready.pop().plan(self._attention._sizes(n, None, 1, None, inputs), inputs)


def _peak(case: PlanCase, n: int, inputs: dict[str, Any]) -> float:
    fresh = _Fresh(case, 1)
    tracemalloc.start()
    fresh.plan(n, inputs)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak
