"""The simulator against the cpu executor: predicted and measured times, the bounds, and the schedule that was chosen.

Its constants are measured first, on dense calls alone (`attnc doctor --measure`); none of these patterns is among them.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import as_json, interleaved
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.planning.build_plan import CallShape, build_plan
from attnc.compiler.planning.plan import Plan
from attnc.compiler.planning.rates import ROWS, WIDTHS, Rates
from attnc.compiler.planning.recipes import alternatives
from attnc.compiler.planning.schedule import Choice, Problem, choose
from attnc.runtime.attention import Attention
from attnc.runtime.call import input_tensors
from attnc.runtime.cpu import calibration
from attnc.runtime.operators import plain
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.tuning.timer import Timing

Row = dict[str, object]

HEADS = 4
CALIBRATIONS = 5
"""Of dense calls, before anything else: predictions take the median of each rate, bounds the best."""

MOST = 6
"""Alternatives of a schedule that are run, of those that are predicted to be the fastest."""

CHECKED = 1600
"""Up to so many tokens a row is held against the reference first."""

ALLOWED = 1.02
"""What a measurement may be above a bound."""


@dataclass(frozen=True)
class Point:
    """A pattern, by length."""

    name: str
    attention: Callable[[int], Attention]
    inputs: Callable[[int], Mapping[str, Any]] = field(default=lambda n: {})


def _of(name: str, **params: Any) -> Callable[[int], Attention]:
    return lambda n: compile_attention(name, **params)


def _grid(window: int) -> Callable[[int], Attention]:
    return lambda n: compile_attention("neighborhood_2d", height=n // 48, width=48, window=window)


def _documents(n: int) -> Mapping[str, Any]:
    return {"doc": (torch.arange(n) * 5 // n)[None]}


POINTS = (
    Point("causal", _of("causal")),
    Point("window 200", _of("sliding_window", window=200)),
    Point("window 700 + 5 sinks", _of("sliding_window", window=700, sinks=5)),
    Point("strided 64", _of("strided", stride=64, local=64)),
    Point("power 128, 3", _of("power", block=128, window=3)),
    Point("dilated 32 x 8", _of("dilated_window", window=32, dilation=8)),
    Point("blocked 192", _of("blocked", block=192)),
    Point("streaming", _of("streaming", window=400, sinks=8)),
    Point("neighborhood 9 x 9", _grid(9)),
    Point("neighborhood_1d 301", _of("neighborhood_1d", window=301)),
    Point("document", _of("document"), _documents),
    Point("s2", _of("s2_attention")),
)


def rows(lengths: list[int], head_dims: list[int], dtypes: list[torch.dtype], rounds: int) -> Iterator[Row]:
    """A row for each point; the schedules beside the chosen one are run for heads of the first dimension."""
    os.environ["ATTNC_CACHE_DIR"] = tempfile.mkdtemp()
    samples = [calibration.measure() for _ in range(CALIBRATIONS)]
    calibration.save(_middle(samples))
    for n, d, dtype, point in itertools.product(lengths, head_dims, dtypes, POINTS):
        yield _row(point, n, d, dtype, rounds, _best(samples, dtype, d), others=d == head_dims[0])


def _middle(samples: list[Rates]) -> Rates:
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
    return Rates(**middle)


def _best(samples: list[Rates], dtype: torch.dtype, d: int) -> float:
    """The best rate of an element that was ever measured, in ns."""
    name = str(dtype).removeprefix("torch.")
    return min(one.best(name, d) for one in samples)


def _row(point: Point, n: int, d: int, dtype: torch.dtype, rounds: int, best: float, *, others: bool) -> Row:
    torch.manual_seed(0)
    attention, inputs = point.attention(n), point.inputs(n)
    q, k, v = (torch.randn(1, HEADS, n, d, dtype=dtype) for _ in range(3))
    found = attention.simulate(n, heads=HEADS, head_dim=d, dtype=dtype, device="cpu", **inputs)
    runs: dict[str, Callable[[], object]] = {
        "attnc": partial(attention, q, k, v, **inputs),
        "dense": partial(F.scaled_dot_product_attention, q, k, v),
    }
    costs = {}
    if others:
        for i, (cost, run) in enumerate(_alternatives(attention, inputs, (q, k, v))):
            runs[f"other {i}"], costs[f"other {i}"] = run, cost
    with torch.no_grad():
        if n <= CHECKED:
            exact = attention.reference(q, k, v, **inputs)
            error = (attention(q, k, v, **inputs).float() - exact.float()).abs().max().item()
            assert error < 0.05, f"{point.name} is off by {error}"
        times = interleaved(runs, rounds)
    return {
        "pattern": point.name,
        "n": n,
        "head_dim": d,
        "dtype": str(dtype).removeprefix("torch."),
        "predicted_ms": round(found.predicted_ms, 4),
        **{f"{name}_ms": as_json(times[name]) for name in ("attnc", "dense")},
        "dense_predicted_ms": round(found.dense_ms, 4),
        "ideal_dense_ms": round(found.ideal_ms, 4),
        "rungs": {rung.name: round(rung.speedup, 4) for rung in found.rungs},
        "speedup": round(times["dense"].median / times["attnc"].median, 4),
        "speedup_over_ideal": round(found.shape.pairs * best / 1e6 / times["attnc"].median, 4),
        "schedules": _schedules(times, costs),
    }


def _schedules(times: dict[str, Timing], costs: Mapping[str, float]) -> list[Row]:
    """The alternatives, by falling promise: what each was predicted to cost and the least of its rounds.

    The first is the chosen one once more, so that it can be seen what noise does to it.
    """
    return [{"cost": round(cost / 1e6, 4), "least_ms": round(times[name].low, 4)} for name, cost in costs.items()]


def chosen_over_best(row: Row) -> float | None:
    """How far the chosen schedule, which was run twice, is from the fastest that was tried."""
    tried: Any = row["schedules"]
    ours: Any = row["attnc_ms"]
    if not tried:
        return None
    chosen = min(ours["low"], tried[0]["least_ms"])
    return float(chosen / min(chosen, *(one["least_ms"] for one in tried)))


class _Other(Planner):
    """A planner that takes another schedule than the cheapest."""

    def __init__(self, own: Planner, number: int) -> None:
        super().__init__(own.text, own.pattern, strict=False)
        self._number = number

    def _build(self, shape: CallShape, choice: Callable[[Problem], Choice] = choose) -> Plan:
        return build_plan(relations_of(self.pattern, shape), self._choose)

    def _choose(self, problem: Problem) -> Choice:
        found = alternatives(problem)
        return found[min(self._number, len(found) - 1)]


def _alternatives(
    attention: Attention, inputs: Mapping[str, Any], operands: tuple[Tensor, Tensor, Tensor]
) -> Iterator[tuple[float, Callable[[], object]]]:
    """Every other schedule of a pattern whose relation is one, with what it is predicted to cost."""
    q, k, v = operands
    n, d = q.shape[2:]
    relations = attention._relations(attention._sizes(n, n, HEADS, HEADS, inputs, head_dim=d, dtype=q.dtype), inputs)
    problems: list[Problem] = []

    def first(problem: Problem) -> Choice:
        problems.append(problem)
        return alternatives(problem)[0]

    build_plan(relations, first)
    if len(problems) != 1:
        return
    costs = [choice.cost for choice in alternatives(problems[0])]
    for number, cost in enumerate(costs[:MOST]):
        planner = _Other(attention._planner, number)
        tensors = input_tensors(planner.pattern, inputs)
        yield cost, partial(_run, q, k, v, tensors, planner)


def _run(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], planner: Planner) -> Tensor:
    return plain.attend(q, k, v, tensors, planner, None, return_lse=False)[0]


def line(row: Row) -> str:
    """A row in a line."""
    rungs: Any = row["rungs"]
    ours: Any = row["attnc_ms"]
    chosen = chosen_over_best(row)
    best = "" if chosen is None else f"  chosen {chosen:.2f} of best"
    return (
        f"{row['pattern']!s:22} n={row['n']!s:5} d={row['head_dim']!s:4} {row['dtype']!s:9} predicted "
        f"{row['predicted_ms']!s:>9} ms, measured {ours['median']:9.2f} ms; bound {rungs['tile']:6.2f}×, "
        f"reached {row['speedup']!s}×{best}"
    )


def summary(done: list[Row]) -> Row:
    """The aims beside what was measured."""
    errors = sorted(abs(_predicted(row) / _measured(row) - 1) for row in done)
    chosen = [x for x in map(chosen_over_best, done) if x is not None]
    twice = [x for x in map(_twice, done) if x is not None]
    over = [row for row in done if _over(row, "speedup_over_ideal")]
    return {
        "points": len(done),
        "absolute error, median (aim 0.15)": round(statistics.median(errors), 4),
        "absolute error, 90 % of points below": round(errors[int(0.9 * (len(errors) - 1))], 4),
        "predicted over measured, median": round(statistics.median(_predicted(r) / _measured(r) for r in done), 4),
        "Kendall's tau of predicted and measured times (aim 0.8)": _tau([(_predicted(r), _measured(r)) for r in done]),
        "Kendall's tau of predicted and measured speedups": _tau(
            [(float(str(r["dense_predicted_ms"])) / _predicted(r), float(str(r["speedup"]))) for r in done]
        ),
        "chosen schedule within 5 % of the best tried, share (aim 0.9)": (
            round(sum(x <= 1.05 for x in chosen) / len(chosen), 4) if chosen else None
        ),
        "the chosen schedule against itself, within 5 %, share": (
            round(sum(x <= 1.05 for x in twice) / len(twice), 4) if twice else None
        ),
        f"bound passed by more than {ALLOWED - 1:.0%} over ideal dense (none allowed)": [_name(row) for row in over],
        f"bound passed by more than {ALLOWED - 1:.0%} over dense as it ran": [
            _name(row) for row in done if _over(row, "speedup")
        ],
        "farthest off": [_name(r) for r in sorted(done, key=lambda r: -abs(_predicted(r) / _measured(r) - 1))[:8]],
    }


def _over(row: Row, key: str) -> bool:
    rungs: Any = row["rungs"]
    return bool(float(str(row[key])) > ALLOWED * rungs["tile"])


def _twice(row: Row) -> float | None:
    """How far apart two runs of the chosen schedule are."""
    tried: Any = row["schedules"]
    ours: Any = row["attnc_ms"]
    if not tried:
        return None
    two = sorted((ours["low"], tried[0]["least_ms"]))
    return float(two[1] / two[0])


def _predicted(row: Row) -> float:
    return float(str(row["predicted_ms"]))


def _measured(row: Row) -> float:
    ours: Any = row["attnc_ms"]
    return float(ours["median"])


def _tau(pairs: list[tuple[float, float]]) -> float | None:
    """The share of pairs of points in the same order less that of those that are not."""
    found = [
        math.copysign(1, (a - c) * (b - d)) for (a, b), (c, d) in itertools.combinations(pairs, 2) if a != c and b != d
    ]
    return round(statistics.mean(found), 4) if found else None


def _name(row: Row) -> str:
    rungs: Any = row["rungs"]
    ratio = _predicted(row) / _measured(row)
    return (
        f"{row['pattern']}, n={row['n']}, d={row['head_dim']}, {row['dtype']}: predicted {ratio:.2f} of measured; "
        f"bound {rungs['tile']:.2f}, reached {row['speedup']} over dense, {row['speedup_over_ideal']} over ideal dense"
    )
