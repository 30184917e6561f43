"""Rows whose visible scores are all -inf: their log-sum-exp is the extra logit, on every executor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention

BIASED = """\
pattern p
    input b: real[batch, key]
    learned sink: real[head]
    align end
    visible 0 <= q - k < 3 and q != 4
    score scale * dot(q, k) + b[k]
    weights softmax(score, extra = sink)
"""
BY_HEAD = """\
pattern p
    input b: real[head]
    learned sink: real[head]
    align end
    visible 0 <= q - k < 3 and q != 4
    score scale * dot(q, k) + b
    weights softmax(score, extra = sink)
"""
SINK = [0.25, -math.inf]


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the definition: a column of logits beside the scores; a row without keys gives 0 and LSE -inf."""
    gap = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    visible = (gap >= 0) & (gap < 3) & (gap + torch.arange(k.shape[2]) != 4)
    scores = torch.where(visible, q @ k.mT * q.shape[3] ** -0.5 + bias, -math.inf)
    lse = torch.logsumexp(torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], -1), -1)
    lse = torch.where(visible.any(-1), lse, -math.inf)
    return torch.exp(scores - torch.where(lse == -math.inf, 0, lse)[..., None]) @ v, lse


def backend_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if name == "triton":
        pytest.importorskip("triton", reason="kernels need Triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_scores_of_minus_infinity_leave_the_extra_logit(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make hunt`, part triton, case 588: tiles in torch returned the logit, all other executors -inf."""
    attend = compile_attention(BIASED, backend=backend_of(backend, monkeypatch))
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=dtype) for _ in range(3))
    b, sink = torch.randn(2, 9, dtype=dtype), torch.tensor(SINK, dtype=dtype)
    b[:, :3] = -math.inf
    results = []
    functions: list[Any] = [
        lambda *x: attend(*x[:3], b=x[3], sink=x[4], return_lse=True),
        lambda *x: dense(x[0], x[1], x[2], x[3][:, None, None], x[4]),
    ]
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, b, sink)]
        out, lse = function(*leaves)
        finite = torch.isfinite(lse)
        total = out.sum() + (torch.where(finite, lse, 0) * torch.arange(9)).sum()
        results.append([out.detach(), lse.detach(), torch.autograd.grad(total, leaves)[4][:1]])
    for actual, true in zip(*results, strict=True):
        torch.testing.assert_close(actual, true)
    assert results[0][1][0, 0, :5].tolist()[:3] == [0.25] * 3
    assert results[0][1][0, 1, :3].tolist() == [-math.inf] * 3


MADE_OF_FUNCTIONS = [
    "log(relu(scale * dot(q, k)))",
    "scale * dot(q, k) if (q - k) % 2 == 1 else log(0 * scale)",
    "0 - 1 / relu(scale * dot(q, k))",
]


@pytest.mark.parametrize("score", MADE_OF_FUNCTIONS)
def test_kernels_keep_the_extra_logit_when_the_formula_gives_minus_infinity(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels gave -inf, because neither the terms nor the inputs of the score could be -inf."""
    lines = f"    input s: real[head]\n    align end\n    visible 0 <= q - k < 3\n    score {score}\n"
    text = f"pattern p\n{lines}    weights softmax(score, extra = s)\n"
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    results = []
    for name in ("reference", "triton"):
        s = torch.randn(2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out, lse = compile_attention(text, backend=backend_of(name, monkeypatch))(q, k, v, s=s, return_lse=True)
        results.append((out.detach(), lse.detach(), torch.autograd.grad(lse.sum(), s)[0]))
    assert results[0][1].isfinite().all()
    for ours, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_decode_keeps_the_extra_logit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = compile_attention(BY_HEAD, backend=backend_of(backend, monkeypatch))
    q, k, v = (torch.randn(1, 3, n, 4) for n in (2, 9, 9))
    b, sink = torch.tensor([-math.inf, -math.inf, 0.5]), torch.tensor([*SINK, 1.0])
    out, lse = attend.decode(q, k, v, kv_len=9, b=b, sink=sink, return_lse=True)
    assert lse[0, :2].tolist() == [[0.25, 0.25], [-math.inf, -math.inf]]
    torch.testing.assert_close((out, lse), dense(q, k, v, b[:, None, None], sink))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_scores_far_below_the_extra_logit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that merges partial results took such a row for a row without keys: its LSE was -inf."""
    attend = compile_attention("gpt_oss", window=8, backend=backend_of(backend, monkeypatch))
    q = torch.full((1, 1, 1, 4), -20.0)
    k, v = torch.full((1, 1, 9, 4), 20.0), torch.randn(1, 1, 9, 4)
    out, lse = attend.decode(q, k, v, kv_len=9, sink=torch.tensor([1.5]), return_lse=True)
    assert lse.item() == 1.5
    assert not out.any()


@pytest.mark.parametrize("far", [-12511.25, -1e6])
def test_the_log_sum_exp_keeps_the_digits_of_an_extra_logit(far: float) -> None:
    """`make hunt`, part cpu, case 61144: beside scores of -12511 a row's LSE was 0.1025 instead of 0.1024."""
    sink, bias = torch.tensor([0.1024, -1.6106]), torch.full((1, 6), far)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    attend: Any = compile_attention(BIASED)
    _, lse = attend(q, k, v, b=bias, sink=sink, return_lse=True)
    visible = [0, 1, 2, 3, 5]
    torch.testing.assert_close(lse[0, :, visible], sink[:, None].expand(2, 5), rtol=1e-6, atol=0)
