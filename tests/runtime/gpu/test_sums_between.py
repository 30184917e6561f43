"""Sums over what lies between a key and a query on a GPU: as exact under strong gates as under weak ones.

Kernels take prefix sums of which two numbers of 32 bits are enough; others run as tiles in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.gpu import planner
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


def between(f: Tensor) -> Tensor:
    """(batch, head, q, k): the sum of f from k + 1 to q, each added up by itself."""
    j = torch.arange(f.shape[1])
    inside = (j[:, None] < j) & (j[:, None, None] >= j)  # (q, k, j)
    return torch.einsum("qkj, bjh -> bhqk", inside.double(), f)


def strong(value: float, *, tokens: int = TOKENS, heads: int = 2) -> Tensor:
    """Weak gates but for three, two of which belong to the second head alone."""
    torch.manual_seed(3)
    f = -torch.rand(1, tokens, heads, dtype=torch.float64) * 0.1
    f[:, tokens // 2, -1] = f[:, tokens // 2 + 5, -1] = f[:, tokens // 4] = value
    return f.float()


def softmax_of(score: Tensor, visible: Tensor, v: Tensor) -> Tensor:
    score = score.masked_fill(~visible, -math.inf)
    blind = (score == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(score.masked_fill(blind, 0), -1)
    return (weights.masked_fill(blind, 0)) @ v


def compare(
    text: str, f: Tensor, true_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], most: float, *, fits: bool
) -> None:
    """A call and all of its gradients against a formula in 64 bits; `fits`: kernels take it."""
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
    assert max(errors.values()) < most, errors


def fox(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    visible = torch.ones(f.shape[1], f.shape[1], dtype=torch.bool).tril()
    inner = torch.where(f.isfinite(), f, 0)
    crossed = between((~f.isfinite()).double()) > 0
    return softmax_of((q @ k.mT / 4 + between(inner)).masked_fill(crossed, -math.inf), visible, v)


@pytest.mark.parametrize("value", [-1e4, -1e6, -math.inf])
def test_a_strong_gate_takes_no_digits_from_the_others(value: float) -> None:
    """It failed: errors of 5e-4 at a gate of -1e4, of 1.3 at -1e30, NaN at -inf."""
    compare("fox", strong(value), fox, 4e-6, fits=value >= -1e6)


def test_gates_of_all_sizes_in_one_row() -> None:
    f = strong(-9e2, heads=1)
    for at, value in ((9, -1e30), (20, -1e9), (33, -3e38), (34, -3e38), (41, -math.inf), (50, -1e18), (61, -2e3)):
        f[:, at] = value
    compare("fox", f, fox, 4e-6, fits=False)


@pytest.mark.parametrize("value", [-1e4, -math.inf])
def test_rows_whose_keys_all_lie_behind_a_strong_gate(value: float) -> None:
    """A row behind one gate weighs its keys by what is left; behind -inf it sees nothing.

    Scores of -1e4 have digits of 1e-3 in 32 bits.
    """

    def true(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-3)
        inner = torch.where(f.isfinite(), f, 0)
        crossed = between((~f.isfinite()).double()) > 0
        score = (q @ k.mT / 4).masked_fill(crossed, -math.inf)
        large = between(torch.where(inner.abs() > 1e3, inner, 0))
        small = between(torch.where(inner.abs() > 1e3, 0, inner))
        least = large.masked_fill(~visible, -math.inf).amax(-1, keepdim=True).clamp(min=-1e300)
        return softmax_of(score + small + (large - least), visible, v)

    compare(LATE, strong(value, heads=1), true, 4e-6 if math.isinf(value) else 1e-3, fits=value >= -1e6)


@pytest.mark.parametrize("value", [-1e4, -math.inf])
def test_in_weights_and_under_a_condition(value: float) -> None:
    def true(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        even = torch.where((torch.arange(TOKENS) % 2 == 0)[None, :, None] & f.isfinite(), f, 0)
        crossed = between(((torch.arange(TOKENS) % 2 == 0)[None, :, None] & ~f.isfinite()).double()) > 0
        visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & ~crossed
        return (between(even).exp() * (q @ k.mT)).masked_fill(~visible, 0) @ v

    compare(WEIGHED, strong(value, heads=1), true, 4e-6, fits=value >= -1e6)


def test_large_gates_of_either_sign() -> None:
    """Also NaN, which reaches the rows that lie behind it alone."""
    f = strong(2e3)
    f[0, 60, 0] = math.nan
    q, k, v = operands(TOKENS, heads=(2, 2)).values()
    attend = compile_attention(LATE, backend="triton")
    out = attend(q, k, v, f=f)
    true = compile_attention(LATE)(q, k, v, f=f)
    assert torch.equal(out.isnan(), true.isnan())
    assert out[0, 0, 60:].isnan().all()
    with pytest.raises(UnsupportedError, match="sums over tokens that grow beyond 2²⁸, or to infinity"):
        compile_attention(LATE, backend="triton", strict=True)(q, k, v, f=f)
    assert error(out.nan_to_num(0), true.nan_to_num(0)) < 1e-3  # scores of 6e3 have digits of 5e-4


def test_documents_and_short_sequences() -> None:
    """Prefix sums begin with each document."""
    f, (q, k, v) = strong(-1e6, tokens=33), operands(33, heads=(2, 1)).values()
    attend, true = compile_attention(COUNTED, backend="triton", strict=True), compile_attention(COUNTED)
    for cut in (torch.tensor([0, 1, 1, 20, 33]), None):
        out = attend(q, k, v, f=f, cu_seqlens=cut)
        assert error(out, true(q, k, v, f=f, cu_seqlens=cut)) < 4e-6
    assert torch.equal(attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], f=f[:, :1]), v[:, :, :1].expand(1, 2, 1, 16))
