"""Weight and value formulas: small patterns whose results are written out in torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import EvaluationError, UnsupportedError, compile_attention
from attnc.runtime.executors.cpu import row_blocks
from branch_calls import both, operands, positions, scores, softmax, wide
from cases.case import leaf, real
from weight_calls import results


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_quotients_of_large_exponentials(size: float) -> None:
    text = """pattern p
    input bias: real[query, key]
    visible k <= q
    score   scale * dot(q, k) + bias[q, k]
    weights exp(2 * score) / sum(exp(score) for k) * log(sum(exp(score) for k)) / sum(exp(score - 3) for k if k >= 0)
"""
    tensors = operands(10) | {"bias": leaf(real(10, 10) * size, torch.float64)}

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        i, j = positions(q, k)
        score = torch.where(j <= i, scores(q, k) + bias, -math.inf)
        lse = score.logsumexp(-1, keepdim=True)
        return (2 * (score - lse) + 3).exp() * lse @ wide(v)

    wanted = dense(**tensors)
    attend: Any = compile_attention(text)
    grad = torch.ones_like(wanted)
    for run in (attend, attend.reference):
        out, exact = results(lambda call=run, **x: call(**x), tensors, grad), results(dense, tensors, grad)
        for name, x in exact.items():
            torch.testing.assert_close(out[name], x, rtol=1e-8, atol=1e-8, equal_nan=True, msg=name)


def test_a_softmax_with_sinks_in_a_formula() -> None:
    text = """pattern p
    learned sink: real[head, 2]
    visible k <= q
    weights 2 * softmax(score / 2, extra = sink)
"""
    for large in (0.0, 100.0, -100.0):

        def dense(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
            i, j = positions(q, k)
            score = torch.where(j <= i, scores(q, k) / 2, -math.inf)
            extra = sink[None, :, None].expand(2, 4, q.shape[2], 2)
            return 2 * torch.softmax(torch.cat([score, extra], -1), -1)[..., : k.shape[2]] @ wide(v)

        both(text, dense, operands(8) | {"sink": leaf(real(4, 2) + large, torch.float64)})


def test_strict_refuses_passes_that_need_each_other() -> None:
    with pytest.raises(UnsupportedError, match="2 passes"):
        compile_attention("softplus_lssar", strict=True)
    three = """pattern p
    visible k <= q
    let a = exp(score / (1 + sum(softplus(score) for k)))
    let b = relu(a / sum(a for k) - 1 / 8) ** 2
    weights tanh(b - sum(b for k) / 4)
"""
    with pytest.raises(UnsupportedError, match="4 passes"):
        compile_attention(three, strict=True)
    compile_attention("landmark", strict=True)
    assert "2 passes" in str(compile_attention("softplus_lssar").plan(64))


def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    text = "pattern p\n    visible k <= q\n    weights relu(score) ** 2 / sum(relu(score) ** 2 for k)\n"
    x = operands(4)["q"]
    out = compile_attention(text)(x, x, x)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(first.sum(), x)
    reference = compile_attention(text, backend="reference")
    assert torch.autograd.gradgradcheck(lambda q: reference(q, q, q), operands(3, d=2)["q"][:1, :2])


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_large_terms_with_a_zero_gate_do_not_hide_others(size: float) -> None:
    text = """pattern p
    input bias: real[query, key]
    input open: int[batch, key]
    visible k <= q
    score   scale * dot(q, k) + bias[q, k]
    weights exp(score) * open[k] / sum(exp(score) * open[k] for k)
