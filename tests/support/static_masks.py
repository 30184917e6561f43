"""Masks of the library's static patterns, written from their papers and by counting, not from the `.attn` files.

Each function answers with the keys that one query sees; `mask` lays the answers out. Slow on purpose: sets and loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def mask(n_q: int, n_k: int, keys_of: Callable[[int], Iterable[int]]) -> Mask:
    """The mask of `n_q` rows whose visible keys `keys_of` gives; keys that do not exist are ignored."""
    seen = np.zeros((n_q, n_k), dtype=bool)
    for row in range(n_q):
        for key in keys_of(row):
            if 0 <= key < n_k:
                seen[row, key] = True
    return seen


def square(n: int, keys_of: Callable[[int], Iterable[int]]) -> Mask:
    """The mask of n tokens on themselves."""
    return mask(n, n, keys_of)


def span(block: int, index: int) -> range:
    """The tokens of a block."""
    return range(index * block, (index + 1) * block)


def up_to(query: int, keys: Iterable[int]) -> set[int]:
    """The keys that are not after the query."""
    return {key for key in keys if key <= query}


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
        for at in range(q, -1, -segment):
            keys |= set(range(max(0, at - near + 1), at + 1))
            keys |= {at - near + 1 - 2**j for j in range(near) if near - 1 + 2**j <= segment}
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
    """In the authors' units: `summary_blocks` blocks of `block` tokens, counted from the end of each segment."""
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


# --- both ways --------------------------------------------------------------------------------------------------------


def longformer(n: int, window: int, dilation: int, is_global: Sequence[bool]) -> Mask:
    def keys_of(q: int) -> Iterable[int]:
        if is_global[q]:
            return range(n)
        everyone = [key for key in range(n) if is_global[key]]
        return [*everyone, *(q + dilation * o for o in range(-window, window + 1))]

    return square(n, keys_of)


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
    """Node i's parent is `parents[i]`, -1 for a root; keys past the last node are padding."""

    def keys_of(node: int) -> Iterable[int]:
        keys = set(range(prefix))
        while node >= 0:
            keys.add(prefix + node)
            node = parents[node]
        return keys

    return mask(len(parents), n_k, keys_of)


# --- grids ------------------------------------------------------------------------------------------------------------


def neighbours(x: int, length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> list[int]:
    """NATTEN's rule on one axis: the coordinates that x sees."""
    members = [y for y in range(length) if y % dilation == x % dilation]
    at = members.index(x)
    if causal:
        leader = min(at // stride * stride + stride - 1, len(members) - 1)
        return members[max(0, leader - window + 1) : at + 1]
    start = min(at // stride * stride + stride // 2, len(members) - 1) - window // 2
    while start < 0:
        start += 1
    while start + window > len(members):
        start -= 1
    return members[start : start + window]


def grid(extents: Sequence[int], sees: Callable[[int, int], Iterable[int]]) -> Mask:
    """The product over axes: `sees(axis, x)` gives the coordinates that x sees on an axis."""
    places = list(product(*map(range, extents)))
    number = {place: i for i, place in enumerate(places)}
    return square(
        len(places), lambda q: (number[p] for p in product(*(list(sees(a, x)) for a, x in enumerate(places[q]))))
    )


def tile_coordinates(x: int, extent: int, tile: int, kernel: int) -> list[int]:
    """STA on one axis, as attention-gym has it: the clamped centre, and tiles around it."""
    tiles, wide = extent // tile, kernel // tile
    left, right = wide // 2, wide // 2 + wide % 2 - 1
    centre = max(left, min(x // tile, tiles - 1 - right))
    return [y for y in range(extent) if -left <= y // tile - centre <= right]


def inward(x: int, extent: int, reach: int) -> range:
    """FreeSwim on one axis, in the authors' words."""
    low = x - reach - max(0, reach + x - extent + 1)
    high = x + reach + max(0, reach - x)
    return range(max(0, low), min(extent, high + 1))


def with_text(video: Mask, words: int) -> Mask:
    """The mask of a video with words after it, which see and are seen by all."""
    n = len(video)
    seen = np.ones((n + words, n + words), dtype=bool)
    seen[:n, :n] = video
    return seen


def svg(frames: int, per_frame: int, band: int, temporal: bool, first_frame: bool) -> Mask:
    """`band` in tokens: those nearer than it, in the order of the head."""
    natural = [(t, s) for t in range(frames) for s in range(per_frame)]
    order = sorted(natural, key=lambda place: (place[1], place[0])) if temporal else natural
    rank = {place: i for i, place in enumerate(order)}

    def keys_of(q: int) -> Iterable[int]:
        for key, place in enumerate(natural):
            if abs(rank[natural[q]] - rank[place]) < band or (first_frame and place[0] == 0):
                yield key

    return square(len(natural), keys_of)


def radial(frames: int, per_frame: int, decay: Fraction, block: int, sink: bool, words: int) -> Mask:
    """As the authors do it: each frame pair's mask alone in a buffer of zeros, cut into blocks, and those joined."""
    video = frames * per_frame
    blocks = math.ceil((video + words) / block)
    kept = np.zeros((blocks, blocks), dtype=bool)
    for i, j in product(range(frames), repeat=2):
        buffer = np.zeros((blocks * block, blocks * block), dtype=bool)
        width = per_frame if sink and j == 0 else radial_width(abs(i - j), per_frame, decay, block)
        for a, b in product(range(per_frame), repeat=2):
            if abs(a - b) <= width:
                buffer[i * per_frame + a, j * per_frame + b] = True
        columns = buffer.reshape(blocks, block, blocks, block).sum(axis=1)
        dense, some = (3 * columns > block).sum(axis=2), (columns > 0).sum(axis=2)
        kept |= (some > 0) & (10 * dense > 6 * some)
    border = video // block
    kept[border:] = True
    kept[:, border:] = True
    whole = np.repeat(np.repeat(kept, block, axis=0), block, axis=1)
    return whole[: video + words, : video + words]


def radial_width(distance: int, per_frame: int, decay: Fraction, block: int) -> int:
    """How far a token sees in a frame so far away, rounded down to whole places; -1 where the frame is left out."""
    length = Fraction(2) ** (len(f"{per_frame:b}") - (len(f"{distance:b}") if distance else 0))
    if length < 128 and distance % int(128 / length):
        return -1
    return per_frame if distance <= 1 else math.floor(max(length * decay, Fraction(block)))
