"""Rates of this machine from dense microbenchmarks: `python benchmarks/calibrate.py`, what `attnc simulate` reads.

None of them is a sparse pattern. They are the ten of `MICROBENCHMARKS`, each repeated until its least time is seen
twice; where one has several sizes or dtypes, it is one microbenchmark all the same, and `times` counts its timings.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnc.compiler.planning.choice_rates import ChoiceRates
from attnc.compiler.planning.rates import ROWS, WIDTHS, Rates
from attnc.runtime.cpu import calibration

DTYPES = 2
"""fp32 and bf16; fp16 and fp64 are taken to be like them."""


@dataclass(frozen=True)
class Microbenchmark:
    """A timed operation, how often it runs, and the rates computed from it."""

    name: str
    times: int
    rates: str


MICROBENCHMARKS = (
    Microbenchmark("dense attention of stretches of 32 to 512 rows", DTYPES * len(WIDTHS) * len(ROWS), "elements"),
    Microbenchmark("the same with an additive mask and without", 2 * DTYPES, "masked"),
    Microbenchmark("the same with few keys and with 512", 2 * DTYPES, "row"),
    Microbenchmark("a long dense call", DTYPES * len(WIDTHS), "peak"),
    Microbenchmark("dense attention, backward and forward", 2 * DTYPES, "backward"),
    Microbenchmark("dense backward with one kv head and with all", 2 * DTYPES, "alone"),
    Microbenchmark("a piece of four tokens, and eight of them", 2, "call"),
    Microbenchmark("a square piece merged by log-sum-exp, and not", 2, "merge"),
    Microbenchmark("bricks copied to where they stand together", 1, "copy"),
    Microbenchmark("primitives of choosing: ranking, sorting, gathering, adding", 16, "choices"),
)


def samples(count: int) -> list[Rates]:
    """Every microbenchmark so many times over."""
    return [calibration.measure() for _ in range(count)]


def middle(samples: Sequence[Rates]) -> Rates:
    """The median of every rate."""
    found = [asdict(one) for one in samples]
    first = found[0]
    middle: dict[str, Any] = {}
    for key, value in first.items():
        values = [one[key] for one in found]
        if isinstance(value, float):
            middle[key] = statistics.median(values)
        elif key == "elements":
            middle[key] = {
                dtype: tuple(
                    tuple(statistics.median(v[dtype][w][r] for v in values) for r in range(len(ROWS)))
                    for w in range(len(WIDTHS))
                )
                for dtype in value
            }
        elif key == "peak":
            middle[key] = {d: tuple(min(v[d][w] for v in values) for w in range(len(WIDTHS))) for d in value}
        elif isinstance(value, dict):
            middle[key] = {dtype: statistics.median(v[dtype] for v in values) for dtype in value}
        else:
            middle[key] = value
    return Rates(**{**middle, "choices": ChoiceRates(**middle["choices"])})


def main() -> int:
    """Measure and keep the rates; 1 where no folder takes them."""
    found = middle(samples(COUNT))
    kept = calibration.save(found)
    for one in MICROBENCHMARKS:
        print(f"{one.rates:9} {one.times:3} timings  {one.name}")
    print(f"kept in {calibration.rates_file()}" if kept else "not kept: no folder takes it (ATTNC_CACHE_DIR names one)")
    return 0 if kept else 1


COUNT = 5
"""Times that everything is measured; each rate is the median of its own."""

if __name__ == "__main__":
    raise SystemExit(main())
