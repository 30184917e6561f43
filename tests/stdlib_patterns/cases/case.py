"""A call of a library pattern and the references it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention

Tensors = dict[str, Any]
"""q, k, v and inputs by name."""
Parts = tuple[Tensor, ...]
"""The output, followed by the LSE or by the states in the order of the reference, if the call returns them."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    n_q: int
    n_k: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    dk: int = 8
    dv: int = 5

    def __repr__(self) -> str:
        return f"{self.n_q}x{self.n_k},heads={self.heads}/{self.kv_heads}"


def real(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x


def described(name: str, params: Mapping[str, Any]) -> str:
    """Return a short label for a pattern and its parameters."""
    parameters = ",".join(f"{key}={value}" for key, value in params.items())
    return f"{name}({parameters})".replace(" ", "")


def drawn(shape: Shape) -> Tensors:
    """Draw q, k and v."""
    s = shape
    return {
        "q": real(s.batch, s.heads, s.n_q, s.dk),
        "k": real(s.batch, s.kv_heads, s.n_k, s.dk),
        "v": real(s.batch, s.kv_heads, s.n_k, s.dv),
    }


def nothing(shape: Shape) -> Tensors:
    return {}


def out_alone(attend: Attention, operands: Tensors) -> Parts:
    return (attend(**operands),)


def with_lse(attend: Attention, operands: Tensors) -> Parts:
    return attend(**operands, return_lse=True)


@dataclass(frozen=True)
class Case:
    """A pattern with parameters, the sizes of a call, its inputs, and the references of its mask and its output.

    `inputs`: draws tensors by name for the sizes; a `q`, `k` or `v` among them replaces the random one.
    `mask`: the visible pairs for a call's operands, bool, broadcasts to (B, Hq, Nq, Nk); None to compare only outputs.
    `output`: the output for a call's operands, with the parameters bound; None to compare only masks.
    `call`: calls the compiled pattern and returns the results that `output` returns.
    `content`: whether the mask depends on q, k and v. `fixed`: names of inputs that have no gradient.
    `tolerance`: the maximum error in fp64, relative to the largest true entry or to `least`.
    """

    name: str
    shape: Shape
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Shape], Mapping[str, Any]] = nothing
    mask: Callable[[Tensors], Tensor] | None = None
    output: Callable[[Tensors], Parts] | None = None
    call: Callable[[Attention, Tensors], Parts] = out_alone
    content: bool = False
    fixed: frozenset[str] = frozenset()
    tolerance: float = 1e-11
    least: float = 1.0

    def __repr__(self) -> str:
        return f"{described(self.name, self.params)}-{self.shape}"

    def compiled(self, **options: Any) -> Attention:
        return compile_attention(self.name, **self.params, **options)

    def operands(self) -> Tensors:
        """Return q, k, v and the inputs; floating-point tensors require gradients."""
        operands = drawn(self.shape) | dict(self.inputs(self.shape))
        return {name: x if name in self.fixed else leaf(x, torch.float64) for name, x in operands.items()}


def inputs_of(operands: Tensors) -> Tensors:
    """Return the inputs of a call besides q, k and v."""
    return {name: x for name, x in operands.items() if name not in ("q", "k", "v")}


def seen_by(attend: Attention, case: Case, operands: Tensors) -> Tensor:
    """Return the pattern's own masks, bool (B or 1, Hq, Nq, Nk)."""
    inputs, s = inputs_of(operands), case.shape
    inputs_by_name: Tensors
    if case.content:
        inputs_by_name = operands
    else:
        relation_inputs = {name: x for name, x in inputs.items() if name in attend.relation_inputs}
        inputs_by_name = {"heads": s.heads, "kv_heads": s.kv_heads, **relation_inputs}
    masks = [attend.mask(s.n_q, s.n_k, head=head, **inputs_by_name) for head in range(s.heads)]
    return torch.stack([mask if mask.ndim == 3 else mask[None] for mask in masks], 1)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinities must be equal."""
    if not b.numel():
        return 0.0
    kind = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.detach().to(kind), b.detach().to(kind)
    return float(torch.where(a == b, 0, (a - b).abs()).max())


def results(parts: Parts, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the results of a call, and the gradients of their sum with fixed weights."""
    draw = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for x in parts:
        weights = torch.randn(x.shape, generator=draw, dtype=torch.float64)
        total = total + torch.where(x.detach().isfinite(), x * weights, 0).sum()
    if not total.requires_grad:
        return dict(_numbered(parts))
    gradients = torch.autograd.grad(total, tuple(leaves.values()), allow_unused=True, materialize_grads=True)
    return {**dict(_numbered(parts)), **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def _numbered(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    for number, x in enumerate(parts):
        yield f"part {number}" if number else "out", x


def check_output(case: Case, **options: Any) -> None:
    """Check that output and gradients equal the reference's; `options` are passed to the compilation."""
    assert case.output is not None
    operands = case.operands()
    leaves = {name: x for name, x in operands.items() if isinstance(x, Tensor) and x.requires_grad}
    wanted = results(case.output(operands), leaves)
    actual = results(case.call(case.compiled(**options), operands), leaves)
    assert actual.keys() == wanted.keys(), case
    for name, x in wanted.items():
        assert actual[name].shape == x.shape, (case, name)
        assert not actual[name].isnan().any(), (case, name)
        size = float(torch.where(x.isfinite(), x, 0).detach().abs().max()) if x.numel() else 0.0
        assert distance(actual[name], x) <= case.tolerance * max(size, case.least), (case, name)


def check_mask(case: Case) -> None:
    """Check that the mask equals the reference's."""
    assert case.mask is not None
    operands = {name: x.detach() if isinstance(x, Tensor) else x for name, x in case.operands().items()}
    actual = seen_by(case.compiled(), case, operands)
    wanted = case.mask(operands)
    assert torch.equal(actual, wanted.expand(actual.shape) if wanted.shape[0] == 1 else wanted), case
