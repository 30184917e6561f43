"""Weights, keys, values and branches: small patterns whose results are written out by hand in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import EvaluationError, UnsupportedError, compile_attention
from attnc.spec.meaning.evaluate import Evaluator
from score_calls import assert_equals, leaf, real
from weight_calls import check, results

Dense = Callable[..., Tensor]


def operands(n_q: int, n_k: int | None = None, *, d: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    n_k = n_q if n_k is None else n_k
    sizes = {"q": (2, 4, n_q, d), "k": (2, 2, n_k, d), "v": (2, 2, n_k, d)}
    return {name: leaf(real(*size), dtype) for name, size in sizes.items()}


def wide(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ wide(k).mT) / math.sqrt(q.shape[-1])


def softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Rows without a key are 0."""
    seen = mask.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(mask | ~seen, score, -math.inf), -1)
    return torch.where(seen, weights, 0)


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]


def both(text: str, dense: Dense, given: dict[str, Tensor], **params: Any) -> None:
    """The cpu executor and the reference give what the formula does, with gradients."""
    attend: Any = compile_attention(text, **params)
    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x), dense, given)


# --- branches ---------------------------------------------------------------------------------------------------------

FAMILY = """pattern scales(scales: int = 3)
    input mix: real[batch, head, query, m]
    branch at[c in 0 .. scales]
        visible 0 <= q - k < 3 * 2 ** c and (q - k) % 2 ** c == 0
    combine sum(mix[q, c] * at[c] for c in 0 .. scales)
"""


@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_family_is_one_branch_for_each_place(n: int) -> None:
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
    given = operands(n_q, n_k)
    both(MERGED, lambda **x: merged(**x)[0], given)
    attend: Any = compile_attention(MERGED)
    for call in (attend, attend.reference):
        _, lse = call(**given, return_lse=True)
        wanted = merged(**given)[1]
        grad = torch.randn_like(wanted)
        found = torch.autograd.grad(lse, (given["q"], given["k"]), grad.to(lse.dtype))
        exact = torch.autograd.grad(wanted, (given["q"], given["k"]), grad)
        assert_equals(dict(zip("abc", (lse, *found), strict=True)), dict(zip("abc", (wanted, *exact), strict=True)))


def test_zeros_have_gradients_too() -> None:
    """An entry that is exactly 0 has no exponent of its own, and a gradient like any other."""
    given = operands(9)
    given["v"] = leaf(given["v"].detach() * (torch.arange(4) % 2), torch.float64)
    both(MERGED, lambda **x: merged(**x)[0], given)
    text = "pattern p\n    visible k <= q\n    weights exp(score) * (k % 2) / sum(exp(score) for k)\n    value v\n"

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        return softmax(scores(q, k), j <= i) * (j % 2) @ wide(v)

    both(text, dense, given)


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


def test_a_row_without_keys_is_nothing_and_hurts_nobody() -> None:
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


# --- keys -------------------------------------------------------------------------------------------------------------

