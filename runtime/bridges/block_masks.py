"""Convert FlexAttention's BlockMask to an attention of attnc."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.bridges.given_attention import GivenAttention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.flex.torch_tape import MaskMod

AT_ONCE = 1 << 22
"""The maximum number of pairs in one evaluation of a mask_mod."""

HIDDEN, FULL, FIRST = 0, 1, 2
"""Entries of the map of blocks: hidden, fully visible, and from `FIRST` on the number of a mask."""

Int64 = NDArray[np.int64]


def from_block_mask(block_mask: BlockMask) -> GivenAttention:
    """Return an attention with the visible pairs of a FlexAttention BlockMask, for calls of the mask's lengths.

    The `mask_mod` is evaluated here, on the pairs of partial blocks, and equal results are stored once; full blocks are
    taken as fully visible without evaluation. A BlockMask contains no score_mod: write score terms in a pattern
    instead. A BlockMask of one batch entry or head applies to all.

    Raises ArgumentTypeError if the argument is not a BlockMask, ArgumentError if its lists have too few rows.
    """
    if not isinstance(block_mask, BlockMask):
        raise ArgumentTypeError(f"block_mask is {type(block_mask).__name__}: it must be a BlockMask of FlexAttention")
    n_q, n_k = (int(length) for length in block_mask.seq_lengths)
    q_block, k_block = (min(int(size), max(n, 1)) for size, n in zip(block_mask.BLOCK_SIZE, (n_q, n_k), strict=True))
    columns = -(-n_k // k_block)
    partial = _listed_columns(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed_columns(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    if partial.shape[2] * q_block < n_q:
        raise ArgumentError(
            f"block_mask lists {partial.shape[2]} rows of {q_block} queries, too few for its {n_q} queries "
            f"(seq_lengths): give its lists a row for every block"
        )
    partial_blocks = partial.nonzero()
    numbers, masks = _distinct_masks(block_mask.mask_mod, partial_blocks, (q_block, k_block), (n_q, n_k))
    states = full.cpu().numpy().astype(np.int64) * FULL
    states[tuple(partial_blocks.cpu().numpy().T)] = numbers
    device = block_mask.kv_indices.device
    inputs = {"map": torch.from_numpy(states).to(device), "masks": torch.from_numpy(masks).to(device)}
    by_head = states.shape[1] > 1
    inputs["map"] = inputs["map"] if by_head else inputs["map"][:, 0]
    attend = compile_attention(_TEXT.format(heads="head, " if by_head else ""), q_block=q_block, k_block=k_block)
    return GivenAttention(attend, inputs, (n_q, n_k))


_TEXT = '''pattern block_mask(q_block: int, k_block: int)
    """A BlockMask of FlexAttention: 0 hides a block, 1 shows it, others number the mask of its pairs, from 2 on."""
    align   start
    input   map: int[batch, {heads}rows, cols]
    input   masks: bool[kinds, q_block, k_block]
    let state = map[q // q_block, k // k_block]
    visible state == 1 or state >= 2 and masks[max(state - 2, 0), q % q_block, k % k_block]
'''


def _listed_columns(count: Tensor, listed: Tensor, columns: int) -> Tensor:
    """Return which columns each row lists: bool (batch, heads, rows, columns)."""
    while listed.dim() < 4:
        count, listed = count[None], listed[None]
    width = listed.shape[-1]
    is_listed = torch.arange(width, device=listed.device) < count[..., None]
    marked = torch.zeros((*listed.shape[:-1], max(width, columns)), dtype=torch.int32, device=listed.device)
    return marked.scatter_add_(-1, listed.long() * is_listed, is_listed.int()) > 0


def _distinct_masks(
    mask_mod: MaskMod, partial_blocks: Tensor, block: tuple[int, int], lengths: tuple[int, int]
) -> tuple[Int64, NDArray[np.bool_]]:
    """Return the mask number of each partial block (batch entry, head, row, column), and the distinct masks."""
    if not len(partial_blocks):
        return np.zeros(0, dtype=np.int64), np.zeros((1, *block), dtype=np.bool_)
    size = block[0] * block[1]
    numbers: list[int] = []
    mask_numbers: dict[bytes, int] = {}
    for blocks in torch.split(partial_blocks, max(AT_ONCE // size, 1)):
        bits = np.packbits(_evaluate_blocks(mask_mod, blocks, block, lengths).reshape(len(blocks), -1), axis=1)
        numbers += [mask_numbers.setdefault(row.tobytes(), FIRST + len(mask_numbers)) for row in bits]
    rows = np.frombuffer(b"".join(mask_numbers), dtype=np.uint8).reshape(len(mask_numbers), -1)
    unpacked = np.unpackbits(rows, axis=1, count=size).astype(np.bool_)
    block_numbers = np.array(numbers, dtype=np.int64)
    for number in range(len(mask_numbers)):
        if not unpacked[number].any():
            block_numbers[block_numbers == FIRST + number] = HIDDEN
    return block_numbers, unpacked.reshape(-1, *block)


def _evaluate_blocks(
    mask_mod: MaskMod, blocks: Tensor, block: tuple[int, int], lengths: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return the visible pairs of some blocks: (blocks, queries, keys); pairs past the lengths are not visible."""
    b, h, rows, columns = blocks.unbind(1)
    q = rows[:, None] * block[0] + torch.arange(block[0], device=blocks.device)
    k = columns[:, None] * block[1] + torch.arange(block[1], device=blocks.device)
    inside = (q < lengths[0])[:, :, None] & (k < lengths[1])[:, None, :]
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    visible = torch.vmap(over_queries)(b, h, q.clamp(max=lengths[0] - 1), k.clamp(max=lengths[1] - 1))
    return (visible & inside).cpu().numpy()
