"""Milliseconds of runs that are to be compared: in turn, warm, with caches that hold nothing of the run before.

In turn, so that a machine whose speed drifts treats all alike, and every round begins with another one.
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
"""Bytes that are written between runs on a GPU: more than any L2 of today."""

FLUSHED_ON_CPU = 8 << 20
"""The same on a CPU: what a core has to itself, and its share of what cores have together."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The timing of some samples."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


class Clock:
    """Times single runs on a device: by events where it has them, else by the wall."""

    def __init__(self, device: torch.device, flushed: int | None = None) -> None:
        """`flushed`: bytes that are written between runs."""
        self._cuda = device.type == "cuda"
        self._device = device
        otherwise = FLUSHED if self._cuda else FLUSHED_ON_CPU
        self._flushed = torch.empty(otherwise if flushed is None else flushed, dtype=torch.int8, device=device)

    def milliseconds(self, run: Run) -> float:
        """One run, after caches were overwritten."""
        with torch.cuda.device(self._device) if self._cuda else nullcontext():
            return self._timed(run)

    def _timed(self, run: Run) -> float:
        self._flushed.zero_()
        if not self._cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no type for it
        begun.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended))


LEAST, MOST = 7, 25
"""Rounds that a decision takes, and at most."""

LOOKED_AT = 3
"""Rounds after which what is far behind is left out."""

BEHIND = 1.25
"""What takes so many times the best median, at its best, is far behind."""

CHANCE = 0.01
"""How often runs that take the same time may be taken for one that is faster than the other."""


def compared(
    runs: Mapping[str, Run],
    clock: Clock,
    until: float,
    warm: Callable[[str, Run], bool],
    told: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Milliseconds of runs in turn, round by round, until a moment of `time.perf_counter`; what never ran is missing.

    `warm` runs each once before it is measured, for what is made at first use and kernels that are compiled then, and
    says whether it is to be measured. The first is measured to the end, as all are held against it; no others are begun
    with than `LEAST` rounds of all leave time for, and those are left out that are far behind.
    """
    samples: dict[str, list[float]] = {}
    for name, run in runs.items():
        taken = [own[0] / 1e3 for own in samples.values()]
        if taken and time.perf_counter() + LEAST * (sum(taken) + max(taken)) > until:
            break
        told(name)
        if warm(name, run):
            samples[name] = [clock.milliseconds(run)]
    names = list(samples)
    for i in range(1, MOST):
        if time.perf_counter() >= until or len(names) < 2:
            break
        for name in turned(names, i):
            samples[name].append(clock.milliseconds(runs[name]))
        told(f"round {i + 1}")
        if i + 1 >= LOOKED_AT:
            best = min(statistics.median(samples[name]) for name in names)
            names = [name for name in names if name == names[0] or min(samples[name]) <= BEHIND * best]
    return samples


def turned(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins with another one, as what runs before leaves its traces in the caches."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def is_faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one run is faster than another one: it won more rounds of both than two alike would by chance.

    By the sign test, on pairs of one round: what slows a machine down for a while slows both.
    """
    pairs = list(zip(one, other, strict=False))
    won = sum(a < b for a, b in pairs)
    rounds = len(pairs)
    chance = sum(comb(rounds, k) for k in range(won, rounds + 1)) / 2**rounds
    return rounds >= LEAST and chance <= CHANCE
