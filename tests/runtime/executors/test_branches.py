"""Branches, families of branches, values that one branch reads from another, and `combine`, against torch by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError, compile_attention
from attnc.spec.errors import EvaluationError
from branch_calls import FAMILY, both, operands, positions, scores, softmax, wide
from cases.case import leaf, real
from score_calls import assert_equals


@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_family_has_one_branch_per_index(n: int) -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
        i, j = positions(q, k)
        parts = []
        for c in range(3):
            mask = (i >= j) & (i - j < 3 * 2**c) & ((i - j) % 2**c == 0)
            parts.append(mix[..., c, None] * (softmax(scores(q, k), mask) @ wide(v)))
        return sum(parts[1:], parts[0])

    both(FAMILY, dense, operands(n) | {"mix": leaf(real(2, 4, n, 3), torch.float64)})


HOPS = """pattern hops
    branch near
        visible abs(q - k) <= 1
        value   k
    branch far
        visible abs(q - k) <= 2
        score   scale * dot(q, near[k]) - near.lse[k] / 8
        value   near[k] + near[q]
    combine far
"""


@pytest.mark.parametrize("n", [1, 12, 33])
def test_a_branch_reads_another_at_other_tokens(n: int) -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        score = torch.where((i - j).abs() <= 1, scores(q, k), -math.inf)
        near, lse = torch.softmax(score, -1) @ wide(k), score.logsumexp(-1)
        again = q @ near.mT * q.shape[-1] ** -0.5 - lse[..., None, :] / 8
        weights = softmax(again, (i - j).abs() <= 2)
        return weights @ near + near

    both(HOPS, lambda **x: dense(**x) + 0 * x["v"].sum(), operands(n))


MERGED = """pattern merged
    align end
    branch near
        visible 0 <= q - k < 3
    branch far
        visible k < 2 and k <= q
        score   2 * scale * dot(q, k)
    combine merge(near, far)
"""


def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    i, j = positions(q, k)
    i = i + k.shape[2] - q.shape[2]
    score = torch.cat(
        [
            torch.where((i >= j) & (i - j < 3), scores(q, k), -math.inf),
            torch.where((j < 2) & (j <= i), 2 * scores(q, k), -math.inf),
        ],
        -1,
    )
    return torch.softmax(score, -1) @ torch.cat([wide(v), wide(v)], 2), score.logsumexp(-1)


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (9, 9), (5, 12)])
def test_merge_is_one_softmax_over_both(n_q: int, n_k: int) -> None:
    inputs = operands(n_q, n_k)
    both(MERGED, lambda **x: merged(**x)[0], inputs)
    attend: Any = compile_attention(MERGED)
    for call in (attend, attend.reference):
        _, lse = call(**inputs, return_lse=True)
        wanted = merged(**inputs)[1]
        grad = torch.randn_like(wanted)
        grads = torch.autograd.grad(lse, (inputs["q"], inputs["k"]), grad.to(lse.dtype))
        exact = torch.autograd.grad(wanted, (inputs["q"], inputs["k"]), grad)
        assert_equals(dict(zip("abc", (lse, *grads), strict=True)), dict(zip("abc", (wanted, *exact), strict=True)))


def test_zeros_have_gradients() -> None:
    """A combined entry that is exactly 0 has a gradient like any other entry, although its exponent is undefined."""
    inputs = operands(9)
    inputs["v"] = leaf(inputs["v"].detach() * (torch.arange(4) % 2), torch.float64)
    both(MERGED, lambda **x: merged(**x)[0], inputs)
    text = "pattern p\n    visible k <= q\n    weights exp(score) * (k % 2) / sum(exp(score) for k)\n    value v\n"

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        return softmax(scores(q, k), j <= i) * (j % 2) @ wide(v)

    both(text, dense, inputs)


WEIGHT = """pattern borrowed(window: int = 4)
    branch near
        visible 0 <= q - k < window
    branch both
        visible k <= q
        weights near.weight + 1 / 16
    combine both
"""


def test_the_weight_of_another_branch() -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        weights = softmax(scores(q, k), (i >= j) & (i - j < 4)) + 1 / 16
        return torch.where(i >= j, weights, 0) @ wide(v)

    both(WEIGHT, dense, operands(11))


def test_a_row_without_keys_is_0_and_affects_no_other_row() -> None:
    text = """pattern lonely
    branch near
        visible k < q - 2
    branch all_of_it
        visible k <= q
        value   near[k]
    combine near + all_of_it
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        near = softmax(scores(q, k), j < i - 2) @ wide(v)
        return near + softmax(scores(q, k), j <= i) @ near

    both(text, dense, operands(8))
    both(text, dense, operands(2))


def test_a_family_at_other_positions() -> None:
    text = """pattern p
    branch at[c in 0 .. 2]
        visible 0 <= q - k < 2 + c
    branch far
        visible k <= q
        score at[1].lse[k] + at[0].lse
        value at[1][k] + at[0, k]
    combine far
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        score = scores(q, k)
        masks = [(rows - keys >= 0) & (rows - keys < 2 + c) for c in (0, 1)]
        outs = [softmax(score, mask) @ wide(v) for mask in masks]
        lse = [torch.logsumexp(torch.where(mask, score, -math.inf), -1) for mask in masks]
        return softmax(lse[1][..., None, :] + lse[0][..., None], keys <= rows) @ (outs[0] + outs[1])

    both(text, dense, operands(7))


def test_plans_describe_every_branch() -> None:
    plan = compile_attention(MERGED).plan(64, heads=2)
    assert plan.schedule == "branches"
    assert [name for name, _ in plan.branches] == ["near", "far"]
    assert plan.visible == sum(part.visible or 0 for _, part in plan.branches)
    assert "near:" in str(plan)


def test_the_lse_of_weights_other_than_softmax_is_refused() -> None:
    q, k, v = operands(5).values()
    for text in (FAMILY, WEIGHT, "pattern p\n    weights dot(q, k)\n"):
        attend: Any = compile_attention(text)
        inputs = {"mix": real(2, 4, 5, 3)} if text is FAMILY else {}
        with pytest.raises(UnsupportedError, match="no LSE"):
            attend(q, k, v, return_lse=True, **inputs)


def test_large_families_are_refused() -> None:
    """`make hunt`, part hostile, case 101: 4,462 branches were planned one by one, with no result within 30 seconds."""
    text = (
        "pattern p\n    align end\n    branch b[c in 0 .. {}]\n        visible 0 <= q - k < c + 1\n    combine b[0]\n"
    )
    attend = compile_attention(text.format(4462))
    for call in (lambda: attend.plan(16, heads=1), lambda: attend.mask(16)):
        with pytest.raises(EvaluationError, match="`b` has 4462 branches; it must have at most 128"):
            call()
    assert compile_attention(text.format(3)).plan(16, heads=1).visible
