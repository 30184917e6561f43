"""Bytes of CPU tensors that a call allocates: still allocated after it, and at the peak.

torch's profiler records every allocation and release of its allocator; numpy's arrays are not included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Measured:
    """Bytes beyond those allocated before the call: `kept` after it, `peak` during it, and its return value."""

    kept: int
    peak: int
    result: Any


def measured(call: Callable[[], Any]) -> Measured:
    """Measure the memory that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Measured(now, peak, result)


def bytes_of(*tensors: Any) -> int:
    """Return the size of tensors in bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)