TILES = """pattern tiles(height: int, width: int, size: int = 2)
    tokens y: height, x: width
    over   b = [k.y // size, k.x // size]
    visible abs(b[0] - q.y // size) + abs(b[1] - q.x // size) <= 1
    score  scale * dot(q, mean(b.k)) + log(b.size)
    value  max(b.v)
"""


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5), (1, 1)])
def test_keys_that_are_tiles_of_a_grid(height: int, width: int) -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        down, across = -(-height // 2), -(-width // 2)
        token = torch.arange(height * width)
        tile = token // width // 2 * across + token % width // 2
        keys, values, sizes = [], [], []
        for b in range(down * across):
            here = token[tile == b]
            keys.append(k[:, :, here].mean(2))
            values.append(v[:, :, here].amax(2))
            sizes.append(len(here))
        score = q @ wide(torch.stack(keys, 2)).mT * q.shape[-1] ** -0.5 + torch.tensor(sizes).double().log()
        number = torch.arange(down * across)
        apart = (number // across - (token // width // 2)[:, None]).abs()
        apart = apart + (number % across - (token % width // 2)[:, None]).abs()
        return softmax(score, apart <= 1) @ wide(torch.stack(values, 2))

    both(TILES, dense, operands(height * width), height=height, width=width)


def test_blocks_of_queries_attend_to_shifted_blocks_of_keys() -> None:
    text = """pattern blocks
    per   a = q // 3
    over  b = (k + 1) // 4
    score scale * dot(mean(a.q), mean(b.k)) + a.size * b.start / 8
    value mean(b.v)
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        token = torch.arange(q.shape[2])
        rows = [token[token // 3 == a] for a in range(int(token[-1]) // 3 + 1)]
        cols = [token[(token + 1) // 4 == b] for b in range((int(token[-1]) + 1) // 4 + 1)]
        queries = torch.stack([q[:, :, r].mean(2) for r in rows], 2)
        keys, values = (torch.stack([x[:, :, c].mean(2) for c in cols], 2) for x in (k, v))
        bias = torch.tensor([[len(r) * int(c[0]) / 8 for c in cols] for r in rows])
        out = torch.softmax(queries @ wide(keys).mT * q.shape[-1] ** -0.5 + bias, -1) @ wide(values)
        return out[:, :, token // 3]

    for n in (1, 10, 14):
        both(text, dense, operands(n))


def test_a_row_of_numbers() -> None:
    text = """pattern p
    per     q, i in 0 .. dk
    visible k <= q
    score   scale * q[q][i] * dot(k, k)
    value   v[k][i]
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        square = wide(k).square().sum(-1)
        score = q.shape[-1] ** -0.5 * q.unsqueeze(-1) * square[:, :, None, None]
        weights = softmax(score, (j <= i)[:, None])
        return torch.einsum("bhqik,bhki->bhqi", weights, wide(v))

    both(text, dense, operands(9))


def test_keys_of_a_range_of_learned_vectors() -> None:
    text = """pattern induced(m: int = 3)
    learned ik: real[head, m, dk]
    learned iv: real[head, m, dv]
    branch near
        visible abs(q - k) <= 2
    branch far
        over  i in 0 .. m
        score scale * dot(q, ik[i])
        value iv[i]
    combine merge(near, far)
"""

    def dense(q: Tensor, k: Tensor, v: Tensor, ik: Tensor, iv: Tensor) -> Tensor:
        i, j = positions(q, k)
        own = torch.where((i - j).abs() <= 2, scores(q, k), -math.inf)
        score = torch.cat([own, q @ ik.mT * q.shape[-1] ** -0.5], -1)
        return torch.softmax(score, -1) @ torch.cat([wide(v), iv.expand(2, *iv.shape)], 2)

    both(text, dense, operands(13) | {name: leaf(real(4, 3, 4), torch.float64) for name in ("ik", "iv")})
    module: Any = compile_attention(text).module(heads=4, dk=4, dv=4)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"ik": (4, 3, 4), "iv": (4, 3, 4)}


# --- weights ----------------------------------------------------------------------------------------------------------


def test_keys_with_two_names_are_the_pairs_of_their_ranges() -> None:
    text = """pattern p
    over  f in 1 .. 3, y in 2 .. 5
    visible f + y > q % 3 + 3
    score dot(q, k[f]) / (y + 1)
    value v[y] * f
"""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = [(f, y) for f in (1, 2) for y in (2, 3, 4)]
        score = torch.stack([(q * wide(k)[:, :, f, None]).sum(-1) / (y + 1) for f, y in pairs], -1)
        rows = torch.arange(q.shape[2])[:, None]
        seen = torch.tensor([f + y for f, y in pairs])[None] > rows % 3 + 3
        values = torch.stack([wide(v)[:, :, y] * f for f, y in pairs], -2)
        return softmax(score, seen) @ values

    both(text, dense, operands(7))


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


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_quotients_of_large_exponentials(size: float) -> None:
    text = """pattern p
    input bias: real[query, key]
    visible k <= q
    score   scale * dot(q, k) + bias[q, k]
    weights exp(2 * score) / sum(exp(score) for k) * log(sum(exp(score) for k)) / sum(exp(score - 3) for k if k >= 0)
"""
    given = operands(10) | {"bias": leaf(real(10, 10) * size, torch.float64)}

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        i, j = positions(q, k)
        score = torch.where(j <= i, scores(q, k) + bias, -math.inf)
        lse = score.logsumexp(-1, keepdim=True)
        return (2 * (score - lse) + 3).exp() * lse @ wide(v)

    wanted = dense(**given)
    attend: Any = compile_attention(text)
    grad = torch.ones_like(wanted)
    for run in (attend, attend.reference):
        found, exact = results(lambda call=run, **x: call(**x), given, grad), results(dense, given, grad)
        for name, x in exact.items():
            torch.testing.assert_close(found[name], x, rtol=1e-8, atol=1e-8, equal_nan=True, msg=name)


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


def test_plans_of_branches_say_what_each_does() -> None:
    plan = compile_attention(MERGED).plan(64, heads=2)
    assert plan.schedule == "branches"
    assert [name for name, _ in plan.branches] == ["near", "far"]
    assert plan.visible == sum(part.visible or 0 for _, part in plan.branches)
    assert "near:" in str(plan)


def test_the_lse_of_what_is_no_softmax_is_refused() -> None:
    q, k, v = operands(5).values()
    for text in (FAMILY, WEIGHT, "pattern p\n    weights dot(q, k)\n"):
        attend: Any = compile_attention(text)
        inputs = {"mix": real(2, 4, 5, 3)} if text is FAMILY else {}
        with pytest.raises(UnsupportedError, match="no LSE"):
            attend(q, k, v, return_lse=True, **inputs)


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
def test_terms_that_a_gate_makes_nothing_do_not_hide_the_others(size: float) -> None:
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

    bias = (1 - gate[0]) * size + real(10, 10)  # the closed ones have far the largest scores
    both(text, dense, operands(10) | {"bias": leaf(bias, torch.float64), "open": gate})


def test_a_number_of_keys_that_no_row_with_keys_is_divided_by() -> None:
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
    """Shifted by the number of earlier keys, once."""
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


def test_conjugate_gradients_that_are_there_early_have_gradients() -> None:
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


def test_a_singular_system_is_an_error_that_says_so() -> None:
    text = "pattern p\n    visible k <= q\n    weights 1\n    value dot(q[q], solve(outer(k[k], k[k]), q[q])) * v[k]\n"
    attend: Any = compile_attention(text)
    ones = torch.ones(1, 1, 4, 2)
    for run in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="singular") as found:
            run(ones, ones, ones)
        assert "diagonal" in str(found.value)


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


def test_positions_outside_of_the_keys_are_an_error_and_no_zeros() -> None:
    text = "pattern p\n    visible k <= q\n    value v[k - 1]\n"
    attend: Any = compile_attention(text)
    x = operands(5)
    for run in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="-1") as found:
            run(**x)
        assert "A902" in str(found.value)


def test_packed_rows_without_keys_of_a_formula() -> None:
    text = "pattern p\n    visible k < q\n    weights relu(score) / (1 + sum(relu(score) for k))\n"
    attend: Any = compile_attention(text)
    given, ends = operands(9), [0, 1, 2, 9]

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = [tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in pairwise(ends)]
        return torch.cat([attend(*tensors) for tensors in own], 2)

    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x, cu_seqlens=torch.tensor(ends)), apart, given)


