"""Attention to selected keys against dense causal attention; the timing includes the selection.

`choice alone` is the selection's part. Queries and keys are random, so that rows select different keys, which is the
hardest case for gathered queries; `density` is attended pairs over the pairs of the dense call. `predicted` is the
prediction of `attend.simulate` for both, at the rates of `attnc doctor --measure`, if measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import exact
import torch
from benchmark_part import Row, Setting
from timing import as_json, interleaved
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention

CASES: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("moba", {"block": 512, "topk": 3}, 4, 4),
    ("native_sparse", {}, 4, 1),
)
"""Patterns, parameters, query heads and kv heads."""

DIM = 64
LENGTHS = (4096, 8192, 16384, 32768)
ROUNDS = 3
CHECKED = 1024
"""Number of tokens of a row that are compared with the reference, which stores every pair."""
TOLERANCE = 2e-5


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each pattern, length and direction, after a check of its results."""
    for n in (1024,) if setting.toy else LENGTHS:
        for name, params, heads, kv_heads in CASES:
            for direction in ("forward", "forward+backward"):
                key = f"{name} n={n} d={DIM} float32 {direction}"
                if key not in setting.done:
                    rounds = 1 if setting.toy else ROUNDS
                    yield {"key": key} | _row(name, params, (heads, kv_heads), n, direction, rounds)


def _row(name: str, params: dict[str, Any], heads: tuple[int, int], n: int, direction: str, rounds: int) -> Row:
    torch.manual_seed(0)
    attend, trains = compile_attention(name, **params), direction != "forward"
    q = torch.randn(1, heads[0], n, DIM, requires_grad=trains)
    k, v = (torch.randn(1, heads[1], n, DIM, requires_grad=trains) for _ in range(2))
    inputs: dict[str, Any] = {"gate": torch.rand(1, n, heads[0], 3)} if name == "native_sparse" else {}
    weights = torch.randn(1, heads[0], n, DIM)
    row: Row = {"pattern": name, "params": params, "n": n, "d": DIM, "dtype": "float32", "direction": direction}
    row |= {"heads": heads[0], "kv_heads": heads[1]}
    error_by_name = _errors(attend, [x.detach()[:, :, :CHECKED] for x in (q, k, v, weights)], inputs, trains)
    row |= {"errors": error_by_name, "ok": max(error_by_name.values()) <= TOLERANCE}
    if not row["ok"]:
        return row

    def run(function: Callable[[], Tensor]) -> Callable[[], object]:
        if not trains:
            return function
        return lambda: torch.autograd.grad(function(), (q, k, v), weights)

    grouped = heads[0] > heads[1]
    dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=grouped)
    contenders: dict[str, Callable[[], object]] = {
        "attnc": run(partial(attend, q, k, v, **inputs)),
        "dense": run(dense),
    }
    if not trains:
        contenders["attnc, choice alone"] = lambda: attend.chosen(q, k, v, **inputs)
    with torch.set_grad_enabled(trains):
        times = interleaved(contenders, rounds, 1)
    row["density"] = _pairs(attend, q.detach(), k.detach(), v.detach(), inputs)
    row["predicted"] = _predicted(attend, inputs, row)
    return row | {"ms": {key: as_json(timing) for key, timing in times.items()}}


def _errors(attend: Attention, tensors: list[Tensor], inputs: dict[str, Any], trains: bool) -> dict[str, float]:
    """Return the errors of the first tokens against the reference, which selects by the same scores in fp32."""
    *operands, weights = tensors
    first_inputs = {name: x[:, : weights.shape[2]] for name, x in inputs.items()}
    return exact.errors(
        *(_results(call, operands, weights, first_inputs, trains) for call in (attend, attend.reference))
    )


def _results(
    call: Callable[..., Tensor], operands: list[Tensor], weights: Tensor, inputs: dict[str, Any], trains: bool
) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_(trains) for x in operands]
    out = call(*leaves, **inputs)
    gradients = torch.autograd.grad(out, leaves, weights) if trains else ()
    return {"out": out.detach()} | {f"d{name}": x for name, x in zip("qkv", gradients, strict=False)}


def _predicted(attend: Attention, inputs: dict[str, Any], row: Row) -> Row:
    """Return predicted milliseconds of the pattern and of dense causal attention."""
    stages: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    stages = stages if row["direction"] == "forward+backward" else stages[:1]
    size: dict[str, Any] = {"heads": row["heads"], "kv_heads": row["kv_heads"], "head_dim": row["d"]}
    ours = [attend.simulate(row["n"], device="cpu", stage=stage, **size, **inputs) for stage in stages]
    causal = compile_attention("causal")
    dense = [causal.simulate(row["n"], device="cpu", stage=stage, baseline="causal", **size) for stage in stages]
    return {"attnc": sum(x.predicted_ms for x in ours), "dense": sum(x.dense_ms for x in dense)}


def _pairs(attend: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> float:
    """Return pairs of a query and a selected key, over those of causal attention, from the sizes of blocks."""
    n = q.shape[2]
    block = attend.parameters["block"]
    assert isinstance(block, int)
    chosen = sum(int(x.sum()) // x.shape[1] for x in attend.chosen(q, k, v, **inputs).values())
    return float(chosen * block / (n * (n + 1) / 2))
