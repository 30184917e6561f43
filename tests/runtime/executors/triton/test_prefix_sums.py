"""Sums over the tokens between a key and a query on a GPU: weak gates stay exact beside strong ones.

Kernels use prefix sums held in two fp32 numbers; sums that need more precision run as tiles in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.triton import planner
from kernel_calls import error, operands, recorded, stages

TOKENS = 70

LATE = """
pattern late
    input   f: real[batch, token, head]
    align   end
    visible k <= q - 3
    score   scale * dot(q, k) + sum(f[j] for j in k + 1 .. q + 1)
"""
WEIGHED = """
pattern weighed
    input   f: real[batch, token, head]
    align   end
    visible k <= q
    weights exp(sum(f[j] for j in k + 1 .. q + 1 if j % 2 == 0)) * dot(q, k)
"""
COUNTED = """
pattern counted
    input   f: real[batch, token, head]
    align   end
    visible k <= q
    score   scale * dot(q, k) + sum(f[j] for j in k .. q)
"""


@pytest.fixture(autouse=True)
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc.compiler.kernels.targets import TARGETS

    monkeypatch.setattr(planner, "target_of", lambda device: TARGETS["sm_90"])


def sums_between(f: Tensor) -> Tensor:
    """Return (batch, head, q, k): the sum of f from k + 1 to q, each added up separately."""
    j = torch.arange(f.shape[1])
    inside = (j[:, None] < j) & (j[:, None, None] >= j)  # (q, k, j)
    return torch.einsum("qkj, bjh -> bhqk", inside.double(), f)


def with_strong_gates(value: float, *, tokens: int = TOKENS, heads: int = 2) -> Tensor:
    """Draw weak gates and three strong ones, two of which belong to the second head alone."""
    torch.manual_seed(3)
    f = -torch.rand(1, tokens, heads, dtype=torch.float64) * 0.1
    f[:, tokens // 2, -1] = f[:, tokens // 2 + 5, -1] = f[:, tokens // 4] = value
    return f.float()


def masked_softmax(score: Tensor, visible: Tensor, v: Tensor) -> Tensor:
    score = score.masked_fill(~visible, -math.inf)
    blind = (score == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(score.masked_fill(blind, 0), -1)
    return (weights.masked_fill(blind, 0)) @ v


def compare(
    text: str, f: Tensor, true_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], tolerance: float, *, fits: bool
) -> None:
    """Check a call and all gradients against a formula in fp64; with `fits`, check that kernels run."""
    tokens, heads = f.shape[1:]
    tensors = operands(tokens, heads=(heads, heads)) | {"f": f}
    weights = torch.randn(1, heads, tokens, 16)
    ours = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    with recorded() as launches:
        attend = compile_attention(text, backend="triton", strict=fits)
        out = attend(ours["q"], ours["k"], ours["v"], f=ours["f"])
        grads = torch.autograd.grad((out * weights).sum(), list(ours.values()))
    assert stages(launches) >= ({"forward", "dq", "dkdv"} if fits else set())
    assert fits or not launches
    wide = {name: x.double().requires_grad_() for name, x in tensors.items()}
    true = true_of(wide["q"], wide["k"], wide["v"], wide["f"])
    true_grads = torch.autograd.grad((true * weights).sum(), list(wide.values()))
    errors = {"out": error(out, true)}
    for name, grad, true_grad in zip(ours, grads, true_grads, strict=True):
        errors[f"d{name}"] = error(grad, true_grad.nan_to_num(0) if name == "f" else true_grad)
    assert max(errors.values()) < tolerance, errors


def fox_in_fp64(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    visible = torch.ones(f.shape[1], f.shape[1], dtype=torch.bool).tril()
    inner = torch.where(f.isfinite(), f, 0)
    crossed = sums_between((~f.isfinite()).double()) > 0
    return masked_softmax((q @ k.mT / 4 + sums_between(inner)).masked_fill(crossed, -math.inf), visible, v)


@pytest.mark.parametrize("value", [-1e4, -1e6, -math.inf])
def test_a_strong_gate_leaves_the_others_exact(value: float) -> None:
    """Without the second number errors were 5e-4 at a gate of -1e4, 1.3 at -1e30, and NaN at -inf."""
    compare("fox", with_strong_gates(value), fox_in_fp64, 4e-6, fits=value >= -1e6)


def test_gates_of_all_sizes_in_one_row() -> None:
    f = with_strong_gates(-9e2, heads=1)
    for token, value in ((9, -1e30), (20, -1e9), (33, -3e38), (34, -3e38), (41, -math.inf), (50, -1e18), (61, -2e3)):
        f[:, token] = value
    compare("fox", f, fox_in_fp64, 4e-6, fits=False)


@pytest.mark.parametrize("value", [-1e4, -math.inf])
def test_rows_whose_keys_all_lie_behind_a_strong_gate(value: float) -> None:
    """A row behind one strong gate still weighs its keys; a row behind a gate of -inf has no visible score.

    In fp32 scores near -1e4 are spaced by 1e-3.
    """

    def true(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-3)
        inner = torch.where(f.isfinite(), f, 0)
        crossed = sums_between((~f.isfinite()).double()) > 0
        score = (q @ k.mT / 4).masked_fill(crossed, -math.inf)
        large = sums_between(torch.where(inner.abs() > 1e3, inner, 0))
        small = sums_between(torch.where(inner.abs() > 1e3, 0, inner))
        least = large.masked_fill(~visible, -math.inf).amax(-1, keepdim=True).clamp(min=-1e300)
        return masked_softmax(score + small + (large - least), visible, v)

    compare(LATE, with_strong_gates(value, heads=1), true, 4e-6 if math.isinf(value) else 1e-3, fits=value >= -1e6)


@pytest.mark.parametrize("value", [-1e4, -math.inf])
def test_in_weights_and_under_a_condition(value: float) -> None:
    def true(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        even = torch.where((torch.arange(TOKENS) % 2 == 0)[None, :, None] & f.isfinite(), f, 0)
        crossed = sums_between(((torch.arange(TOKENS) % 2 == 0)[None, :, None] & ~f.isfinite()).double()) > 0
        visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & ~crossed
        return (sums_between(even).exp() * (q @ k.mT)).masked_fill(~visible, 0) @ v

    compare(WEIGHED, with_strong_gates(value, heads=1), true, 4e-6, fits=value >= -1e6)


def test_large_gates_of_either_sign() -> None:
    """A NaN gate reaches only the rows behind it."""
    f = with_strong_gates(2e3)
    f[0, 60, 0] = math.nan
    q, k, v = operands(TOKENS, heads=(2, 2)).values()
    attend = compile_attention(LATE, backend="triton")
    out = attend(q, k, v, f=f)
    true = compile_attention(LATE)(q, k, v, f=f)
    assert torch.equal(out.isnan(), true.isnan())
    assert out[0, 0, 60:].isnan().all()
    with pytest.raises(UnsupportedError, match="sums over tokens that grow beyond 2²⁸, or to infinity"):
        compile_attention(LATE, backend="triton", strict=True)(q, k, v, f=f)
    assert error(out.nan_to_num(0), true.nan_to_num(0)) < 1e-3  # scores near 6e3 are spaced by 5e-4 in fp32


def test_documents_and_short_sequences() -> None:
    """Prefix sums restart at each document."""
    f, (q, k, v) = with_strong_gates(-1e6, tokens=33), operands(33, heads=(2, 1)).values()
    attend, true = compile_attention(COUNTED, backend="triton", strict=True), compile_attention(COUNTED)
    for cut in (torch.tensor([0, 1, 1, 20, 33]), None):
        out = attend(q, k, v, f=f, cu_seqlens=cut)
        assert error(out, true(q, k, v, f=f, cu_seqlens=cut)) < 4e-6
    assert torch.equal(attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], f=f[:, :1]), v[:, :, :1].expand(1, 2, 1, 16))
