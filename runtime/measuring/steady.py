"""Timing with a reliability check: rounds are repeated until their minima agree, or the measurement is refused."""

from __future__ import annotations

import time
from collections.abc import Callable

from attnc.runtime.call.call_errors import MeasurementError

REPEATS, MOST_ROUNDS = 4, 12
"""Runs per round, and maximum number of rounds per measurement."""

AGREE = 1.1
"""Maximum ratio of the two smallest minima of rounds."""


class Steady:
    """A timer that keeps the largest spread of its measurements.

    Other load on the machine only adds time to a run, so the minimum of a round is the best estimate. On a busy machine
    the minima of rounds differ; more rounds are run then, and the measurement fails if no two minima agree.
    """

    def __init__(self) -> None:
        self.spread = 1.0

    def __call__(self, run: Callable[[], object], inner: int = 1) -> float:
        """Return the nanoseconds of a run, after a warm-up run. Raises MeasurementError if minima disagree."""
        run()
        minima: list[float] = []
        while len(minima) < MOST_ROUNDS:
            minima.append(min(self._sample(run, inner) for _ in range(REPEATS)))
            least, *others = sorted(minima)
            if others and others[0] <= AGREE * least:
                self.spread = max(self.spread, others[0] / least)
                return least
        raise too_busy(
            f"in {MOST_ROUNDS} rounds of the same computation no two minima agreed within {AGREE - 1:.0%} "
            f"({least / 1e3:,.1f} and {others[0] / 1e3:,.1f} µs)"
        )

    @staticmethod
    def _sample(run: Callable[[], object], inner: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(inner):
            run()
        return (time.perf_counter_ns() - start) / inner


def too_busy(reason: str) -> MeasurementError:
    """Return the error that refuses a measurement."""
    return MeasurementError(
        f"the machine is too busy to be measured: {reason}; nothing is stored: stop other programs, or give torch "
        f"no more threads than there are free cores (OMP_NUM_THREADS), and measure again"
    )
