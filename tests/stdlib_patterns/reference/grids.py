"""Masks of grids computed from their papers, and attention within windows of a grid that have their own keys.

Written from the papers, not from the `.attn` files. Masks list what each position sees (`reference.masks`); attention
takes q (B, Hq, N, dk), k (B, Hkv, N, dk), v (B, Hkv, N, dv) of a grid, row by row (frame by frame), and returns out
(B, Hq, N, dv): dense, in the tensors' own dtype, differentiable in every real input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.attention import products, weighted
from reference.masks import Mask, square


def neighbours(x: int, length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> list[int]:
    """Return the coordinates that x sees on one axis by NATTEN's rule."""
    members = [y for y in range(length) if y % dilation == x % dilation]
    index = members.index(x)
    if causal:
        leader = min(index // stride * stride + stride - 1, len(members) - 1)
        return members[max(0, leader - window + 1) : index + 1]
    start = min(index // stride * stride + stride // 2, len(members) - 1) - window // 2
    while start < 0:
        start += 1
    while start + window > len(members):
        start -= 1
    return members[start : start + window]


def grid(extents: Sequence[int], sees: Callable[[int, int], Iterable[int]]) -> Mask:
    """Return the product over axes: `sees(axis, x)` gives the coordinates that x sees on an axis."""
    places = list(product(*map(range, extents)))
    number = {place: i for i, place in enumerate(places)}
    return square(
        len(places), lambda q: (number[p] for p in product(*(list(sees(a, x)) for a, x in enumerate(places[q]))))
    )


def tile_coordinates(x: int, extent: int, tile: int, kernel: int) -> list[int]:
    """Return the coordinates that x sees on one axis by STA, as in attention-gym: tiles around the clamped centre."""
    tiles, wide = extent // tile, kernel // tile
    left, right = wide // 2, wide // 2 + wide % 2 - 1
    centre = max(left, min(x // tile, tiles - 1 - right))
    return [y for y in range(extent) if -left <= y // tile - centre <= right]


def inward(x: int, extent: int, reach: int) -> range:
    """Return the coordinates that x sees on one axis by FreeSwim, as the authors describe it."""
    low = x - reach - max(0, reach + x - extent + 1)
    high = x + reach + max(0, reach - x)
    return range(max(0, low), min(extent, high + 1))


def beside(x: int, extent: int, window: int, shift: int = 0) -> range:
    """Return, on one axis, the window of x among adjacent windows whose borders are `shift` before the multiples."""
    start = (x + shift) // window * window - shift
    return range(max(start, 0), min(start + window, extent))


def around(x: int, extent: int, block: int, halo: int) -> range:
    """Return, on one axis, the block of x and a halo on both sides, clipped to the image (HaloNet)."""
    start = x // block * block
    return range(max(start - halo, 0), min(start + block + halo, extent))


def with_text(video: Mask, words: int) -> Mask:
    """Extend the mask of a video by words after it; words see all tokens and are seen by all tokens."""
    n = len(video)
    seen = np.ones((n + words, n + words), dtype=bool)
    seen[:n, :n] = video
    return seen


def svg(frames: int, per_frame: int, band: int, temporal: bool, first_frame: bool) -> Mask:
    """Return SVG's mask; keys nearer than `band` tokens, in the order of the head, are visible."""
    natural = [(t, s) for t in range(frames) for s in range(per_frame)]
    order = sorted(natural, key=lambda place: (place[1], place[0])) if temporal else natural
    rank = {place: i for i, place in enumerate(order)}

    def keys_of(q: int) -> Iterable[int]:
        for key, place in enumerate(natural):
            if abs(rank[natural[q]] - rank[place]) < band or (first_frame and place[0] == 0):
                yield key

    return square(len(natural), keys_of)


def radial(frames: int, per_frame: int, decay: Fraction, block: int, sink: bool, words: int) -> Mask:
    """Return Radial's mask as the authors compute it: frame pair by frame pair in a zero buffer, rounded to blocks."""
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
    """Return how far a token sees in a frame at this distance, in whole positions; -1 if the frame is hidden."""
    length = Fraction(2) ** (len(f"{per_frame:b}") - (len(f"{distance:b}") if distance else 0))
    if length < 128 and distance % int(128 / length):
        return -1
    return per_frame if distance <= 1 else math.floor(max(length * decay, Fraction(block)))


# --- attention within windows -----------------------------------------------------------------------------------------


def places(*sizes: int, device: torch.device) -> list[Tensor]:
    """Return the coordinates of the tokens of a grid along each of its axes."""
    return [axis.flatten() for axis in torch.meshgrid([torch.arange(n, device=device) for n in sizes], indexing="ij")]


def zero_padded(x: Tensor, height: int, width: int, before: int, below: int, right: int) -> Tensor:
    """Pad the image x (B, H, height · width, d) by `before` zero rows and columns before it, and others after it."""
    image = x.reshape(*x.shape[:2], height, width, x.shape[-1])
    return F.pad(image, (0, 0, before, right, before, below)).flatten(2, 3)


def davit_window(q: Tensor, k: Tensor, v: Tensor, *, scale: float, height: int, width: int, window: int = 7) -> Tensor:
    """Ding et al. 2022: adjacent windows; the zero keys that fill the last windows take part."""
    below, right = -height % window, -width % window
    k, v = (zero_padded(x, height, width, 0, below, right) for x in (k, v))
    (qy, qx), (ky, kx) = places(height, width, device=q.device), places(height + below, width + right, device=q.device)
    same = (qy[:, None] // window == ky // window) & (qx[:, None] // window == kx // window)
    return weighted(scale * products(q, k), same, v)[0]


def halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    height: int,
    width: int,
    block: int,
    halo: int,
    row: Tensor,
    col: Tensor,
) -> Tensor:
    """HaloNet: a block sees itself and a halo around it; `row` and `col` (2 · (block + halo) - 1, dk).

    Every query sees (block + 2 · halo)² keys. Keys outside the image are zero, also after a block that the image does
    not fill (the draft pattern ends `halo` after the image; its definition has no such end).
    """
    below, right = -height % block + halo, -width % block + halo
    k, v = (zero_padded(x, height, width, halo, below, right) for x in (k, v))
    qy, qx = (axis[:, None] for axis in places(height, width, device=q.device))
    ky, kx = (axis - halo for axis in places(halo + height + below, halo + width + right, device=q.device))
    from_y, from_x = ky - qy // block * block, kx - qx // block * block
    visible = (-halo <= from_y) & (from_y < block + halo) & (-halo <= from_x) & (from_x < block + halo)
    mid = block + halo - 1
    score = scale * products(q, k)
    for table, offset in ((row, ky - qy), (col, kx - qx)):
        score = score + torch.einsum("bhqd,qkd->bhqk", q, table[(offset + mid).clamp(0, 2 * mid)])
    return weighted(score, visible, v)[0]


def shifted_windows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """Attend within the windows of a 3-D grid, whose borders are `shift` before the multiples of `window`."""
    axes = places(*sizes, device=q.device)
    cells = [(axis + first) // length for axis, first, length in zip(axes, shift, window, strict=True)]
    same = torch.stack([cell[:, None] == cell for cell in cells]).all(0)
    return weighted(scale * products(q, k), same, v)[0]


def lingen_temporal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    frames: int,
    height: int,
    width: int,
    window: Sequence[int],
    layer: int = 0,
) -> Tensor:
    """LinGen's TESA: small windows (time, row, column), shifted by half a window along time on odd layers."""
    shift = (window[0] // 2 * (layer % 2), 0, 0)
    return shifted_windows(q, k, v, scale, (frames, height, width), window, shift)


def videofactory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    frames: int,
    height: int,
    width: int,
    window: Sequence[int],
    layer: int = 0,
) -> Tensor:
    """VideoFactory: queries of one stream, keys and values of the other, windows shifted on odd layers along all axes.

    The caller swaps the streams from layer to layer.
    """
    shift = [length // 2 * (layer % 2) for length in window]
    return shifted_windows(q, k, v, scale, (frames, height, width), window, shift)
