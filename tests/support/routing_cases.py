"""Calls of the library's routing patterns beside their references, and what must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cluster_references
import routing_references
from attnc import Attention, compile_attention
from reference.dhsa import dhsa
from reference.hip import hip
from reference.mminference_grid import mminference_grid

BY_NAME: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "dhsa": dhsa,
    "hip": hip,
    "mminference_grid": mminference_grid,
}
"""Those with a file of their own."""

REFERENCES = {**routing_references.REFERENCES, **cluster_references.REFERENCES, **BY_NAME}

HEADS, KV_HEADS, DK, DV = 4, 2, 5, 3
Inputs = dict[str, Any]
"""Tensors by name."""


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A pattern with parameters and the numbers of queries and keys of a call of two sequences."""

    name: str
    n_q: int
    n_k: int
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, int], Inputs] = lambda n_q, n_k: {}
    """What the reference is given besides, or in place of the pattern's parameters."""

    def __repr__(self) -> str:
        own = ",".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}({own})-{self.n_q}-{self.n_k}".replace(" ", "")

    def compiled(self) -> Attention:
        return compile_attention(self.name, **self.params)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return REFERENCES[self.name](q, k, v, **inputs, **self.params)

    def drawn(self) -> tuple[list[Tensor], Inputs]:
        qkv = [real(2, HEADS, self.n_q, DK), real(2, KV_HEADS, self.n_k, DK), real(2, KV_HEADS, self.n_k, DV)]
        return qkv, self.inputs(self.n_q, self.n_k)


def agree(ours: Tensor, theirs: Tensor, leaves: list[Tensor], rtol: float = 1e-10, atol: float = 1e-11) -> None:
    """The same output and the same gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def leaves_of(qkv: list[Tensor], inputs: Inputs) -> list[Tensor]:
    return [x.requires_grad_() for x in [*qkv, *inputs.values()] if x.is_floating_point()]


def seen_by(case: Case, qkv: list[Tensor], inputs: Inputs) -> Tensor:
    """The pattern's own masks, (B, Hq, Nq, Nk)."""
    attend = case.compiled()
    q, k, v = qkv
    content: Inputs = {"heads": HEADS} if case.name in ("sparse_d", "recycled") else {"q": q, "k": k, "v": v}
    masks = [attend.mask(q.shape[2], k.shape[2], head=head, **content, **inputs) for head in range(q.shape[1])]
    return torch.stack(masks, 1)


def same_as_reference(case: Case, backend: str, fixed: Sequence[str] = ()) -> None:
    """Output and gradients; inputs named `fixed` have none."""
    attend = case.compiled()
    qkv, inputs = case.drawn()
    leaves = leaves_of(qkv, {name: x for name, x in inputs.items() if name not in fixed})
    q, k, v = qkv
    run: Any = attend if backend == "cpu" else attend.reference
    _, wanted = case.reference(q, k, v, inputs)
    agree(run(q, k, v, **inputs), wanted, leaves)


def seen_as_in_reference(case: Case, qkv: list[Tensor], inputs: Inputs) -> None:
    q, k, v = qkv
    seen, _ = case.reference(q, k, v, inputs)
    assert torch.equal(seen_by(case, qkv, inputs), seen)
