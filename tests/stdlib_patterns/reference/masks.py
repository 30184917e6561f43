"""Masks of sequences, written from their papers and by counting, not from the `.attn` files.

Each function computes the keys that one query sees; `mask` builds the matrix. Sets and loops make it slow on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference.attention import positions, products, weighted

Mask = NDArray[np.bool_]


def mask(n_q: int, n_k: int, keys_of: Callable[[int], Iterable[int]]) -> Mask:
    """Return the mask of `n_q` rows whose visible keys `keys_of` gives; keys that do not exist are ignored."""
    seen = np.zeros((n_q, n_k), dtype=bool)
    for row in range(n_q):
        for key in keys_of(row):
            if 0 <= key < n_k:
                seen[row, key] = True
    return seen


def square(n: int, keys_of: Callable[[int], Iterable[int]]) -> Mask:
    """Return the mask of n tokens on themselves."""
    return mask(n, n, keys_of)


def span(block: int, index: int) -> range:
    """Return the tokens of a block."""
    return range(index * block, (index + 1) * block)


def up_to(query: int, keys: Iterable[int]) -> set[int]:
    """Return the keys that are not after the query."""
    return {key for key in keys if key <= query}


# --- basic masks ------------------------------------------------------------------------------------------------------


def full(n: int) -> NDArray[np.bool_]:
    return np.ones((n, n), dtype=bool)


def causal(n: int) -> NDArray[np.bool_]:
    return np.tril(np.ones((n, n), dtype=bool))


def sliding_window(n: int, window: int, sinks: int = 0) -> NDArray[np.bool_]:
    mask = np.zeros((n, n), dtype=bool)
    for i in range(n):
        mask[i, max(0, i - window + 1) : i + 1] = True
        mask[i, : min(sinks, i + 1)] = True
    return mask


def blocked(n: int, block: int) -> NDArray[np.bool_]:
    mask = np.zeros((n, n), dtype=bool)
    for start in range(0, n, block):
        mask[start : start + block, start : start + block] = True
    return mask


def prefix_lm(n: int, prefix: int) -> NDArray[np.bool_]:
    mask = causal(n)
    mask[:, :prefix] = True
    return mask


def document(n: int, ids: list[int]) -> NDArray[np.bool_]:
    mask = np.zeros((n, n), dtype=bool)
    for i in range(n):
        for j in range(i + 1):
            mask[i, j] = ids[i] == ids[j]
    return mask


# --- causal sequences -------------------------------------------------------------------------------------------------


def dilated_window(n: int, window: int, dilation: int) -> Mask:
    return square(n, lambda q: [q - i * dilation for i in range(window)])


def strided(n: int, stride: int, local: int) -> Mask:
    return square(n, lambda q: [*range(q - local + 1, q + 1), *range(q, -1, -stride)])


def power(n: int, window: int, block: int, sink: int = 1) -> Mask:
    def keys_of(q: int) -> Iterable[int]:
        for key in range(q + 1):
            gap = q // block - key // block
            if gap < window or gap & (gap - 1) == 0 or key < sink * block:
                yield key

    return square(n, keys_of)


def log_sparse(n: int, segment: int, window: int) -> Mask:
    near = math.ceil(math.log2(segment))

    def keys_of(q: int) -> set[int]:
        if window // segment * 2 * near > q:
            return set(range(q + 1))
        keys = set()
        for start in range(q, -1, -segment):
            keys |= set(range(max(0, start - near + 1), start + 1))
            keys |= {start - near + 1 - 2**j for j in range(near) if near - 1 + 2**j <= segment}
        return keys

    return square(n, keys_of)


def s2_attention(
    n: int, block: int, local: int, stride: int, kv_head: int, kv_heads: int, offset: int = 0, dense: int = 0
) -> Mask:
    step = max(1, stride // max(1, kv_heads - dense))

    def keys_of(q: int) -> set[int]:
        if kv_head >= kv_heads - dense:
            return set(range(q + 1))
        i = q // block
        blocks = set(range(max(0, i - local + 1), i + 1))
        blocks |= {j for j in range(i + 1) if (j + kv_head * step + offset) % stride == 0}
        return up_to(q, (key for j in blocks for key in span(block, j)))

    return square(n, keys_of)


def moa(n: int, alpha: int, beta: Fraction, block: int) -> Mask:
    band = max(1, math.floor(Fraction(alpha) / block + beta * n / block))

    def keys_of(q: int) -> set[int]:
        i = q // block
        return up_to(q, (key for j in {0, *range(i - band + 1, i + 1)} for key in span(block, j)))

    return square(n, keys_of)


def sparse_transformer(n: int, stride: int, head: int) -> Mask:
    if head % 2:
        return square(n, lambda q: range(q, -1, -stride))
    return square(n, lambda q: range(q - stride + 1, q + 1))


def sparse_fixed(n: int, segment: int, block: int, summary_blocks: int, head: int = 0, groups: int = 1) -> Mask:
    """Return the mask in the authors' units: `summary_blocks` blocks of `block` tokens at the end of each segment."""
    per_segment = segment // block
    group = head % groups

    def keys_of(q: int) -> set[int]:
        keys = set(span(segment, q // segment))
        for start in range(0, n, segment):
            for back in range(group * summary_blocks, (group + 1) * summary_blocks):
                keys |= {start + key for key in span(block, per_segment - 1 - back)}
        return up_to(q, keys)

    return square(n, keys_of)


def streaming(n_q: int, n_k: int, sinks: int, window: int, last: int = 0) -> Mask:
    def keys_of(row: int) -> Iterable[int]:
        q = row + n_k - n_q
        if row >= n_q - last:
            return range(q + 1)
        return up_to(q, [*range(sinks), *range(q - window + 1, q + 1)])

    return mask(n_q, n_k, keys_of)


def long_lora(n: int, groups: int, head: int, heads: int) -> Mask:
    size = n // groups
    cuts = list(range(0, n + 1, size))
    if head >= heads // 2:
        cuts = sorted({0, n, *(cut + size // 2 for cut in cuts[:-1])})

    def keys_of(q: int) -> Iterable[int]:
        start = max(cut for cut in cuts if cut <= q)
        return range(start, q + 1)

    return square(n, keys_of)


def sink_lora(n: int, groups: int, head: int, heads: int, sinks: int) -> Mask:
    """Return the mask of `long_lora` with the first tokens visible to all."""
    return long_lora(n, groups, head, heads) | square(n, lambda q: range(min(sinks, q + 1)))


# --- bidirectional sequences ------------------------------------------------------------------------------------------


def longformer_mask(n: int, window: int, dilation: int, is_global: Sequence[bool]) -> Mask:
    def keys_of(q: int) -> Iterable[int]:
        if is_global[q]:
            return range(n)
        everyone = [key for key in range(n) if is_global[key]]
        return [*everyone, *(q + dilation * o for o in range(-window, window + 1))]

    return square(n, keys_of)


def longformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int,
    dilation: Sequence[int],
    is_global: Tensor,
    qg: Tensor,
    kg: Tensor,
    vg: Tensor,
) -> Tensor:
    """Beltagy et al. 2020: `window` keys each side, `dilation` (Hq) apart, and the global tokens, `is_global` (B, N).

    A global token sees all tokens by the projections `qg`, `kg`, `vg` (B, Hq, N, …); others see it by plain k and v.
    """
    query, key = positions(q, k)
    offset = key - query
    near = torch.stack([(offset.abs() <= window * step) & (offset % step == 0) for step in dilation])
    local, _ = weighted(scale * products(q, k), near | is_global[:, None, None], v)
    whole, _ = weighted(scale * products(qg, kg), torch.ones_like(offset, dtype=torch.bool), vg)
    return torch.where(is_global[:, None, :, None], whole, local)


def bigbird(n: int, block: int, random: Sequence[Sequence[int]]) -> Mask:
    last = math.ceil(n / block) - 1

    def keys_of(q: int) -> Iterable[int]:
        i = q // block
        if i in (0, last):
            return range(n)
        blocks = {0, last, i - 1, i, i + 1, *(j for j in random[i] if j >= 0)}
        return [key for j in blocks for key in span(block, j)]

    return square(n, keys_of)


def block_diffusion(n: int, block: int) -> Mask:
    length = n // 2

    def keys_of(q: int) -> Iterable[int]:
        mine = (q if q < length else q - length) // block
        for key in range(n):
            theirs = (key if key < length else key - length) // block
            same_half = (q < length) == (key < length)
            diagonal = mine == theirs and same_half
            offset = theirs < mine and q < length <= key
            causal = theirs <= mine and q >= length and key >= length
            if diagonal or offset or causal:
                yield key

    return square(n, keys_of)


def modality_mutual(n: int, image_start: int, text_start: int, text_end: int) -> Mask:
    def keys_of(q: int) -> Iterable[int]:
        question = range(text_start, text_end) if q in range(image_start, text_start) else ()
        return [*range(q + 1), *question]

    return square(n, keys_of)


def tree_verify(prefix: int, parents: Sequence[int], n_k: int) -> Mask:
    """Return the mask of a tree; `parents[i]` is node i's parent, -1 for a root; keys after the nodes are padding."""

    def keys_of(node: int) -> Iterable[int]:
        keys = set(range(prefix))
        while node >= 0:
            keys.add(prefix + node)
            node = parents[node]
        return keys

    return mask(len(parents), n_k, keys_of)
