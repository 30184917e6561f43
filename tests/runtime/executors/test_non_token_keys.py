"""Keys that are units, tiles, ranges or rows of numbers, and masks of tokens for such keys, against torch by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import SpecError, UnsupportedError, compile_attention
from branch_calls import both, operands, positions, scores, softmax, wide
from cases.case import leaf, real

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
            tokens_of_tile = token[tile == b]
            keys.append(k[:, :, tokens_of_tile].mean(2))
            values.append(v[:, :, tokens_of_tile].amax(2))
            sizes.append(len(tokens_of_tile))
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
        near_scores = torch.where((i - j).abs() <= 2, scores(q, k), -math.inf)
        score = torch.cat([near_scores, q @ ik.mT * q.shape[-1] ** -0.5], -1)
        return torch.softmax(score, -1) @ torch.cat([wide(v), iv.expand(2, *iv.shape)], 2)

    both(text, dense, operands(13) | {name: leaf(real(4, 3, 4), torch.float64) for name in ("ik", "iv")})
    module: Any = compile_attention(text).module(heads=4, dk=4, dv=4)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"ik": (4, 3, 4), "iv": (4, 3, 4)}


def test_keys_with_two_names_are_pairs_of_indices() -> None:
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
        visible = torch.tensor([f + y for f, y in pairs])[None] > rows % 3 + 3
        values = torch.stack([wide(v)[:, :, y] * f for f, y in pairs], -2)
        return softmax(score, visible) @ values

    both(text, dense, operands(7))


def test_masks_of_padded_grids_and_units_are_masks_of_tokens() -> None:
    token = torch.arange(6 * 5)
    y, x = token // 5, token % 5
    windows = compile_attention("davit_window", height=6, width=5, window=4)
    same_tile = (y[:, None] // 4 == y // 4) & (x[:, None] // 4 == x // 4)
    assert torch.equal(windows.mask(30), same_tile)
    halo = compile_attention("halo", height=6, width=5, block=2, halo=1)
    near = [(b - a[:, None] // 2 * 2 >= -1) & (b - a[:, None] // 2 * 2 < 3) for a, b in ((y, y), (x, x))]
    assert torch.equal(halo.mask(30), near[0] & near[1])
    n = torch.arange(20)
    combiner = compile_attention("combiner", segment=6)
    near_scores = (n <= n[:, None]) & (n // 6 == n[:, None] // 6)
    past = n // 6 < n[:, None] // 6
    assert torch.equal(combiner.mask(20), near_scores | past)


def test_requirements_count_the_tokens_of_a_call() -> None:
    """Requirements count the call's tokens even in a branch with fewer keys."""
    text = """pattern few
    require queries == keys and keys <= 12
    branch near
        visible k <= q
    branch pooled
        over    b in 0 .. keys // 4
        score   dot(q, k[4 * b])
        value   v[4 * b]
    combine near + pooled
"""
    attend = compile_attention(text)
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v), attend.reference(q, k, v))
    with pytest.raises(SpecError, match="A805"):
        attend(*(torch.randn(1, 2, 16, 4) for _ in range(3)))


def test_keys_other_than_tokens_have_no_mask() -> None:
    with pytest.raises(UnsupportedError, match="no mask of tokens"):
        compile_attention("davit_channel").mask(8)