# --- several sequences in one -----------------------------------------------------------------------------------------

SEQUENCES = [("causal", {}), ("sliding_window", {"window": 4}), ("softcap", {"window": 6}), ("softplus_lssar", {})]


@pytest.mark.parametrize(("name", "params"), SEQUENCES)
@pytest.mark.parametrize("ends", [[0, 5, 5, 6, 20, 33], [0, 0, 33, 33], [0, 33]])
def test_packed_sequences_are_as_if_called_alone(name: str, params: dict[str, Any], ends: list[int]) -> None:
    attend: Any = compile_attention(name, **params)
    given, cu = operands(33), torch.tensor(ends, dtype=torch.int32)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = [tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in pairwise(ends) if b > a]
        return torch.cat([attend(*tensors) for tensors in own], 2)

    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x, cu_seqlens=cu), apart, given)


def test_packed_calls_compile_to_one_graph_for_all_lengths() -> None:
    attend = compile_attention("sliding_window", window=3)
    compiled = torch.compile(lambda q, k, v, cu: attend(q, k, v, cu_seqlens=cu), backend="aot_eager", fullgraph=True)
    q, k, v = (x.detach() for x in operands(20).values())
    for ends in ([0, 7, 20], [0, 1, 1, 20]):
        cu = torch.tensor(ends)
        torch.testing.assert_close(compiled(q, k, v, cu), attend(q, k, v, cu_seqlens=cu))