"""
    gate = (torch.arange(20).reshape(2, 10) % 3 == 0).long()
    gate[:, 0] = 1

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, open: Tensor) -> Tensor:
        i, j = positions(q, k)
        return softmax(scores(q, k) + bias, (j <= i) & (open[:, None, None] == 1)) @ wide(v)

    bias = (1 - gate[0]) * size + real(10, 10)  # keys with a closed gate have by far the largest scores
    both(text, dense, operands(10) | {"bias": leaf(bias, torch.float64), "open": gate})


@pytest.mark.parametrize("elements", [1 << 21, 1 << 9])
def test_vectors_from_a_table(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that meet queries, and vectors that meet keys; computed in one block, and row by row."""
    monkeypatch.setattr(row_blocks, "ELEMENTS", elements)
    text = """pattern p
    learned near: real[span, dk]
    visible k <= q
    score   scale * dot(q, k) + dot(q, near[k - q + 20]) {}
    weights relu(score) ** 2 / (1 + sum(relu(score) ** 2 for k))
"""

    def weights(q: Tensor, k: Tensor, near: Tensor, more: float) -> Tensor:
        i, j = positions(q, k)
        score = scores(q, k) + (q[:, :, :, None] * near[j - i + 20]).sum(-1)
        score = score + more * (wide(k)[:, :, None] * near[i - j + 20]).sum(-1)
        squares = torch.where(j <= i, score.relu() ** 2, 0)
        return squares / (1 + squares.sum(-1, keepdim=True))

    tensors = operands(10) | {"near": leaf(real(41, operands(10)["q"].shape[-1]), torch.float64)}
    for more, term in ((0.0, ""), (2.0, "+ 2 * dot(near[q - k + 20], k)")):
        both(text.format(term), lambda q, k, v, near, more=more: weights(q, k, near, more) @ wide(v), tensors)


def test_key_counts_of_rows_without_keys() -> None:
    text = """pattern p
    visible k < q - 1
    weights (1 + score ** 2) / count(visible for k)
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        mask = j < i - 1
        return torch.where(mask, (1 + scores(q, k) ** 2) / mask.sum(-1, keepdim=True).clamp(min=1), 0) @ wide(v)

    for n in (1, 2, 9):
        both(text, dense, operands(n))


def test_relations_of_queries_that_begin_late() -> None:
    """Rows are shifted by the number of earlier keys exactly once."""
    text = """pattern p
    align   end
    visible q == keys - queries or k == 2 * (keys - queries)
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        apart = k.shape[2] - q.shape[2]
        return softmax(scores(q, k), (i + apart == apart) | (j == 2 * apart)) @ wide(v)

    for sizes in ((5, 8), (4, 4), (1, 7)):
        both(text, dense, operands(*sizes))


def test_rows_that_see_only_scores_of_minus_infinity() -> None:
    text = """pattern p
    input bias: real[query, key]
    learned sink: real[head]
    visible k <= q
    score   scale * dot(q, k) + bias[q, k]
    weights softmax(score, extra = sink)
"""
    bias = torch.zeros(6, 6)
    bias[2], bias[4, :3] = -math.inf, -math.inf

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        i, j = positions(q, k)
        score = torch.where(j <= i, scores(q, k) + bias, -math.inf)
        extra = sink[None, :, None, None].expand(2, 4, 6, 1)
        return torch.softmax(torch.cat([score, extra], -1), -1)[..., :6] @ wide(v)

    both(text, dense, operands(6) | {"bias": bias.double(), "sink": leaf(real(4), torch.float64)})


def test_conjugate_gradients_that_converge_early_have_gradients() -> None:
    text = """pattern p
    visible k <= q
    weights 1
    value   dot(q[q], solve(eye(dk), q[q])) * v[k]
    approximate conjugate_gradient(6)
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        return q.square().sum(-1, keepdim=True) * ((j <= i).to(q.dtype) @ wide(v))

    both(text, lambda **x: dense(**x) + 0 * x["k"].sum(), operands(7))


def test_a_singular_system_raises() -> None:
    text = "pattern p\n    visible k <= q\n    weights 1\n    value dot(q[q], solve(outer(k[k], k[k]), q[q])) * v[k]\n"
    attend: Any = compile_attention(text)
    ones = torch.ones(1, 1, 4, 2)
    for run in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="singular") as raised:
            run(ones, ones, ones)
        assert "diagonal" in str(raised.value)


def test_sums_of_no_vectors_are_vectors() -> None:
    text = "pattern p\n    visible k <= q\n    value sum(v[k - j] for j in 1 .. 1 + min(k, 0))\n"
    both(text, lambda q, k, v: 0 * (q + wide(k) + wide(v)), operands(4))


def test_a_width_that_the_value_does_not_read() -> None:
    text = """pattern p
    per     q, i in 0 .. dk
    visible k <= q
    score   scale * dot(q, k)
    value   v[k][0]
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        return (softmax(scores(q, k), j <= i) @ wide(v)[..., :1]).expand(*q.shape)

    both(text, dense, operands(5))


def test_positions_outside_of_the_keys_raise() -> None:
    text = "pattern p\n    visible k <= q\n    value v[k - 1]\n"
    attend: Any = compile_attention(text)
    x = operands(5)
    for run in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="-1") as raised:
            run(**x)
        assert "A902" in str(raised.value)


