"""Attention to chosen keys against dense causal attention: choosing is part of what is timed.

`chosen_ms` is the choice alone. Queries and keys are random, so that rows choose unlike each other, which is the
hardest case for gathered queries; `pairs` are those that are attended to, over those of the dense call. `break_even`
of a pattern and direction is the length at which both cost the same, between the two lengths around it on a
logarithmic scale. Above 1 attnc is faster. `predicted`: what `attend.simulate` says of both, at the rates that `attnc
doctor --measure` measured, if it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from timing import as_json, interleaved
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention

Row = dict[str, Any]

CASES: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("moba", {"block": 512, "topk": 3}, 4, 4),
    ("native_sparse", {}, 4, 1),
)
"""Patterns, parameters, heads and kv heads."""

DIM = 64


def rows(lengths: list[int], rounds: int, patterns: list[str] | None) -> Iterator[Row]:
    """A row for each pattern, length and direction."""
    for name, params, heads, kv_heads in CASES:
        if patterns is None or any(part in name for part in patterns):
            for n in lengths:
                for backward in (False, True):
                    yield _row(name, params, heads, kv_heads, n, backward, rounds)


def _row(name: str, params: dict[str, Any], heads: int, kv_heads: int, n: int, backward: bool, rounds: int) -> Row:
    torch.manual_seed(0)
    attend = compile_attention(name, **params)
    q = torch.randn(1, heads, n, DIM, requires_grad=backward)
    k, v = (torch.randn(1, kv_heads, n, DIM, requires_grad=backward) for _ in range(2))
    inputs: dict[str, Any] = {"gate": torch.rand(1, n, heads, 3)} if name == "native_sparse" else {}
    weights = torch.randn(1, heads, n, DIM)

    def ours() -> Tensor:
        out: Tensor = attend(q, k, v, **inputs)
        return out

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > kv_heads)

    def run(function: Callable[[], Tensor]) -> Callable[[], object]:
        if not backward:
            return function
        return lambda: torch.autograd.grad(function(), (q, k, v), weights)

    contenders: dict[str, Callable[[], object]] = {"attnc": run(ours), "dense": run(dense)}
    if not backward:
        contenders["chosen"] = lambda: attend.chosen(q, k, v, **inputs)
    with torch.set_grad_enabled(backward):
        found = interleaved(contenders, rounds)
    row: Row = {"pattern": name, "params": params, "n": n, "heads": heads, "kv_heads": kv_heads, "head_dim": DIM}
    row["direction"] = "forward+backward" if backward else "forward"
    row["pairs"] = _pairs(attend, q.detach(), k.detach(), v.detach(), inputs)
    row |= {f"{key}_ms": as_json(timing) for key, timing in found.items()}
    row["predicted"] = _predicted(attend, inputs, row)
    return row | {"dense_over_attnc": found["dense"].median / found["attnc"].median}


def _predicted(attend: Attention, inputs: dict[str, Any], row: Row) -> Row:
    """Milliseconds of the pattern and of dense causal attention."""
    stages: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    stages = stages if row["direction"] == "forward+backward" else stages[:1]
    size: dict[str, Any] = {key: row[key] for key in ("heads", "kv_heads", "head_dim")}
    ours = [attend.simulate(row["n"], device="cpu", stage=stage, **size, **inputs) for stage in stages]
    causal = compile_attention("causal")
    dense = [causal.simulate(row["n"], device="cpu", stage=stage, baseline="causal", **size) for stage in stages]
    return {"attnc_ms": sum(x.predicted_ms for x in ours), "dense_ms": sum(x.dense_ms for x in dense)}


def _pairs(attend: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> float:
    """Pairs of a query and a chosen key, over those of causal attention: by the sizes of blocks."""
    n = q.shape[2]
    block = attend.parameters["block"]
    assert isinstance(block, int)
    chosen = sum(int(x.sum()) // x.shape[1] for x in attend.chosen(q, k, v, **inputs).values())
    return float(chosen * block / (n * (n + 1) / 2))


def line(row: Row) -> str:
    """A row as text."""
    ours, dense = (row[f"{key}_ms"]["median"] for key in ("attnc", "dense"))
    chosen = f"  choosing {row['chosen_ms']['median']:8.1f} ms" if "chosen_ms" in row else ""
    return (
        f"{row['pattern']:15} n={row['n']:6} {row['direction']:17} attnc {ours:9.1f} ms  dense {dense:9.1f} ms  "
        f"{row['dense_over_attnc']:5.2f}×  predicted {row['predicted']['attnc_ms']:9.1f} and "
        f"{row['predicted']['dense_ms']:9.1f} ms  pairs {row['pairs']:.3f}{chosen}"
    )


def summary(done: list[Row]) -> Row:
    """By pattern and direction: the gain at the longest length, and where both cost the same."""
    found: Row = {}
    for pattern in dict.fromkeys(row["pattern"] for row in done):
        for direction in dict.fromkeys(row["direction"] for row in done):
            mine = [row for row in done if row["pattern"] == pattern and row["direction"] == direction]
            if mine:
                longest = max(mine, key=lambda row: int(row["n"]))
                own: Row = {"n": longest["n"], "dense_over_attnc": round(longest["dense_over_attnc"], 2)}
                predicted = [(row["n"], row["predicted"]["dense_ms"] / row["predicted"]["attnc_ms"]) for row in mine]
                own["break_even"] = _break_even([(row["n"], row["dense_over_attnc"]) for row in mine])
                found[f"{pattern} {direction}"] = own | {"predicted_break_even": _break_even(predicted)}
    return found


def _break_even(gains: list[tuple[int, float]]) -> float | None:
    """The length at which both take as long, of lengths and gains; None where one is faster everywhere."""
    points = sorted((float(n), math.log(gain)) for n, gain in gains)
    for (a, low), (b, high) in pairwise(points):
        if low < 0 <= high:
            return round(math.exp(math.log(a) + (math.log(b) - math.log(a)) * -low / (high - low)))
    return None
