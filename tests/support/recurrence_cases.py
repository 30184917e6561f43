"""Inputs of the linear recurrence by class and gate regime, computed in chunks and token by token.

A class is named by words: a gate's ("constant", "scalar", "rows", none), "columns", a correction's ("delta", "comba",
"decayed", "old", none), "before". A case is a dictionary of tensors, drawn in fp64; `truth` uses fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from attnc.runtime.executors.recurrent.linear import linear_recurrence
from attnc.runtime.executors.recurrent.linear_inputs import Delta, RankOne
from token_loops import token_loop

Tensors = dict[str, Tensor]
Result = tuple[Tensor, Tensor]

CLASSES = (
    "",
    "constant",
    "scalar",
    "rows",
    "columns",
    "scalar columns",
    "rows columns",
    "scalar before",
    "rows before",
    "rows columns before",
    "delta",
    "constant delta",
    "scalar delta",
    "rows delta",
    "rows delta before",
    "scalar comba",
    "rows comba",
    "decayed",
    "scalar decayed",
    "rows decayed",
    "old",
    "scalar old",
    "rows old",
    "rows old before",
)
GATED = tuple(name for name in CLASSES if {"scalar", "rows", "columns"} & set(name.split()))


def _mixed(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Return numbers of many magnitudes, from a thousandth to some tens."""
    return -((torch.randn(shape, generator=draw, dtype=torch.float64) * 2.5).exp()).clamp(max=60)


def _with(base: float, index: tuple[int, ...], value: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    def gates(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
        result = torch.rand(shape, generator=draw, dtype=torch.float64) * base
        for token in index:
            if token < shape[2]:
                result[:, :, token] = value
        return result

    return gates


REGIMES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "0": _with(0.0, (), 0.0),
    "mild": _with(-0.3, (), 0.0),
    "mixed": _mixed,
    "-5": _with(0.0, tuple(range(1000)), -5.0),
    "-100 first": _with(0.0, (0,), -100.0),
    "-88.8 in the middle": _with(-0.1, (30, 100), -88.8),
    "-100 in the middle": _with(-0.02, (37, 90), -100.0),
    "-inf": _with(-0.1, (77, 128, 150), -math.inf),
}


def draw_case(
    name: str,
    regime: str = "mild",
    tokens: int = 100,
    micro: int = 1,
    sizes: tuple[int, int, int, int] = (2, 3, 8, 5),
) -> Tensors:
    """Draw the tensors of a class; `sizes` are B, H, R, C; β is at most 1."""
    words = set(name.split())
    batch, heads, rows, columns = sizes
    draw = torch.Generator().manual_seed(11)
    steps = (batch, heads, tokens * micro)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    tensors = {"q": normal(batch, heads, tokens, rows), "k": unit(*steps, rows), "v": normal(*steps, columns)}
    tensors["state"] = normal(batch, heads, rows, columns)
    beta = torch.rand(steps, generator=draw, dtype=torch.float64)
    if "constant" in words:
        tensors["gate"] = -torch.rand(heads, generator=draw, dtype=torch.float64) / 4
    elif words & {"scalar", "rows"}:
        tensors["gate"] = REGIMES[regime](steps if "scalar" in words else (*steps, rows), draw)
    if "columns" in words:
        tensors["gate_columns"] = REGIMES[regime]((*steps, columns), draw)
    if words & {"delta", "comba"}:
        tensors["beta"] = beta
    if words & {"comba", "decayed", "old"}:
        tensors["read"] = unit(*steps, rows)
    if words & {"decayed", "old"}:
        tensors["left"] = -beta[..., None] * tensors["read"]
    return tensors


def chunked(name: str, tensors: Tensors, resets: Tensor | None = None, micro: int = 1, chunk: int = 64) -> Result:
    rest = dict(tensors)
    beta, read, left = (rest.pop(name_of_part, None) for name_of_part in ("beta", "read", "left"))
    correction: Delta | RankOne | None = None
    if left is not None:
        assert read is not None
        sees: Literal["decayed", "old"] = "old" if "old" in name.split() else "decayed"
        correction = RankOne(left, read, sees)
    elif beta is not None:
        correction = Delta(beta, read)
    return linear_recurrence(
        rest.pop("q"),
        rest.pop("k"),
        rest.pop("v"),
        correction=correction,
        before="before" in name.split(),
        resets=resets,
        micro=micro,
        chunk=chunk,
        **rest,
    )


def truth(name: str, tensors: Tensors, resets: Tensor | None = None, micro: int = 1) -> Result:
    rest = dict(tensors)
    beta, read, left = (rest.pop(each, None) for each in ("beta", "read", "left"))
    correction = None
    if left is not None:
        assert read is not None
        correction = (left, read, "old" if "old" in name.split() else "decayed")
    elif beta is not None:
        k = rest.pop("k")
        rest["k"] = beta[..., None] * k
        correction = (-beta[..., None] * k, k if read is None else read, "decayed")
    return token_loop(
        rest.pop("q"),
        rest.pop("k"),
        rest.pop("v"),
        correction=correction,
        before="before" in name.split(),
        resets=resets,
        micro=micro,
        **rest,
    )


def gradients(results: Result, tensors: Tensors) -> Tensors:
    """Return the gradients of a weighted sum over both results; equal shapes have equal weights."""
    draw = torch.Generator().manual_seed(12)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in results]
    total = sum(((x.double() * w).sum() for x, w in zip(results, weights, strict=True)), torch.zeros(()))
    return dict(zip(tensors, torch.autograd.grad(total, list(tensors.values())), strict=True))


def leaves(tensors: Tensors, dtype: torch.dtype = torch.float64) -> Tensors:
    return {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Compute max|err| / max|truth|, infinite if a result is not finite."""
    if not ours.numel():
        return 0.0
    if not ours.isfinite().all():
        return math.inf
    return float((ours.detach().double() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-30))
