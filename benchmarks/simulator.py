"""The simulator against the cpu executor: predicted and measured times, the bounds, and the chosen schedule.

Its constants are measured first, by `calibrate.py`, which runs none of these patterns.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import calibrate
import exact
import torch
import torch.nn.functional as F
from benchmark_part import Row, Setting
from timing import as_json, interleaved
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.planning.build_plan import CallShape, build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.compiler.planning.recipes import alternatives
from attnc.compiler.planning.schedule import CoverChoice, CoverProblem, choose
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_shapes import dtype_name
from attnc.runtime.call.tensor_checks import input_tensors
from attnc.runtime.executors.registry import executor_named
from attnc.runtime.planning import stored_rates
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.tuning.timer import Timing

HEADS = 4
CALIBRATIONS = 5
"""Number of calibrations on dense calls before all else: predictions use the median of each rate, bounds the best."""

MOST = 6
"""Maximum number of alternative schedules that are run, those with the best predictions first."""

CHECKED = 1600
"""Maximum number of tokens for which a row is compared with the reference."""

LENGTHS, WIDTHS, DTYPES, ROUNDS = (768, 1536, 3072), (64, 128), (torch.float32, torch.bfloat16), 7


@dataclass(frozen=True)
class CpuPrediction:
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


def _drawn(number: int) -> CpuPrediction:
    """Draw a window with sinks of random sizes, which nothing here was tuned for."""
    draw = random.Random(number)
    window, sinks = draw.randint(40, 900), draw.randint(0, 60)
    return CpuPrediction(f"drawn {number}: {window} + {sinks} sinks", _of("sliding_window", window=window, sinks=sinks))


POINTS = (
    CpuPrediction("causal", _of("causal")),
    CpuPrediction("window 200", _of("sliding_window", window=200)),
    CpuPrediction("window 700 + 5 sinks", _of("sliding_window", window=700, sinks=5)),
    CpuPrediction("strided 64", _of("strided", stride=64, local=64)),
    CpuPrediction("power 128, 3", _of("power", block=128, window=3)),
    CpuPrediction("dilated 32 x 8", _of("dilated_window", window=32, dilation=8)),
    CpuPrediction("blocked 192", _of("blocked", block=192)),
    CpuPrediction("streaming", _of("streaming", window=400, sinks=8)),
    CpuPrediction("neighborhood 9 x 9", _grid(9)),
    CpuPrediction("neighborhood_1d 301", _of("neighborhood_1d", window=301)),
    CpuPrediction("document", _of("document"), _documents),
    CpuPrediction("s2", _of("s2_attention")),
    *(_drawn(number) for number in range(5)),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each point; alternative schedules are run for heads of the first width."""
    os.environ["ATTNC_CACHE_DIR"] = tempfile.mkdtemp()
    samples = calibrate.samples(1 if setting.toy else CALIBRATIONS)
    stored_rates.save(calibrate.middle(samples))
    lengths, widths, dtypes = ((768,), (64,), (torch.float32,)) if setting.toy else (LENGTHS, WIDTHS, DTYPES)
    for n, d, dtype, point in itertools.product(lengths, widths, dtypes, POINTS[:3] if setting.toy else POINTS):
        name = str(dtype).removeprefix("torch.")
        if (key := f"{point.name} n={n} d={d} {name} forward") not in setting.done:
            best = min(sample.best(name, d) for sample in samples)
            yield {"key": key} | _row(point, n, d, dtype, 1 if setting.toy else ROUNDS, best, others=d == widths[0])


