"""Conversion between patterns and masks of scaled_dot_product_attention, in both directions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, UnsupportedError, bridges, compile_attention

N = 33
SHAPES = [
    (2, 4, N, N),
    (1, 1, N, N),
    (2, 1, 1, N),
    (1, 4, N, N),
    (1, 1, 1, N),
    (2, 1, N, N),
    (2, 4, N, 1),
    (1, 1, 1, 1),
]


def operands() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, N, 8, generator=draw, requires_grad=True) for _ in range(3)]


def random_mask(shape: tuple[int, ...]) -> Tensor:
    """Draw a mask; if it has more than one query row, one row sees no key."""
    mask = torch.rand(2, 4, N, N, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[0, 0, 5] = False
    return mask[tuple(map(slice, shape))]


def check(attend: bridges.GivenAttention, mask: Tensor) -> None:
    """Check results and gradients against SDPA, including the gradient of a mask that requires one."""
    wanted_of = [*operands(), *([mask] if mask.requires_grad else [])]
    q, k, v = wanted_of[:3]
    out, wanted = attend(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, wanted_of, grad)
    for grad_found, grad_wanted in zip(grads, torch.autograd.grad(wanted, wanted_of, grad), strict=True):
        torch.testing.assert_close(grad_found, grad_wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_from_masks(shape: tuple[int, ...]) -> None:
    mask = random_mask(shape)
    check(bridges.from_sdpa_mask(mask), mask)
    hidden = torch.where(mask, 0.0, -torch.inf)
    attend = bridges.from_sdpa_mask(hidden)
    check(attend, hidden)
    assert attend.attention.is_plain  # a boolean mask makes no bias of zeros
    bias = torch.where(mask, torch.randn(shape), -torch.inf).requires_grad_()
    check(bridges.from_sdpa_mask(bias), bias)


def test_masks_of_fewer_dimensions() -> None:
    for mask in (random_mask((1, 1, N, N))[0, 0], random_mask((1, 4, N, N))[0]):
        check(bridges.from_sdpa_mask(mask), mask)


def test_the_least_finite_number_hides_a_key() -> None:
    """The least finite number of a dtype hides a key, any other number is a bias: SDPA's own reading."""
    seen = random_mask((1, 1, N, N))
    least = torch.finfo(torch.float32).min
    mask = torch.where(seen, 0.0, least)
    mask[0, 0, 5, 5] = 0.0
    check(bridges.from_sdpa_mask(mask), mask)
    attend = bridges.from_sdpa_mask(mask, hidden=least)
    assert torch.equal(attend.mask(N), mask[0, 0] == 0)
    assert attend.attention.is_plain


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_to_masks(dtype: torch.dtype | None) -> None:
    """A pattern in which row 0 of one document sees no key, exported as a mask: SDPA gives the pattern's output."""
    attend = compile_attention(
        "pattern p\n    documents doc\n    input doc: int[batch, token]\n    visible k < q and q - k < 6 + head\n"
    )
    doc = torch.tensor([[0] * 20 + [1] * 13, [0] * 33])
    mask = bridges.sdpa_mask(attend, N, dtype=dtype, heads=4, doc=doc)
    assert mask.shape == (2, 4, N, N)
    assert mask.dtype == (torch.bool if dtype is None else dtype)
    q, k, v = (x.detach().to(dtype or torch.float32).requires_grad_() for x in operands())
    out, wanted = attend(q, k, v, doc=doc), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(wanted[:, :, 0], torch.zeros(2, 4, 8, dtype=wanted.dtype))
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    for grad_found, grad_wanted in zip(grads, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        torch.testing.assert_close(grad_found, grad_wanted)


def test_masks_have_only_the_batch_entries_and_heads_that_differ() -> None:
    assert bridges.sdpa_mask(compile_attention("causal"), 5, heads=4).shape == (1, 1, 5, 5)
    assert bridges.sdpa_mask(compile_attention("long_lora"), 8, heads=4).shape == (1, 4, 8, 8)
    prefix = torch.tensor([1, 2, 3])
    assert bridges.sdpa_mask(compile_attention("prefix_lm"), 5, prefix=prefix).shape == (3, 1, 5, 5)


def test_errors() -> None:
    with pytest.raises(ArgumentTypeError, match=r"mask is torch.int64: it must be a tensor of bool"):
        bridges.from_sdpa_mask(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="mask has 1 dimensions"):
        bridges.from_sdpa_mask(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ArgumentTypeError, match=r"dtype is torch.int32: it must be a floating dtype"):
        bridges.sdpa_mask(compile_attention("causal"), 5, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="sdpa_mask: `alibi` has a score"):
        bridges.sdpa_mask(compile_attention("alibi"), 5, heads=4)
    with pytest.raises(ArgumentError, match="the input `seen` has size 33"):
        bridges.from_sdpa_mask(random_mask((1, 1, N, N)))(*(x[:, :, :9] for x in operands()))
