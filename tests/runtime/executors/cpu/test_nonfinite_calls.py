"""A call with non-finite results is recomputed in a few blocks, not row by row, and each row gets its own result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.executors.cpu.row_blocks import RowBlock
from attnc.runtime.values.block_values import BlockValues

N = 300
HEAD = "pattern p\n    align end\n    visible k <= q\n"
TEXTS = {
    "bias": f"{HEAD}    score scale * dot(q, k) + 0.9 ** (q - k)\n",
    "score": f"{HEAD}    score 2 * tanh(scale * dot(q, k))\n",
    "weights": f"{HEAD}    weights softplus(score) / sum(softplus(score) for k)\n",
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of rows of every computed block."""
    row_counts: list[int] = []
    pairs = RowBlock.pairs

    def recording_pairs(self: RowBlock, *arguments: Any) -> Any:
        row_counts.append(len(self.rows))
        return pairs(self, *arguments)

    monkeypatch.setattr(RowBlock, "pairs", recording_pairs)
    yield row_counts


def _attention_and_qkv(kind: str) -> tuple[Any, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return compile_attention(TEXTS[kind]), [torch.randn(1, 2, N, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", TEXTS)
def test_an_overflow_of_all_gradients(kind: str, runs: list[int]) -> None:
    """Every row was recomputed by itself, in more than 300 runs; overflow is common where gradients are scaled."""
    attend, tensors = _attention_and_qkv(kind)
    leaves = [x.requires_grad_() for x in tensors]
    out = attend(*leaves)
    runs.clear()
    grads = torch.autograd.grad(out, leaves, torch.full_like(out, math.inf))
    assert 0 < len(runs) < 40
    assert not any(grad[:, :, 1:].isfinite().any() for grad in grads)


@pytest.mark.parametrize("keys", [slice(0, 1), slice(170, 171), slice(None)])
@pytest.mark.parametrize("kind", TEXTS)
def test_nan_values(kind: str, keys: slice, runs: list[int]) -> None:
    """Every row that sees a NaN value was recomputed by itself."""
    attend, (q, k, v) = _attention_and_qkv(kind)
    wanted = attend(q, k, v)
    v[:, :, keys] = math.nan
    runs.clear()
    out = attend(q, k, v)
    assert 0 < len(runs) < 40
    first = keys.start or 0
    assert out[:, :, first:].isnan().all()
    assert torch.equal(out[:, :, :first], wanted[:, :, :first])


@pytest.mark.parametrize("kind", TEXTS)
def test_rows_that_see_one_of_two_nonfinite_keys(kind: str) -> None:
    """Results equal those of calls with only the visible keys: the second key's NaN reaches no column before it."""
    attend, (q, k, v) = _attention_and_qkv(kind)
    v[:, :, 5, 0], v[:, :, 200, 1], k[:, :, 250, 3] = math.nan, math.nan, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    for count in (5, 200, 201, 250):
        short = [x.detach()[:, :, :count].requires_grad_() for x in leaves]
        wanted = attend(*short)
        assert torch.allclose(out[:, :, :count], wanted, atol=1e-6, equal_nan=True)
        assert wanted[:, :, :, 2].isfinite().all()
        (grad,) = torch.autograd.grad((out * weights)[:, :, :count].sum(), [q], retain_graph=True)
        (exact,) = torch.autograd.grad((wanted * weights[:, :, :count]).sum(), short[:1])
        assert torch.allclose(grad[:, :, :count], exact, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", TEXTS)
def test_gradients_of_two_rows_that_overflow(kind: str) -> None:
    """Each row makes one column of its visible values overflow; keys of the second row alone keep the other column."""
    attend, tensors = _attention_and_qkv(kind)
    leaves = [x.requires_grad_() for x in tensors]
    out = attend(*leaves)
    weights = torch.ones_like(out)
    wanted = torch.autograd.grad(out, leaves, weights, retain_graph=True)
    weights[:, :, 100, 0], weights[:, :, 200, 1] = math.inf, math.inf
    of_q, of_k, of_v = torch.autograd.grad(out, leaves, weights)
    spoiled = torch.zeros(N, 8, dtype=torch.bool)
    spoiled[:101, 0], spoiled[:201, 1] = True, True
    assert torch.equal(of_v.isfinite(), ~spoiled.expand(of_v.shape))
    assert torch.allclose(of_v[:, :, ~spoiled], wanted[2][:, :, ~spoiled], atol=1e-5)
    assert torch.allclose(of_k[:, :, 201:], wanted[1][:, :, 201:], atol=1e-5)
    other_rows = (torch.arange(N) != 100) & (torch.arange(N) != 200)
    assert torch.allclose(of_q[:, :, other_rows], wanted[0][:, :, other_rows], atol=1e-5)
    assert not of_q[:, :, ~other_rows].isfinite().any()


def test_a_small_call_evaluates_factor_and_bias_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor was evaluated for every tile and once more, which took a twentieth of the time of a 64-token call."""
    attend, tensors = _attention_and_qkv("bias")
    evaluated: list[object] = []

    class Counted(BlockValues):
        def __init__(self, *given: Any) -> None:
            evaluated.append(given)
            super().__init__(*given)

    monkeypatch.setattr("attnc.runtime.executors.cpu.block_scores.BlockValues", Counted)
    attend(*(x[:, :, :64] for x in tensors))
    assert len(evaluated) == 2


@pytest.mark.parametrize("kind", ["bias", "score"])
def test_a_row_that_sees_nan_has_a_nan_lse(kind: str) -> None:
    """The LSE of a row of NaN was -inf, like that of a row without keys, and the backward then dropped the NaN."""
    attend, (q, k, v) = _attention_and_qkv(kind)
    k[:, :, 170] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, return_lse=True)
    assert lse[:, :, 170:].isnan().all() and lse[:, :, :170].isfinite().all()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(out[:, :, 170:].sum(), leaves))


def test_a_visible_score_of_minus_infinity_has_weight_0() -> None:
    """If such keys are the only visible keys of a part, the kernel returns a special log-sum-exp for the row."""
    attend, (q, k, v) = _attention_and_qkv("bias")
    q[..., 2] = q[..., 2].abs() + 0.1
    wanted = attend(q, k, v)
    k[:, :, [69, 120, 141], 2] = -math.inf
    out = attend(q, k, v)
    short = attend(q[:, :, :69], k[:, :, :69], v[:, :, :69])
    assert torch.allclose(out[:, :, :69], short, atol=1e-6) and torch.equal(out[:, :, :69], wanted[:, :, :69])
    assert out.isfinite().all()
    score = q @ k.transpose(-1, -2) / 8**0.5
    apart = torch.arange(N)[:, None] - torch.arange(N)
    score = (score + 0.9**apart).masked_fill(apart < 0, -math.inf)
    assert torch.allclose(out, score.softmax(-1) @ v, atol=1e-5)
