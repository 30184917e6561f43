"""The cpu executor against dense causal SDPA and compiled FlexAttention: forward, and forward with backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import Timing, as_json, interleaved, once
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnc import compile_attention
from attnc.runtime.attention import Attention

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """A pattern as attnc and as FlexAttention write it."""

    name: str
    attention: Attention
    inputs: Callable[[int], dict[str, Any]]
    mask_mod: Callable[[int], Callable[..., Tensor]]


def document_ids(n: int) -> Tensor:
    """Eight documents of uneven lengths, (1, n)."""
    weights = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    lengths = weights * n // weights.sum()
    lengths[-1] += n - lengths.sum()
    return torch.repeat_interleave(torch.arange(8), lengths)[None]


def _window(width: int, sinks: int) -> Callable[[int], Callable[..., Tensor]]:
    def make(_: int) -> Callable[..., Tensor]:
        return lambda b, h, q, k: (q >= k) & ((q - k < width) | (k < sinks))

    return make


def _document(n: int) -> Callable[..., Tensor]:
    doc = document_ids(n)[0]
    return lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k)


def _none(_: int) -> dict[str, Any]:
    return {}


CASES = (
    Case("window 512", compile_attention("sliding_window", window=512), _none, _window(512, 0)),
    Case("window 300 + 7 sinks", compile_attention("sliding_window", window=300, sinks=7), _none, _window(300, 7)),
    Case("blocked 128", compile_attention("blocked"), _none, lambda _: lambda b, h, q, k: q // 128 == k // 128),
    Case("document", compile_attention("document"), lambda n: {"doc": document_ids(n)}, _document),
)

HEADS = 4


def rows(lengths: list[int], head_dims: list[int], dtypes: list[torch.dtype], rounds: int) -> Iterator[Row]:
    """A row for each pattern, length, head dimension, dtype and direction; correctness comes before time."""
    for n, d, dtype, case in itertools.product(lengths, head_dims, dtypes, CASES):
        torch.manual_seed(0)
        torch.compiler.reset()  # past a few patterns dynamo stops compiling and runs flex unfused
        compiled = torch.compile(flex_attention, dynamic=False)
        q, k, v = (torch.randn(1, HEADS, n, d, dtype=dtype, requires_grad=True) for _ in range(3))
        inputs = case.inputs(n)
        block_mask = create_block_mask(case.mask_mod(n), None, None, n, n, device="cpu")
        facts: Row = {"pattern": case.name, "n": n, "head_dim": d, "dtype": str(dtype).removeprefix("torch.")}

        ours = partial(case.attention, q, k, v, **inputs)
        dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        # FlexAttention refuses inputs that want gradients on a CPU
        flex = partial(compiled, q.detach(), k.detach(), v.detach(), block_mask=block_mask)

        first = {"attnc_first_ms": once(ours), "flex_first_ms": once(flex)}
        error = (ours().detach().float() - flex().float()).abs().max().item()
        assert error < (1e-4 if dtype == torch.float32 else 0.05), f"{facts}: attnc and flex differ by {error}"
        with torch.no_grad():
            times = interleaved({"attnc": ours, "flex": flex, "dense": dense}, rounds)
        yield facts | {"direction": "forward", "max_difference": error} | first | _ratios(times)
        training = {name: _with_backward(run, (q, k, v)) for name, run in (("attnc", ours), ("dense", dense))}
        yield facts | {"direction": "forward+backward"} | _ratios(interleaved(training, max(rounds // 2, 3), 1))


def _with_backward(run: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    def step() -> object:
        out = run()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def _ratios(times: dict[str, Timing]) -> Row:
    ours = times["attnc"].median
    ratios = {f"{name}_over_attnc": round(t.median / ours, 3) for name, t in times.items() if name != "attnc"}
    return {**{f"{name}_ms": as_json(t) for name, t in times.items()}, **ratios}
