"""Timing of runs that are compared: in turn, warm, with caches that hold nothing of the previous run.

Runs take turns, so that a machine whose speed drifts affects all alike, and every round begins with another run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import comb

import torch

Run = Callable[[], object]

FLUSHED = 64 << 20
"""Bytes written between runs on a GPU: more than any current L2 cache."""

FLUSHED_ON_CPU = 8 << 20
"""Bytes written between runs on a CPU: a core's private caches, and its share of the shared cache."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Return the timing of some samples."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


class Clock:
    """A timer of single runs on a device: by events where the device has them, else by wall clock."""

    def __init__(self, device: torch.device, flushed: int | None = None) -> None:
        """`flushed`: bytes that are written between runs."""
        self._cuda = device.type == "cuda"
        self._device = device
        otherwise = FLUSHED if self._cuda else FLUSHED_ON_CPU
        self._flushed = torch.empty(otherwise if flushed is None else flushed, dtype=torch.int8, device=device)

    def milliseconds(self, run: Run) -> float:
        """Return the time of one run, after caches were overwritten."""
        with torch.cuda.device(self._device) if self._cuda else nullcontext():
            return self._timed(run)

    def _timed(self, run: Run) -> float:
        self._flushed.zero_()
        if not self._cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no type for events
        begun.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended))


LEAST, MOST = 7, 25
"""Rounds that a decision takes, and at most."""

LOOKED_AT = 3
"""Number of rounds after which slow options are dropped."""

BEHIND = 1.25
"""An option is dropped if its best time exceeds this many times the best median."""

CHANCE = 0.01
"""Maximum probability that one of two equally fast runs is taken for the faster one."""


def compared(
    runs: Mapping[str, Run],
    clock: Clock,
    until: float,
    warm: Callable[[str, Run], bool],
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Return milliseconds of runs in turn, by round, until a time of `time.perf_counter`; runs not started are missing.

    `warm` runs each option once before it is measured, so that first-use objects are made and kernels compiled, and
    returns whether to measure it. The first option is measured to the end, because all are compared with it; others
    start only while time is left for `LEAST` rounds of all, and options that are far behind are dropped.
    """
    samples: dict[str, list[float]] = {}
    for name, run in runs.items():
        first_seconds = [times[0] / 1e3 for times in samples.values()]
        if first_seconds and time.perf_counter() + LEAST * (sum(first_seconds) + max(first_seconds)) > until:
            break
        report(name)
        if warm(name, run):
            samples[name] = [clock.milliseconds(run)]
    names = list(samples)
    for i in range(1, MOST):
        if time.perf_counter() >= until or len(names) < 2:
            break
        for name in turned(names, i):
            samples[name].append(clock.milliseconds(runs[name]))
        report(f"round {i + 1}")
        if i + 1 >= LOOKED_AT:
            best = min(statistics.median(samples[name]) for name in names)
            names = [name for name in names if name == names[0] or min(samples[name]) <= BEHIND * best]
    return samples


def turned(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: each begins with another run, because a run leaves traces in the caches."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def is_faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Check whether one run is faster than another: it wins more paired rounds than two equal runs would by chance.

    By the sign test, on pairs of one round: a slowdown of the machine affects both of a pair.
    """
    pairs = list(zip(one, other, strict=False))
    won = sum(a < b for a, b in pairs)
    rounds = len(pairs)
    chance = sum(comb(rounds, k) for k in range(won, rounds + 1)) / 2**rounds
    return rounds >= LEAST and chance <= CHANCE