def _row(point: CpuPrediction, n: int, d: int, dtype: torch.dtype, rounds: int, best: float, *, others: bool) -> Row:
    """Return a row; `best` is the least time in ns that a score element was measured to take."""
    torch.manual_seed(0)
    attention, inputs = point.attention(n), point.inputs(n)
    q, k, v = (torch.randn(1, HEADS, n, d, dtype=dtype) for _ in range(3))
    row: Row = {"pattern": point.name, "n": n, "d": d, "dtype": str(dtype).removeprefix("torch."), "heads": HEADS}
    row["direction"] = "forward"
    runs: dict[str, Callable[[], object]] = {
        "attnc": partial(attention, q, k, v, **inputs),
        "dense": partial(F.scaled_dot_product_attention, q, k, v),
    }
    with torch.no_grad():
        if n <= CHECKED:
            true = attention.reference(q.double(), k.double(), v.double(), **inputs)
            error_by_name = exact.errors({"out": attention(q, k, v, **inputs)}, {"out": true})
            row |= {"errors": error_by_name, "ok": error_by_name["out"] <= exact.TOLERANCE[dtype]}
            if not row["ok"]:
                return row
        costs = {}
        if others:
            for i, (cost, run) in enumerate(_alternatives(attention, inputs, (q, k, v))):
                runs[f"other {i}"], costs[f"other {i}"] = run, cost
        times = interleaved(runs, rounds)
    simulated = attention.simulate(n, heads=HEADS, head_dim=d, dtype=dtype, device="cpu", **inputs)
    return row | {
        "ms": {name: as_json(times[name]) for name in ("attnc", "dense")},
        "predicted": {"attnc": round(simulated.predicted_ms, 4), "dense": round(simulated.dense_ms, 4)},
        "ideal_dense_ms": round(simulated.ideal_ms, 4),
        "rungs": {rung.name: round(rung.speedup, 4) for rung in simulated.rungs},
        "bound": round(next(rung.speedup for rung in simulated.rungs if rung.name == "tile"), 4),
        "over_ideal": round(simulated.shape.pairs * best / 1e6 / times["attnc"].median, 4),
        "schedules": _schedules(times, costs),
    }


def _schedules(times: dict[str, Timing], costs: Mapping[str, float]) -> list[Row]:
    """Return the alternatives, best prediction first: the predicted cost and the least time of each.

    The first is the chosen schedule again, which shows the effect of noise.
    """
    return [{"cost": round(cost / 1e6, 4), "least_ms": round(times[name].low, 4)} for name, cost in costs.items()]


class _Other(Planner):
    """A planner that uses another schedule than the cheapest."""

    def __init__(self, planner: Planner, number: int) -> None:
        super().__init__(planner.text, planner.pattern, strict=False)
        self._number = number

    def _build(self, shape: CallShape, choice: Callable[[CoverProblem], CoverChoice] = choose) -> Plan:
        return build_plan(relations_of(self.pattern, shape), self._choose)

    def _choose(self, problem: CoverProblem) -> CoverChoice:
        choices = alternatives(problem)
        return choices[min(self._number, len(choices) - 1)]


def _alternatives(
    attention: Attention, inputs: Mapping[str, Any], operands: tuple[Tensor, Tensor, Tensor]
) -> Iterator[tuple[float, Callable[[], object]]]:
    """Yield every other schedule of a pattern with a single relation, and its predicted cost."""
    q, k, v = operands
    n, d = q.shape[2:]
    relations = attention._relations(
        attention._sizes(n, n, HEADS, HEADS, inputs, head_dim=d, dtype=dtype_name(q.dtype)), inputs
    )
    problems: list[CoverProblem] = []

    def first(problem: CoverProblem) -> CoverChoice:
        problems.append(problem)
        return alternatives(problem)[0]

    build_plan(relations, first)
    if len(problems) != 1:
        return
    costs = [choice.cost for choice in alternatives(problems[0])]
    for number, cost in enumerate(costs[:MOST]):
        planner = _Other(attention._core.planner, number)
        tensors = input_tensors(planner.pattern, inputs)
        yield cost, partial(_run, q, k, v, tensors, planner)


def _run(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], planner: Planner) -> Tensor:
    named = {tensor.name: x for tensor, x in zip(planner.pattern.tensors, tensors, strict=True)}
    call = CallArguments(q, k, v, named, named, float(q.shape[3] ** -0.5), wants_lse=False)
    return executor_named("cpu").forward(planner, call).out
