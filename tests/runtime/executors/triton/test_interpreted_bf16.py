"""Triton's interpreter cannot multiply bf16: kernels compute in fp32 there, and the fallback is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnc
from attnc import compile_attention

pytest.importorskip("triton")


@pytest.mark.parametrize("pattern", ["causal", "softcap", "linear_attention"])
def test_bf16_is_computed_through_fp32(pattern: str) -> None:
    """Fails if interpreted kernels run on bf16: an error of 8e8 at values near 1."""
    kernels, reference = (compile_attention(pattern, backend=backend) for backend in ("triton", "reference"))
    tensors = [torch.randn(1, 2, 33, 16).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().float().requires_grad_() for x in tensors]
    attnc.reset_fallbacks()
    out, wanted = kernels(*tensors), reference(*exact)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
    grad = torch.randn_like(wanted).bfloat16()
    grads = torch.autograd.grad(out, tensors, grad)
    for ours, exact_grad in zip(grads, torch.autograd.grad(wanted, exact, grad.float()), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), exact_grad, atol=2e-2, rtol=2e-2)
    assert any("cannot multiply bfloat16" in fallback.reason for fallback in attnc.fallbacks())


@pytest.mark.parametrize("pattern", ["causal", "softcap"])
def test_bf16_is_decoded_through_fp32(pattern: str) -> None:
    attend: Any = compile_attention(pattern, backend="triton")
    q, k, v = (torch.randn(1, 2, 33, 16).bfloat16() for _ in range(3))
    wanted = attend.reference(*[x.float() for x in (q, k, v)])[:, :, -2:]
    for run in (attend.decode, attend.prefill):
        out = run(q[:, :, -2:], k, v, kv_len=33)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
