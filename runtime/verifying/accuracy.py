"""Accuracy bounds of executors: an error at most twice that of dense torch on the same numbers in the same dtype.

Dense torch is run both ways it is written: softmax of the masked scores, and `scaled_dot_product_attention`; the truth
is the first of them in fp64. The larger of the two errors counts, doubled, plus a few units in the last place of the
largest element, for results so small or few that one rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

TENSORS = ("out", "lse", "dq", "dk", "dv")
TIMES = 2.0
UNITS = {torch.float64: 64.0, torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Units in the last place. In fp32 the exponential of torch's fused attention, which the cpu executor calls, is good to
20 bits, that is 8 units, and is taken twice, forward and backward. The dense run in fp64 is the truth itself.
"""

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A differentiable function q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out and lse."""


@dataclass(frozen=True, slots=True)
class Error:
    """The error of one tensor of a run against fp64, that of dense torch in the same dtype, and the allowed error."""

    tensor: str
    error: float
    dense: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within the bound; a NaN error never is."""
        return self.error <= self.allowed


@dataclass(frozen=True, slots=True)
class Probe:
    """Operands in one dtype, the mask, and gradients of out and lse, to compare an executor with dense torch.

    `mask` is bool (B, Hq, Nq, Nk); `grad_lse` is None where the LSE takes no part in the loss. `dense` is attention as
    torch would write it where that is not the softmax of `scale * dot(q, k)` under the mask. `has_parts`: the result is
    made of softmaxes over selected keys or over the keys of branches, perhaps a single key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    dense: Run | None = None
    has_parts: bool = False


def compare(run: Run, probe: Probe) -> tuple[Error, ...]:
    """Return the errors of a run's out, lse, dq, dk and dv."""
    dense_run = _explicit(probe.mask) if probe.dense is None else probe.dense
    truth = _results(dense_run, probe, torch.float64)
    explicit = _results(dense_run, probe, probe.q.dtype)
    fused = _fused_errors(probe) if probe.dense is None else [0.0] * len(TENSORS)
    got = _results(run, probe, probe.q.dtype)
    cancelled = _cancelled(probe) if probe.dense is None or probe.has_parts else {}
    errors = []
    for i, name in enumerate(TENSORS):
        dense = max(_distance(explicit[i], truth[i]), fused[i])
        largest = torch.where(torch.isfinite(truth[i]), truth[i], 0).abs().max() if truth[i].numel() else 0.0
        eps = torch.finfo(probe.q.dtype).eps
        floor = UNITS[probe.q.dtype] * eps * float(largest) + eps * cancelled.get(name, 0.0)
        errors.append(Error(name, _distance(got[i], truth[i]), dense, TIMES * dense + floor))
    return tuple(errors)


def _results(run: Run, probe: Probe, dtype: torch.dtype) -> list[Tensor]:
    """Return out, lse, dq, dk and dv of a run in a dtype, as fp64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (probe.q, probe.k, probe.v)]
    out, lse = run(*leaves)
    outputs, grads = [out], [probe.grad_out.to(out.dtype)]
    if probe.grad_lse is not None:
        outputs.append(torch.where(torch.isneginf(lse), 0, lse))
        grads.append(probe.grad_lse.to(lse.dtype))
    if any(x.requires_grad for x in outputs):  # a recurrence may read neither of q, k and v
        torch.autograd.backward(outputs, grads)
    results = [out, lse, *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]
    return [x.detach().double() for x in results]


def _cancelled(probe: Probe) -> dict[str, float]:
    """Return, by gradient name, the largest terms whose difference the gradient is.

    dS = P ∘ (dO Vᵀ − δ): where a row sees one key the two are equal, so only their rounding is left, which a dense run
    that sums in one fixed order may not show.
    """
    q, k, v, grad = (x.detach().double() for x in (probe.q, probe.k, probe.v, probe.grad_out))
    if not (q.numel() and k.numel()):
        return {}
    group, scale = q.shape[1] // max(k.shape[1], 1), q.shape[-1] ** -0.5
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.transpose(-1, -2) * scale).masked_fill(~probe.mask, -torch.inf)
    weights = torch.softmax(score, -1).nan_to_num(0.0)
    terms = weights * (grad @ v.transpose(-1, -2)).abs() * scale
    return {"dq": float(terms.sum(-1).max() * k.abs().max()), "dk": float(terms.sum(-2).max() * q.abs().max())}


def _explicit(mask: Tensor) -> Run:
    """Return attention written plainly in torch; a row that sees nothing gives 0 and -inf."""
    seen = mask.any(-1, keepdim=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // max(k.shape[1], 1)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask & seen, -torch.inf)
        lse = torch.logsumexp(score.to(torch.promote_types(score.dtype, torch.float32)), -1)
        out = torch.where(seen, torch.softmax(score, -1), 0) @ v
        return out, torch.where(seen[..., 0], lse, -torch.inf)

    return run


def _fused_errors(probe: Probe) -> list[float]:
    """Return the errors of torch's fused attention; it has no LSE, so its gradients are of a loss on out alone."""
    seen = probe.mask.any(-1, keepdim=True)
    bare = replace(probe, mask=probe.mask | ~seen, grad_out=probe.grad_out * seen, grad_lse=None)
    truth = _results(_explicit(bare.mask), bare, torch.float64)
    fused = _results(_fused(bare.mask), bare, probe.q.dtype)
    return [0.0 if name == "lse" else _distance(a, b) for name, a, b in zip(TENSORS, fused, truth, strict=True)]


def _fused(mask: Tensor) -> Run:
    """Return `scaled_dot_product_attention`, with q, k and v padded to one width as its fused kernel requires."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group, width = q.shape[1] // max(k.shape[1], 1), max(q.shape[-1], v.shape[-1])
        k, wide = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        q_pad, k_pad, v_pad = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, wide))
        out = F.scaled_dot_product_attention(q_pad, k_pad, v_pad, attn_mask=mask, scale=q.shape[-1] ** -0.5)
        return out[..., : v.shape[-1]], q.new_zeros(q.shape[:3])

    return run


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; infinities must be equal. NaN where an entry is NaN."""
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else float("inf")
    return float(torch.where(a == b, 0, (a - b).abs()).max())
