"""Patterns with their own scores, weights, keys or branches against the dense reference of the same text.

The reference is a direct implementation in torch of all pairs at once; `dense` is its time. In fp64 it is the truth for
the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import exact
import torch
from benchmark_part import Row, Setting
from timing import as_json, interleaved
from torch import Tensor

from attnc import compile_attention

HEADS, DIM = 4, 64
ROUNDS = 5


@dataclass(frozen=True)
class WeightCase:
    """A pattern; parameters and inputs by length, and its maximum length."""

    name: str
    params: Callable[[int], dict[str, Any]] = lambda n: {}
    inputs: Callable[[int], dict[str, Tensor]] = lambda n: {}
    most: int = 1600


def _tables(span: int) -> dict[str, Tensor]:
    return {name: torch.randn(span, DIM) for name in ("row", "col")}


def _global(n: int) -> dict[str, Tensor]:
    global_inputs = {name: torch.randn(1, HEADS, n, DIM) for name in ("qg", "kg", "vg")}
    return {"is_global": torch.arange(n)[None] % 512 == 0, **global_inputs}


CASES = (
    WeightCase("alibi"),
    WeightCase("fox", inputs=lambda n: {"f": -torch.rand(1, n, HEADS)}),
    WeightCase("softcap", lambda n: {"window": 512}),
    WeightCase("gpt_oss", inputs=lambda n: {"sink": torch.zeros(HEADS)}),
    WeightCase("differential", inputs=lambda n: {"lambda_": torch.rand(HEADS)}),
    WeightCase("softplus_lssa"),
    WeightCase("softplus_lssar"),
    WeightCase("landmark", most=1024),  # both take seconds per call
    WeightCase("combiner", lambda n: {"segment": int(n**0.5)}),
    WeightCase("monarch", lambda n: {"rows": int(n**0.5), "cols": int(n**0.5)}),
    WeightCase("davit_window", lambda n: {"height": int(n**0.5), "width": int(n**0.5)}),
    WeightCase("halo", lambda n: {"height": int(n**0.5), "width": int(n**0.5)}, lambda n: _tables(21)),
    WeightCase("longformer", lambda n: {"window": 128, "dilation": [1] * HEADS}, _global),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each pattern, length and direction."""
    for n in (64,) if setting.toy else (1024, 1600):
        for case in (case for case in CASES if n <= case.most):
            for direction in ("forward", "forward+backward"):
                key = f"{case.name} n={n} d={DIM} float32 {direction}"
                if key not in setting.done:
                    yield {"key": key} | _row(case, n, direction, 1 if setting.toy else ROUNDS)


def _row(case: WeightCase, n: int, direction: str, rounds: int) -> Row:
    torch.manual_seed(0)
    attend: Any = compile_attention(case.name, **case.params(n))
    inputs = case.inputs(n)
    q, k, v = (torch.randn(1, HEADS, n, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, HEADS, n, DIM)
    row: Row = {"pattern": case.name, "n": n, "d": DIM, "dtype": "float32", "heads": HEADS, "direction": direction}
    trains = direction != "forward"
    true = _results(attend.reference, [x.detach().double() for x in (q, k, v)], _wide(inputs), grad.double(), trains)
    error_by_name = exact.errors(_results(attend, [x.detach() for x in (q, k, v)], inputs, grad, trains), true)
    row |= {"errors": error_by_name, "ok": max(error_by_name.values()) <= exact.TOLERANCE[torch.float32]}
    if not row["ok"]:
        return row

    def run(call: Callable[..., Tensor]) -> None:
        out = call(q, k, v, **inputs)
        if trains:
            torch.autograd.grad(out, (q, k, v), grad, allow_unused=True)

    with torch.set_grad_enabled(trains):
        times = interleaved({"attnc": partial(run, attend), "dense": partial(run, attend.reference)}, rounds, 1)
    plan = attend.plan(n, heads=HEADS, **{name: inputs[name] for name in attend.relation_inputs})
    how = list(plan.reasons)[:1] if not plan.branches else [f"{len(plan.branches)} branches"]
    return row | {"ms": {name: as_json(time) for name, time in times.items()}, "how": how}


def _wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def _results(
    call: Callable[..., Tensor], operands: list[Tensor], inputs: dict[str, Tensor], grad: Tensor, trains: bool
) -> dict[str, Tensor]:
    """Return `out`, and in training the gradients of the operands on which it depends."""
    leaves = [x.requires_grad_(trains) for x in operands]
    out = call(*leaves, **inputs)
    results_by_name = {"out": out.detach()}
    if trains:
        gradients: Sequence[Tensor | None] = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        results_by_name |= {f"d{name}": x for name, x in zip("qkv", gradients, strict=True) if x is not None}
    return results_by_name
