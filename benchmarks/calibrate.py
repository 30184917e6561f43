"""Measure this machine's rates with dense microbenchmarks, for `attnc simulate`: `python benchmarks/calibrate.py`.

None of the ten `MICROBENCHMARKS` is a sparse pattern. Each is repeated until its least time occurs twice; one with
several sizes or dtypes counts as one microbenchmark, and `times` counts its timings.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnc.compiler.planning.rates import ROWS, WIDTHS, ChoiceRates, Rates
from attnc.runtime.measuring import calibration
from attnc.runtime.planning import stored_rates

DTYPES = 2
"""Number of dtypes: fp32 and bf16, whose rates fp16 and fp64 are assumed to share."""


@dataclass(frozen=True)
class Microbenchmark:
    """A timed operation, how often it runs, and the rates computed from it."""

    name: str
    times: int
    rates: str


MICROBENCHMARKS = (
    Microbenchmark("dense attention of 32 to 512 consecutive rows", DTYPES * len(WIDTHS) * len(ROWS), "elements"),
    Microbenchmark("dense attention with and without an additive mask", 2 * DTYPES, "masked"),
    Microbenchmark("dense attention with few keys and with 512", 2 * DTYPES, "row"),
    Microbenchmark("a long dense call", DTYPES * len(WIDTHS), "peak"),
    Microbenchmark("dense attention, backward and forward", 2 * DTYPES, "backward"),
    Microbenchmark("dense backward with one kv head and with all", 2 * DTYPES, "alone"),
    Microbenchmark("one piece of four tokens, and eight pieces", 2, "call"),
    Microbenchmark("a square piece with and without a merge by log-sum-exp", 2, "merge"),
    Microbenchmark("bricks copied into contiguous memory", 1, "copy"),
    Microbenchmark("primitives of selections: ranking, sorting, gathering, adding", 16, "choices"),
)


def samples(count: int) -> list[Rates]:
    """Run every microbenchmark `count` times."""
    return [calibration.measure() for _ in range(count)]


def middle(samples: Sequence[Rates]) -> Rates:
    """Return the median of every rate."""
    rates = [asdict(sample) for sample in samples]
    first = rates[0]
    middle: dict[str, Any] = {}
    for key, value in first.items():
        values = [sample[key] for sample in rates]
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
    """Measure and keep the rates; return 1 if no folder can hold them."""
    rates = middle(samples(COUNT))
    kept = stored_rates.save(rates)
    for benchmark in MICROBENCHMARKS:
        print(f"{benchmark.rates:9} {benchmark.times:3} timings  {benchmark.name}")
    print(
        f"kept in {stored_rates.rates_file()}" if kept else "not kept: no cache folder is writable; set ATTNC_CACHE_DIR"
    )
    return 0 if kept else 1


COUNT = 5
"""Number of times that everything is measured; each rate is a median of its own."""

if __name__ == "__main__":
    raise SystemExit(main())