@pytest.mark.parametrize(
    ("name", "params", "ends", "says"),
    [
        ("causal", {}, [0, 5], "from 0 to the number of keys, 9"),
        ("causal", {}, [1, 9], "from 0"),
        ("causal", {}, [], "from 0"),
        ("causal", {}, [0, 6, 4, 9], "falls after entry 1"),
        ("document", {}, [0, 9], "give `doc` instead"),
        ("combiner", {"segment": 3}, [0, 9], "call it once for each sequence"),
        ("neighborhood_2d", {"height": 3, "width": 3, "window": 3}, [0, 9], "call it once for each sequence"),
    ],
)
def test_wrong_cumulative_lengths(name: str, params: dict[str, Any], ends: list[int], says: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=says):
        compile_attention(name, **params)(*operands(9).values(), cu_seqlens=torch.tensor(ends, dtype=torch.int64))


# --- numbers ----------------------------------------------------------------------------------------------------------

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
def test_numbers_that_64_bits_do_not_hold(line: str, params: dict[str, Any], formula: Any) -> None:
    """Exact constants of scores, which are floating point in the end."""
    given = ", ".join(f"{name}: real{'[head]' if isinstance(x, list) else ''}" for name, x in params.items())
    text = f"pattern p{f'({given})' if given else ''}\n    visible k <= q\n    {line}\n"

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        if formula is None:
            score = scores(q, k) - torch.tensor(params["slope"], dtype=q.dtype)[:, None, None] * (i - j)
        else:
            score = formula(i.double(), j.double(), scores(q, k))
        return softmax(score, j <= i) @ wide(v)

    operand = {name: x.detach() for name, x in operands(300).items()}
    wanted, attend = dense(**operand), compile_attention(text, **params)
    for found in (attend(*operand.values()), attend.reference(*operand.values())):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


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


# --- who sees whom ----------------------------------------------------------------------------------------------------


