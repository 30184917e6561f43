"""Operands that are empty, not selected or out of range: no crash, no gradient, and the evaluator's result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import EvaluationError, compile_attention
from attnc.spec.meaning.evaluate import Evaluator
from branch_calls import FAMILY, both, operands, positions, scores, softmax, wide
from weight_calls import check


def test_an_unused_case_of_combine_has_no_gradient() -> None:
    """Rows below 3 see no key in `far`: its LSE is -inf there, and expressions of this LSE are NaN."""
    text = """pattern p
    branch near
        visible 0 <= q - k < 2
    branch far
        visible q - k >= 3
    combine near + exp(far.lse - near.lse) * far if q >= 3 else near * sigmoid(far.lse - far.lse + 1)
"""
    inputs = operands(7)
    attend: Any = compile_attention(text.replace("far.lse - far.lse + 1", "near.lse"))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        score, late = scores(q, k), rows[:, 0] >= 3
        masks = [(rows - keys >= 0) & (rows - keys < 2), rows - keys >= 3]
        near, far = (softmax(score, mask) @ wide(v) for mask in masks)
        lse = [
            torch.logsumexp(torch.where(mask, score, -math.inf)[..., n:, :], -1)
            for mask, n in zip(masks, (0, 3), strict=True)
        ]
        mixed = near[..., 3:, :] + torch.exp(lse[1] - lse[0][..., 3:])[..., None] * far[..., 3:, :]
        early = near[..., :3, :] * torch.sigmoid(lse[0][..., :3])[..., None]
        assert late.sum() == 4
        return torch.cat([early, mixed], -2)

    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x), dense, inputs)


def test_sums_over_ranges_with_gaps_have_gradients() -> None:
    """The logarithm of a 0 outside every range does not count."""
    text = """pattern p
    input f: real[token]
    visible k <= q
    score scale * dot(q, k) + sum(log(f[j]) for j in 4 * (k // 4) .. 4 * (k // 4) + 3)
"""
    inputs = operands(12)
    f = torch.rand(12, dtype=torch.float64) + 0.5
    f[3::4] = 0
    inputs["f"] = f.requires_grad_()

    def dense(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        logs = f.reshape(3, 4)[:, :3].log().sum(-1).repeat_interleave(4)
        return softmax(scores(q, k) + logs, keys <= rows) @ wide(v)

    both(text, dense, inputs)


def test_a_weight_among_scores_of_minus_infinity_is_0() -> None:
    text = """pattern p
    input bias: real[key]
    branch near
        visible k <= q
        score scale * dot(q, k) + bias[k]
    branch far
        visible k <= q
        weights near.weight
    combine far
"""
    inputs = operands(6)
    bias = torch.zeros(6, dtype=torch.float64)
    bias[:2] = -math.inf

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        return softmax(scores(q, k), (keys <= rows) & (keys >= 2)) @ wide(v)

    attend: Any = compile_attention(text)
    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x, bias=bias), dense, inputs)


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0), (0, 0)])
def test_empty_operands_have_gradients(batch: int, rows: int) -> None:
    attend: Any = compile_attention(FAMILY)
    q, k, v = (torch.randn(batch, 2, n, 4, requires_grad=True) for n in (rows, rows, rows))
    mix = torch.randn(batch, 2, rows, 3, requires_grad=True)
    for run in (attend, attend.reference):
        out = run(q, k, v, mix=mix)
        assert out.shape == (batch, 2, rows, 4)
        grads = torch.autograd.grad(out.sum(), (q, k, v, mix))
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, mix.shape]


def test_a_branch_out_of_range() -> None:
    text = FAMILY.replace("sum(mix[q, c] * at[c] for c in 0 .. scales)", "at[q] + 0 * mix[0, 0] * at[0]")
    inputs = operands(5)
    for call in (compile_attention(text), compile_attention(text).reference):
        with pytest.raises(EvaluationError, match=r"3[^\0]*A902|A902[^\0]*3"):
            call(inputs["q"], inputs["k"], inputs["v"], mix=torch.zeros(2, 4, 5, 3, dtype=torch.float64))


TRICKY = {
    "a sum of no vectors": """pattern p
    visible k <= q
    value v + sum(v[j] for j in k + 1 .. min(k + 3, q))
""",
    "an inner product with a sum of no vectors": """pattern p
    visible k <= q
    score scale * dot(q, sum(k[j] for j in k .. q)) + dot(q, normalised(sum(k[j] for j in k + 1 .. k + 1)))
""",
    "an entry of a sum of no vectors": """pattern p
    visible k <= q
    score scale * dot(q, k) + sum(k[j] for j in k + 1 .. q)[1]
""",
    "names of keys in two branches": """pattern p
    branch near
        over i = k // 2
        visible i <= q // 2
        score dot(q, mean(k for k in i))
        value mean(v for k in i)
    branch far
        over j = k // 2
        visible j <= q // 2
        score dot(q, mean(k for k in j))
        weights 2 * near.weight
        value mean(v for k in j)
    combine far - near
""",
    "the logarithm of a share that underflows": """pattern p
    visible k <= q
    weights -log(softmax(1000 * dot(q, k)))
""",
    "a share of an underflow": """pattern p
    visible k <= q
    weights softmax(1000 * dot(q, k)) / sum(softmax(1000 * dot(q, k)) for k if k > 0)
""",
    "conjugate gradients that arrive early": """pattern p
    approximate conjugate_gradient(4)
    visible k <= q
    score scale * dot(q, solve(2 * eye(dk), k))
""",
    "units of queries under a sum over queries": """pattern p
    branch near
        per p = q // 2
        visible k // 2 <= p
        score scale * dot(sum(q for q in p), k)
    combine near
""",
}


@pytest.mark.parametrize("name", sorted(TRICKY))
@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_reference_and_the_cpu_agree_with_the_evaluator(name: str, n: int) -> None:
    attend: Any = compile_attention(TRICKY[name])
    inputs = {key: x.detach() for key, x in operands(n).items()}
    oracle = Evaluator(attend.bound, queries=n, keys=n, heads=4, kv_heads=2, dk=4, dv=4)
    wanted = torch.tensor(oracle.attend(*(inputs[x].tolist() for x in "qkv"))[0], dtype=torch.float64)
    for run in (attend.reference, attend):
        torch.testing.assert_close(run(**inputs), wanted, rtol=1e-9, atol=1e-9, equal_nan=True)
