"""Calls of emitted kernels in Triton's interpreter, compared with the reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.runtime.api.attention import Attention
from attnc.runtime.executors.triton import launch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
"""Allowed errors, relative to the largest true entry of a result or to 1, whichever is larger."""


@dataclass(frozen=True)
class Launch:
    """A started kernel and its arguments."""

    source: KernelSource
    arguments: tuple[object, ...]


@contextmanager
def recorded(*, run: bool = True) -> Iterator[list[Launch]]:
    """Record the kernels that are started inside the context; `run`: whether they run."""
    launches: list[Launch] = []

    def start(source: KernelSource, grid: tuple[int, int], arguments: Sequence[object]) -> None:
        launches.append(Launch(source, tuple(arguments)))
        if run:
            launch.function_of(source)[grid](*arguments, **source.options)

    with launch.started_by(start):
        yield launches


def stages(launches: Sequence[Launch]) -> set[str]:
    """Return the stages that kernels computed."""
    return {launch.source.stage for launch in launches}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill all uninitialised memory with NaN, padding included, so that reads of unwritten memory are found."""
    with pytest.MonkeyPatch.context() as patch:
        new_empty, alike = Tensor.new_empty, torch.empty_like
        patch.setattr(Tensor, "new_empty", lambda x, *sizes, **more: _spoiled(new_empty(x, *sizes, **more)))
        patch.setattr(torch, "empty_like", lambda x, **more: _spoiled(alike(x, **more)))
        yield


def _spoiled(x: Tensor) -> Tensor:
    return x.fill_(math.nan) if x.is_floating_point() else x


@dataclass(frozen=True)
class Result:
    """The results of one side: out, LSE (or None), and gradients by name."""

    out: Tensor
    lse: Tensor | None
    grads: Mapping[str, Tensor | None]


def run(
    function: Any,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    grads: tuple[Tensor, Tensor | None],
    **options: Any,
) -> Result:
    """Run a call and its gradients, for gradients of out and, if requested, of the LSE."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    leaves |= {n: x.detach().requires_grad_() for n, x in inputs.items() if _is_real(x)}
    q, k, v = (leaves[name] for name in "qkv")
    more = {name: leaves.get(name, x) for name, x in inputs.items()}
    result = function(q, k, v, return_lse=grads[1] is not None, **more, **options)
    out, lse = (result, None) if grads[1] is None else result
    outputs, of_outputs = [out], [grads[0].to(out.dtype)]
    if lse is not None:
        outputs.append(lse)
        assert grads[1] is not None
        of_outputs.append(torch.where(lse == -math.inf, 0, grads[1]).to(lse.dtype))
    wanted = torch.autograd.grad(outputs, list(leaves.values()), of_outputs, allow_unused=True)
    return Result(out.detach(), None if lse is None else lse.detach(), dict(zip(leaves, wanted, strict=True)))


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def operands(
    n_q: int,
    n_k: int | None = None,
    *,
    heads: tuple[int, int] = (2, 1),
    widths: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Draw q, k and v."""
    n_k = n_q if n_k is None else n_k
    sizes = {"q": (heads[0], n_q, widths[0]), "k": (heads[1], n_k, widths[0]), "v": (heads[1], n_k, widths[1])}
    return {name: torch.randn(batch, *size).to(dtype) for name, size in sizes.items()}


def check(
    attention: Attention,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Any] | None = None,
    *,
    with_lse: bool = True,
    tolerance: float | None = None,
    **options: Any,
) -> list[Launch]:
    """Compare a call in poisoned memory and all its gradients with the reference; return the kernels that ran."""
    inputs, q, v = inputs or {}, tensors["q"], tensors["v"]
    of_out = torch.randn(*q.shape[:3], v.shape[-1]).to(q.dtype)
    grads = of_out, torch.randn(q.shape[:3]) if with_lse else None
    with recorded() as launches, poisoned():
        ours = run(attention, tensors, inputs, grads, **options)
    wide = {name: x.double() for name, x in tensors.items()}
    wide_inputs = {name: x.double() if _is_real(x) else x for name, x in inputs.items()}
    true = run(attention.reference, wide, wide_inputs, grads, **options)
    maximum = TOLERANCE[q.dtype] if tolerance is None else tolerance
    assert ours.out.dtype == q.dtype
    errors = {"out": error(ours.out, true.out)}
    if ours.lse is not None:
        assert true.lse is not None
        assert ours.lse.dtype == torch.float32
        assert torch.equal(ours.lse == -math.inf, true.lse == -math.inf)
        seeing = true.lse > -math.inf
        assert not ours.out[~seeing].any()
        errors["lse"] = error(ours.lse[seeing], true.lse[seeing])
    for name, grad in true.grads.items():
        gradient = ours.grads[name]
        if gradient is None or grad is None:
            other = gradient if grad is None else grad
            assert other is None or not other.any(), f"one of the gradients of {name} is missing"
            continue
        assert gradient.dtype == {**tensors, **inputs}[name].dtype
        errors[f"d{name}"] = error(gradient, grad)
    assert max(errors.values()) <= maximum, errors
    return launches


def error(x: Tensor, true: Tensor) -> float:
    """Return the largest error, relative to the largest true entry or to 1; infinite for NaN."""
    if not x.numel():
        return 0.0
    gap = (x.double() - true.double()).abs().max() / true.abs().max().clamp(min=1)
    return math.inf if gap.isnan() else gap.item()