NUMBERS = [
    ("score 1e-19 * dot(q, k)", {}, lambda i, j, s: 1e-19 * 2 * s),
    ("score 1e19 * dot(q, k)", {}, lambda i, j, s: 1e19 * 2 * s),
    ("score s * dot(q, k)", {"s": 1.2345678901234567e-17}, lambda i, j, s: 1.2345678901234567e-17 * 2 * s),
    ("score scale * dot(q, k) - slope * (q - k)", {"slope": [2**-0.7, 2**-1.3, 0.1, 3]}, None),
    ("score scale * dot(q, k) * 0.9 ** (q - k)", {}, lambda i, j, s: s * 0.9 ** (i - j)),
    ("score 0.1234567 ** 3 * (q - k)", {}, lambda i, j, s: 0.1234567**3 * (i - j) + 0 * s),
    (
        "score cos(3.141592653589793 / 2 * (q - k) / keys)",
        {},
        lambda i, j, s: torch.cos(math.pi / 2 * (i - j) / 300) + 0 * s,
    ),
]


@pytest.mark.parametrize(("line", "params", "formula"), NUMBERS, ids=[line for line, _, _ in NUMBERS])
def test_numbers_beyond_64_bits(line: str, params: dict[str, Any], formula: Any) -> None:
    """Exact constants of a score are converted to floating point in the end."""
    inputs = ", ".join(f"{name}: real{'[head]' if isinstance(x, list) else ''}" for name, x in params.items())
    text = f"pattern p{f'({inputs})' if inputs else ''}\n    visible k <= q\n    {line}\n"

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        if formula is None:
            score = scores(q, k) - torch.tensor(params["slope"], dtype=q.dtype)[:, None, None] * (i - j)
        else:
            score = formula(i.double(), j.double(), scores(q, k))
        return softmax(score, j <= i) @ wide(v)

    operand = {name: x.detach() for name, x in operands(300).items()}
    wanted, attend = dense(**operand), compile_attention(text, **params)
    for out in (attend(*operand.values()), attend.reference(*operand.values())):
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_of_conjugate_gradients(steps: int) -> None:
    text = f"""pattern p
    visible k <= q
    let w = softmax(score)
    let a = sum(w * outer(k[k], k[k]) for k) + eye(dk)
    weights w * dot(solve(a, q), k)
    approximate conjugate_gradient({steps})
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        w = softmax(scores(q, k), j <= i)
        a = torch.einsum("bhqk,bhki,bhkj->bhqij", w, wide(k), wide(k)) + torch.eye(q.shape[-1], dtype=q.dtype)
        x, r = torch.zeros_like(q), q
        p, size = r, r.square().sum(-1, keepdim=True)
        for _ in range(steps):
            ap = torch.einsum("bhqij,bhqj->bhqi", a, p)
            alpha = size / (p * ap).sum(-1, keepdim=True)
            x, r = x + alpha * p, r - alpha * ap
            smaller = r.square().sum(-1, keepdim=True)
            p, size = r + smaller / size * p, smaller
        return (w * (x @ wide(k).mT)) @ wide(v)

    both(text, dense, operands(9))


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, -717.0), (torch.float32, -92.0)])
def test_division_by_a_subnormal_sum_has_gradients(dtype: torch.dtype, far: float) -> None:
    """`make hunt`, part triton, case 60219: 1 / sum overflowed, so gradients were NaN."""
    text = (
        "pattern p\n    input b: real[batch, query]\n    visible k <= q\n    score scale * dot(q, k) + b[q]\n"
        "    weights softplus(score) / sum(softplus(score) for k)\n"
    )
    tensors = {name: leaf(real(1, 2, 7, 4), dtype) for name in "qkv"}
    tensors["b"] = leaf((torch.arange(7) % 2 * far)[None], dtype)

    def dense(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        score = q @ k.mT * 0.5 + b[:, None, :, None]
        hidden = torch.ones_like(score).triu(1) > 0
        logs = torch.where(b[:, None, :, None] < 0, score, torch.log(torch.nn.functional.softplus(score)))
        return torch.softmax(torch.where(hidden, -math.inf, logs), -1) @ v

    attend: Any = compile_attention(text)
    out, exact = attend(**tensors), dense(**tensors)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x.square().sum(), [*tensors.values()]) for x in (out, exact)]
    for name, grad, true in zip(tensors, *grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-5, msg=name)
