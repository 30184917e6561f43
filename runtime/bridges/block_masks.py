"""FlexAttention's BlockMask as an attention of ours."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnc.runtime.attention import compile_attention
from attnc.runtime.bridges.given_attention import GivenAttention
from attnc.runtime.bridges.torch_tape import MaskMod
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError

AT_ONCE = 1 << 22
"""Pairs for which a mask_mod is evaluated at once."""

HIDDEN, FULL, FIRST = 0, 1, 2
"""Entries of a map of blocks: not seen, seen in full, and from here on the number of a mask."""

Int64 = NDArray[np.int64]


def from_block_mask(block_mask: BlockMask) -> GivenAttention:
    """An attention that sees what a BlockMask lets FlexAttention see, for calls of its lengths.

    Its `mask_mod` is evaluated here, on the pairs of partial blocks, equal ones of which are kept once; full blocks are
    taken at their word. A score_mod is no part of a BlockMask: what it adds has to be written in a pattern. A BlockMask
    of one batch entry or head is for all of them.

    Raises ArgumentTypeError for what is no BlockMask, ArgumentError for one whose lists have too few rows.
    """
    if not isinstance(block_mask, BlockMask):
        raise ArgumentTypeError(f"block_mask is {type(block_mask).__name__}: it must be a BlockMask of FlexAttention")
    n_q, n_k = (int(length) for length in block_mask.seq_lengths)
    q_block, k_block = (min(int(size), max(n, 1)) for size, n in zip(block_mask.BLOCK_SIZE, (n_q, n_k), strict=True))
    columns = -(-n_k // k_block)
    partial = _marked(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _marked(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    if partial.shape[2] * q_block < n_q:
        raise ArgumentError(
            f"block_mask lists {partial.shape[2]} rows of {q_block} queries and has {n_q} queries (seq_lengths): give "
            f"its lists a row for every block"
        )
    lanes = partial.nonzero()
    numbers, masks = _masks_of(block_mask.mask_mod, lanes, (q_block, k_block), (n_q, n_k))
    states = full.cpu().numpy().astype(np.int64) * FULL
    states[tuple(lanes.cpu().numpy().T)] = numbers
    device = block_mask.kv_indices.device
    given = {"map": torch.from_numpy(states).to(device), "masks": torch.from_numpy(masks).to(device)}
    by_head = states.shape[1] > 1
    given["map"] = given["map"] if by_head else given["map"][:, 0]
    attend = compile_attention(_TEXT.format(heads="head, " if by_head else ""), q_block=q_block, k_block=k_block)
    return GivenAttention(attend, given, (n_q, n_k))


_TEXT = '''pattern block_mask(q_block: int, k_block: int)
    """A BlockMask of FlexAttention: 0 hides a block, 1 shows it, others number the mask of its pairs, from 2 on."""
    align   start
    input   map: int[batch, {heads}rows, cols]
    input   masks: bool[kinds, q_block, k_block]
    let state = map[q // q_block, k // k_block]
    visible state == 1 or state >= 2 and masks[max(state - 2, 0), q % q_block, k % k_block]
'''


def _marked(count: Tensor, listed: Tensor, columns: int) -> Tensor:
    """Return the columns that each row lists, bool (batch, heads, rows, columns)."""
    while listed.dim() < 4:
        count, listed = count[None], listed[None]
    width = listed.shape[-1]
    is_one = torch.arange(width, device=listed.device) < count[..., None]
    marked = torch.zeros((*listed.shape[:-1], max(width, columns)), dtype=torch.int32, device=listed.device)
    return marked.scatter_add_(-1, listed.long() * is_one, is_one.int()) > 0


def _masks_of(
    mask_mod: MaskMod, lanes: Tensor, block: tuple[int, int], lengths: tuple[int, int]
) -> tuple[Int64, NDArray[np.bool_]]:
    """Return the number of each partial block's mask (batch entry, head, row, column), and the distinct masks."""
    if not len(lanes):
        return np.zeros(0, dtype=np.int64), np.zeros((1, *block), dtype=np.bool_)
    size = block[0] * block[1]
    numbers: list[int] = []
    known: dict[bytes, int] = {}
    for some in torch.split(lanes, max(AT_ONCE // size, 1)):
        bits = np.packbits(_evaluated(mask_mod, some, block, lengths).reshape(len(some), -1), axis=1)
        numbers += [known.setdefault(row.tobytes(), FIRST + len(known)) for row in bits]
    rows = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1)
    unpacked = np.unpackbits(rows, axis=1, count=size).astype(np.bool_)
    found = np.array(numbers, dtype=np.int64)
    for number in range(len(known)):
        if not unpacked[number].any():
            found[found == FIRST + number] = HIDDEN
    return found, unpacked.reshape(-1, *block)


def _evaluated(mask_mod: MaskMod, lanes: Tensor, block: tuple[int, int], lengths: tuple[int, int]) -> NDArray[np.bool_]:
    """The pairs of some blocks that are seen: (blocks, queries, keys), none past the lengths."""
    b, h, rows, columns = lanes.unbind(1)
    q = rows[:, None] * block[0] + torch.arange(block[0], device=lanes.device)
    k = columns[:, None] * block[1] + torch.arange(block[1], device=lanes.device)
    inside = (q < lengths[0])[:, :, None] & (k < lengths[1])[:, None, :]
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    seen = torch.vmap(over_queries)(b, h, q.clamp(max=lengths[0] - 1), k.clamp(max=lengths[1] - 1))
    return (seen & inside).cpu().numpy()