def test_masks_of_padded_grids_and_of_units_are_of_tokens() -> None:
    token = torch.arange(6 * 5)
    y, x = token // 5, token % 5
    windows = compile_attention("davit_window", height=6, width=5, window=4)
    same = (y[:, None] // 4 == y // 4) & (x[:, None] // 4 == x // 4)
    assert torch.equal(windows.mask(30), same)
    halo = compile_attention("halo", height=6, width=5, block=2, halo=1)
    near = [(b - a[:, None] // 2 * 2 >= -1) & (b - a[:, None] // 2 * 2 < 3) for a, b in ((y, y), (x, x))]
    assert torch.equal(halo.mask(30), near[0] & near[1])
    n = torch.arange(20)
    combiner = compile_attention("combiner", segment=6)
    own = (n <= n[:, None]) & (n // 6 == n[:, None] // 6)
    past = n // 6 < n[:, None] // 6
    assert torch.equal(combiner.mask(20), own | past)


def test_keys_that_are_no_tokens_have_no_mask() -> None:
    with pytest.raises(UnsupportedError, match="no mask of tokens"):
        compile_attention("davit_channel").mask(8)


# --- what is not there, or not chosen ---------------------------------------------------------------------------------


def test_a_case_of_combine_that_is_not_chosen_has_no_gradient() -> None:
    """Rows below 3 see nothing in `far`: its LSE is -inf there, and what is made of it no number."""
    text = """pattern p
    branch near
        visible 0 <= q - k < 2
    branch far
        visible q - k >= 3
    combine near + exp(far.lse - near.lse) * far if q >= 3 else near * sigmoid(far.lse - far.lse + 1)
"""
    given = operands(7)
    attend: Any = compile_attention(text.replace("far.lse - far.lse + 1", "near.lse"))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        score, late = scores(q, k), rows[:, 0] >= 3
        seen = [(rows - keys >= 0) & (rows - keys < 2), rows - keys >= 3]
        near, far = (softmax(score, mask) @ wide(v) for mask in seen)
        lse = [
            torch.logsumexp(torch.where(mask, score, -math.inf)[..., n:, :], -1)
            for mask, n in zip(seen, (0, 3), strict=True)
        ]
        mixed = near[..., 3:, :] + torch.exp(lse[1] - lse[0][..., 3:])[..., None] * far[..., 3:, :]
        early = near[..., :3, :] * torch.sigmoid(lse[0][..., :3])[..., None]
        assert late.sum() == 4
        return torch.cat([early, mixed], -2)

    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x), dense, given)


def test_sums_with_gaps_between_their_ranges_have_gradients() -> None:
    """The logarithm of a 0 that is in no range has no say."""
    text = """pattern p
    input f: real[token]
    visible k <= q
    score scale * dot(q, k) + sum(log(f[j]) for j in 4 * (k // 4) .. 4 * (k // 4) + 3)
"""
    given = operands(12)
    f = torch.rand(12, dtype=torch.float64) + 0.5
    f[3::4] = 0
    given["f"] = f.requires_grad_()

    def dense(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        logs = f.reshape(3, 4)[:, :3].log().sum(-1).repeat_interleave(4)
        return softmax(scores(q, k) + logs, keys <= rows) @ wide(v)

    both(text, dense, given)


def test_a_weight_among_scores_of_minus_infinity_is_nothing() -> None:
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
    given = operands(6)
    bias = torch.zeros(6, dtype=torch.float64)
    bias[:2] = -math.inf

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        return softmax(scores(q, k), (keys <= rows) & (keys >= 2)) @ wide(v)

    attend: Any = compile_attention(text)
    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x, bias=bias), dense, given)


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_at_all_has_gradients(batch: int, rows: int) -> None:
    attend: Any = compile_attention(FAMILY)
    q, k, v = (torch.randn(batch, 2, n, 4, requires_grad=True) for n in (rows, rows, rows))
    mix = torch.randn(batch, 2, rows, 3, requires_grad=True)
    for run in (attend, attend.reference):
        out = run(q, k, v, mix=mix)
        assert out.shape == (batch, 2, rows, 4)
        grads = torch.autograd.grad(out.sum(), (q, k, v, mix))
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, mix.shape]


def test_a_branch_that_is_not_there() -> None:
    text = FAMILY.replace("sum(mix[q, c] * at[c] for c in 0 .. scales)", "at[q] + 0 * mix[0, 0] * at[0]")
    given = operands(5)
    for call in (compile_attention(text), compile_attention(text).reference):
        with pytest.raises(EvaluationError, match=r"3[^\0]*A902|A902[^\0]*3"):
            call(given["q"], given["k"], given["v"], mix=torch.zeros(2, 4, 5, 3, dtype=torch.float64))


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
def test_the_reference_and_the_cpu_are_the_evaluator(name: str, n: int) -> None:
    attend: Any = compile_attention(TRICKY[name])
    given = {key: x.detach() for key, x in operands(n).items()}
    oracle = Evaluator(attend.bound, queries=n, keys=n, heads=4, kv_heads=2, dk=4, dv=4)
    wanted = torch.tensor(oracle.attend(*(given[x].tolist() for x in "qkv"))[0], dtype=torch.float64)
    for run in (attend.reference, attend):
        torch.testing.assert_close(run(**given), wanted, rtol=1e-9, atol=1e-9, equal_nan=True)
