"""Patterns with scores, weights, keys or branches of their own against the dense reference from the same text.

The reference is what one would write in torch: every pair, all at once. Above 1 attnc is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import as_json, interleaved, once
from torch import Tensor

from attnc import compile_attention

Row = dict[str, Any]

HEADS, DIM = 4, 64
MOST_DENSE = 4096
"""Past this many tokens the reference takes more memory than the machine has."""


@dataclass(frozen=True)
class Case:
    """A pattern; parameters and inputs by length."""

    name: str
    params: Callable[[int], dict[str, Any]] = lambda n: {}
    inputs: Callable[[int], dict[str, Tensor]] = lambda n: {}


def _tables(span: int) -> dict[str, Tensor]:
    return {name: torch.randn(span, DIM) for name in ("row", "col")}


def _global(n: int) -> dict[str, Tensor]:
    own = {name: torch.randn(1, HEADS, n, DIM) for name in ("qg", "kg", "vg")}
    return {"is_global": torch.arange(n)[None] % 512 == 0, **own}


CASES = (
    Case("alibi"),
    Case("fox", inputs=lambda n: {"f": -torch.rand(1, n, HEADS)}),
    Case("softcap", lambda n: {"window": 512}),
    Case("gpt_oss", inputs=lambda n: {"sink": torch.zeros(HEADS)}),
    Case("differential", inputs=lambda n: {"lambda_": torch.rand(HEADS)}),
    Case("softplus_lssa"),
    Case("softplus_lssar"),
    Case("landmark"),
    Case("combiner", lambda n: {"segment": int(n**0.5)}),
    Case("monarch", lambda n: {"rows": int(n**0.5), "cols": int(n**0.5)}),
    Case("davit_window", lambda n: {"height": int(n**0.5), "width": int(n**0.5)}),
    Case("halo", lambda n: {"height": int(n**0.5), "width": int(n**0.5)}, lambda n: _tables(21)),
    Case("longformer", lambda n: {"window": 128, "dilation": [1] * HEADS}, _global),
)


def rows(lengths: list[int], rounds: int, patterns: list[str] | None) -> Iterator[Row]:
    """A row for each pattern, length and direction."""
    for n in lengths:
        for case in CASES:
            if patterns is None or any(part in case.name for part in patterns):
                yield from _rows(case, n, rounds)


def _rows(case: Case, n: int, rounds: int) -> Iterator[Row]:
    torch.manual_seed(0)
    attend: Any = compile_attention(case.name, **case.params(n))
    inputs = case.inputs(n)
    q, k, v = (torch.randn(1, HEADS, n, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, HEADS, n, DIM)

    def both(call: Callable[..., Tensor]) -> None:
        torch.autograd.grad(call(q, k, v, **inputs), (q, k, v), grad, allow_unused=True)

    def forward(call: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            call(q, k, v, **inputs)

    first = once(partial(forward, attend))
    plan = attend.plan(n, heads=HEADS, **{name: inputs[name] for name in attend.relation_inputs})
    for direction, run in (("forward", forward), ("forward+backward", both)):
        runs = {"attnc": partial(run, attend)}
        if n <= MOST_DENSE:
            runs["dense"] = partial(run, attend.reference)
        times = interleaved(runs, rounds, 1)
        dense = times["dense"].median / times["attnc"].median if "dense" in times else None
        yield {
            "pattern": case.name,
            "n": n,
            "direction": direction,
            "first_ms": round(first, 1),
            **{f"{name}_ms": as_json(time) for name, time in times.items()},
            "dense_over_attnc": None if dense is None else round(dense, 2),
            "live_tiles": f"{plan.tiles.live}/{plan.tiles.total}",
            "how": list(plan.reasons)[:1] if not plan.branches else [f"{len(plan.branches)} branches"],
            "verdict": "no dense" if dense is None else "ahead" if dense >= 1 else "behind",
        }


def line(row: Row) -> str:
    """A row as it is printed."""
    ours = row["attnc_ms"]["median"]
    return (
        f"{row['pattern']!s:16} n={row['n']!s:6} {row['direction']!s:17} attnc {ours:9.1f} ms  dense over it "
        f"{row['dense_over_attnc']}  {row['verdict']}"
    )
