"""An attention made from a BlockMask, checked against flex_attention (forward) and dense SDPA (both directions)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from attnc import ArgumentError, ArgumentTypeError, bridges, compile_attention

N = 150
DOC = torch.tensor([0] * 37 + [1] * 50 + [2] * 63)


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (DOC[q] == DOC[k]) & (q >= k)


def masks_by_batch_and_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 5 * (h + 1) + b


def one_row_without_keys(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q != 70)


def no_pairs(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q < 0


CASES: list[tuple[Callable[..., Tensor], int | None, int | None]] = [
    (documents, None, None),
    (masks_by_batch_and_head, 2, 3),
    (one_row_without_keys, None, None),
    (no_pairs, None, None),
]


def operands(n: int = N, heads: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, n, 16, generator=draw) for _ in range(3)]


@pytest.mark.parametrize("block", [128, 32, (16, 64)])
@pytest.mark.parametrize(("mod", "batch", "heads"), CASES)
def test_results_and_gradients(mod: Any, batch: int | None, heads: int | None, block: Any) -> None:
    mask = create_block_mask(mod, batch, heads, N, N, device="cpu", BLOCK_SIZE=block)
    attend = bridges.from_block_mask(mask)
    q, k, v = operands()
    torch.testing.assert_close(attend(q, k, v), flex_attention(q, k, v, block_mask=mask))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=create_mask(mod, 2, 3, N, N, device="cpu"))
    out, lse = attend(q, k, v, return_lse=True)
    torch.testing.assert_close(out, wanted)
    blind = ~create_mask(mod, 2, 3, N, N, device="cpu").any(-1)
    assert torch.equal(lse == -torch.inf, blind)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    for grad_found, grad_wanted in zip(grads, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        torch.testing.assert_close(grad_found, grad_wanted)


def test_round_trip_from_pattern_to_block_mask_to_attention() -> None:
    """A pattern, its BlockMask and an attention made from this BlockMask show the same pairs."""
    attend = compile_attention("neighborhood_2d", height=10, width=15, window=[5, 3])
    again = bridges.from_block_mask(attend.block_mask(N, block_size=32, device="cpu"))
    assert torch.equal(again.mask(N)[0], attend.mask(N))
    q, k, v = operands()
    torch.testing.assert_close(again.reference(q, k, v), attend(q, k, v))


def test_only_listed_blocks_are_visible() -> None:
    """Block lists written by hand show less than the full matrix; without a mask_mod, listed blocks are visible."""
    count = torch.tensor([[[2, 1, 0]]], dtype=torch.int32)
    listed = torch.tensor([[[[0, 4], [3, 1], [0, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(count, listed, BLOCK_SIZE=(16, 8), seq_lengths=(41, 37), compute_q_blocks=False)
    wanted = torch.zeros(48, 40, dtype=torch.bool)
    wanted[:16, :8] = wanted[:16, 32:] = wanted[16:32, 24:32] = True
    assert torch.equal(bridges.from_block_mask(mask).mask(41, 37)[0], wanted[:41, :37])


def test_equal_masks_of_partial_blocks_are_stored_once() -> None:
    """A window over many blocks has three distinct partial masks, and its plan computes only live tiles."""
    n = 4096
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 1000), None, None, n, n, device="cpu")
    attend = bridges.from_block_mask(mask)
    assert len(attend.inputs["masks"]) == 3
    plan = attend.plan(n)
    assert plan.fallback is None
    assert plan.visible == sum(min(i + 1, 1000) for i in range(n))


def test_mask_mod_is_evaluated_for_partial_blocks_only() -> None:
    evaluated: list[int] = []

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        evaluated.append(1)
        return q >= k

    mask = create_block_mask(causal, None, None, 1024, 1024, device="cpu")
    lists = mask.kv_num_blocks
    assert int(lists.sum()) == 8
    evaluated.clear()
    sizes_seen: list[int] = []
    from attnc.runtime.bridges import block_masks

    original = block_masks._evaluate_blocks

    def counted(mod: Any, lanes: Tensor, *sizes: Any) -> Any:
        sizes_seen.append(len(lanes))
        return original(mod, lanes, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_masks, "_evaluate_blocks", counted)
        bridges.from_block_mask(mask)
    assert sum(sizes_seen) == 8
    assert evaluated == [1]


def test_errors() -> None:
    with pytest.raises(ArgumentTypeError, match="block_mask is Tensor: it must be a BlockMask"):
        bridges.from_block_mask(torch.ones(3, 3))  # type: ignore[arg-type]
    attend = bridges.from_block_mask(create_block_mask(documents, None, None, N, N, device="cpu"))
    with pytest.raises(ArgumentError, match="149 queries and 149 keys, and the mask is for 150 queries and 150"):
        attend(*operands(N - 1))
    count, listed = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    short = BlockMask.from_kv_blocks(count, listed, BLOCK_SIZE=16, seq_lengths=(40, 16), compute_q_blocks=False)
    with pytest.raises(ArgumentError, match="block_mask lists 1 rows of 16 queries, too few for its 40 queries"):
        bridges.from_block_mask(short)


@pytest.mark.parametrize("sizes", [{"height": 1, "width": 20}, {"height": 20, "width": 1}])
@pytest.mark.parametrize(
    "relation",
    [
        "abs(q.y - k.y) <= 2 and abs(q.x - k.x) <= 2",
        "abs(q.y - k.y) <= 2",
        "abs(q.y - k.y) ** 2 + abs(q.x - k.x) <= 2 and (q.y + 3) % 2 == min(1, abs(k.y)) + 1 - k.y",
    ],
)
def test_an_axis_of_size_1(relation: str, sizes: Any) -> None:
    """A coordinate along an axis of size 1 is a number, not a tensor: `abs(): argument must be Tensor, not int`."""
    text = f"pattern flat(height: int, width: int)\n    tokens y: height, x: width\n    visible {relation}\n"
    attend = compile_attention(text, **sizes)
    mask = attend.block_mask(20, block_size=16, device="cpu")
    mask_found = create_mask(mask.mask_mod, 1, 1, 20, 20, device="cpu")[0, 0]
    assert torch.equal(mask_found, torch.as_tensor(attend.mask(20)).reshape(20, 20))


def test_blocks_of_runs_of_equal_ids() -> None:
    """A block across a border of documents is not full, and a block whose rows and keys share no id is not live."""
    text = "pattern p\n    input x: int[batch, token]\n    align end\n    visible k <= q\n    visible x[k] == x[q]\n"
    attend = compile_attention(text)
    ids = (torch.arange(512) // 200)[None]
    block_mask = attend.block_mask(512, 512, x=ids)
    live = attend.mask(512, x=ids)[0].view(4, 128, 4, 128)
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), live.any(3).any(1))
    full = torch.zeros(4, 4, dtype=torch.bool)
    assert block_mask.full_kv_indices is not None and block_mask.full_kv_num_blocks is not None
    for row in range(4):
        full[row, block_mask.full_kv_indices[0, 0, row, : block_mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(full, live.all(3).all(1))
