"""Masks by length, as attnc's patterns and as FlexAttention's mask functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention

MaskMod = Callable[..., Tensor]


@dataclass(frozen=True)
class MaskCase:
    """A pattern for each length, as attnc and as FlexAttention express it.

    `causal`: whether its dense rival is causal; `heads`: the number of heads with different masks, None for one mask.
    """

    name: str
    attention: Callable[[int], Attention]
    mask_mod: Callable[[int], MaskMod]
    inputs: Callable[[int], dict[str, Any]] = lambda n: {}
    causal: bool = True
    heads: int | None = None

    def pairs(self, n: int) -> int:
        """Return the pairs of dense attention in a head."""
        return n * (n + 1) // 2 if self.causal else n * n


def compiled(spec: str, **params: Any) -> Callable[[int], Attention]:
    """Return a pattern whose parameters do not depend on the length."""
    return lambda n: compile_attention(spec, **params)


# --- shapes ----------------------------------------------------------------------------------------------------------


def document_ids(n: int) -> Tensor:
    """Return the ids of eight documents of uneven lengths, (1, n)."""
    weights = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    lengths = weights * n // weights.sum()
    lengths[-1] += n - lengths.sum()
    return torch.repeat_interleave(torch.arange(8), lengths)[None]


def grid_of(n: int) -> tuple[int, int]:
    """Return height and width of an image with n tokens, n a power of two."""
    height = 1 << (n.bit_length() - 1) // 2
    return height, n // height


# --- FlexAttention's masks -------------------------------------------------------------------------------------------


def causal(n: int) -> MaskMod:
    """Return the mask of keys up to the query."""
    return lambda b, h, q, k: q >= k


def full(n: int) -> MaskMod:
    """Return the mask of every key."""
    return lambda b, h, q, k: q >= 0


def window(width: int, sinks: int) -> Callable[[int], MaskMod]:
    """Return the mask of the last keys and the first."""
    return lambda n: lambda b, h, q, k: (q >= k) & ((q - k < width) | (k < sinks))


def strided(step: int) -> Callable[[int], MaskMod]:
    """Return the mask of the last keys, and of every `step`-th key before them."""
    return lambda n: lambda b, h, q, k: (q >= k) & ((q - k < step) | ((q - k) % step == 0))


def power(block: int, near: int) -> Callable[[int], MaskMod]:
    """Return the mask of blocks at distances that are powers of two, the nearest blocks and the first one."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        gap = q // block - k // block
        return (q >= k) & ((gap < near) | (gap & (gap - 1) == 0) | (k < block))

    return lambda n: visible


def dilated(width: int, dilation: int) -> Callable[[int], MaskMod]:
    """Return the mask of every `dilation`-th of the last keys."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < width * dilation) & ((q - k) % dilation == 0)

    return lambda n: visible


def neighborhood(n: int) -> MaskMod:
    """Return the mask of a square around the query that stays inside the image."""
    height, width = grid_of(n)

    def near(a: Tensor, b: Tensor, extent: int) -> Tensor:
        first = torch.clamp(a - NEIGHBORS // 2, 0, extent - NEIGHBORS)
        return (b >= first) & (b < first + NEIGHBORS)

    return lambda b, h, q, k: near(q // width, k // width, height) & near(q % width, k % width, width)


def document(n: int) -> MaskMod:
    """Return the mask of keys of the query's document, up to the query."""
    doc = document_ids(n)[0]
    return lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k)


def blocked(block: int) -> Callable[[int], MaskMod]:
    """Return the mask of keys of the query's block."""
    return lambda n: lambda b, h, q, k: q // block == k // block


def s2(block: int, local: int, stride: int, heads: int) -> Callable[[int], MaskMod]:
    """Return the causal mask of the nearest blocks, and of columns of blocks that differ by head."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        column = (k // block + h * max(1, stride // heads)) % stride == 0
        return (q >= k) & ((q // block - k // block < local) | column)

    return lambda n: visible


def block_map(n: int, block: int = 128, share: float = 0.4) -> Tensor:
    """Draw a share of all blocks, and every diagonal block: int (1, rows, columns)."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.rand(n // block, n // block, generator=draw) < share
    return (drawn | torch.eye(n // block, dtype=torch.bool)).long()[None]


def random_blocks(n: int) -> MaskMod:
    """Return the mask of `block_map`."""
    kept = block_map(n)[0].bool()
    return lambda b, h, q, k: kept[q // 128, k // 128]


def video_of(n: int) -> tuple[int, int, int]:
    """Return frames, height and width of a video with n tokens, n a power of two from 1024 on."""
    frames = 8
    height = 1 << ((n // frames).bit_length() - 1) // 2
    return frames, height, n // frames // height


AROUND = 3
"""Number of tiles that are visible along each axis."""


def tile_of(n: int) -> tuple[int, int, int]:
    """Return a tile of the video with n tokens: frames, height, width."""
    return (2, 4, 8) if n >= 4096 else (2, 2, 4)


def sliding_tile(n: int) -> MaskMod:
    """Return the mask of tiles of a video around the query's tile, moved inward at an edge."""
    frames, height, width = video_of(n)
    tile = tile_of(n)

    def near(a: Tensor, b: Tensor, axis: int, extent: int) -> Tensor:
        first = torch.clamp(a // tile[axis] - AROUND // 2, 0, extent // tile[axis] - AROUND)
        return (b // tile[axis] >= first) & (b // tile[axis] < first + AROUND)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        t = near(q // (height * width), k // (height * width), 0, frames)
        return t & near(q // width % height, k // width % height, 1, height) & near(q % width, k % width, 2, width)

    return visible


def _sliding_tile(n: int) -> Attention:
    frames, height, width = video_of(n)
    tile = list(tile_of(n))
    kernel = [AROUND * side for side in tile]
    return compile_attention("sliding_tile", frames=frames, height=height, width=width, tile=tile, kernel=kernel)


RANDOM_BLOCKS = """
pattern random_blocks(block: int = 128)
    align   start
    input   map: int[batch, rows, cols]
    visible map[q // block, k // block] == 1
"""


def _neighborhood_2d(n: int) -> Attention:
    height, width = grid_of(n)
    return compile_attention("neighborhood_2d", height=height, width=width, window=NEIGHBORS)


NEIGHBORS = 13

DENSE = (MaskCase("full", compiled("full"), full, causal=False), MaskCase("causal", compiled("causal"), causal))

WINDOWS = (
    MaskCase("window 512", compiled("sliding_window", window=512), window(512, 0)),
    MaskCase("window 300 + 7 sinks", compiled("sliding_window", window=300, sinks=7), window(300, 7)),
    MaskCase("strided 128", compiled("strided", stride=128), strided(128)),
    MaskCase("power 256, 5", compiled("power", block=256, window=5), power(256, 5)),
    MaskCase("dilated 16 x 64", compiled("dilated_window", window=16, dilation=64), dilated(16, 64)),
    MaskCase("neighborhood 13 x 13", _neighborhood_2d, neighborhood, causal=False),
    MaskCase("document", compiled("document"), document, lambda n: {"doc": document_ids(n)}),
)

HEADS = 4
"""The number of heads of every case on a CPU."""

BLOCKS = (
    MaskCase("blocked 512", compiled("blocked", block=512), blocked(512), causal=False),
    MaskCase(
        "random blocks 40 %", compiled(RANDOM_BLOCKS), random_blocks, lambda n: {"map": block_map(n)}, causal=False
    ),
    MaskCase("sliding tile 3 x 3 x 3", _sliding_tile, sliding_tile, causal=False),
    MaskCase(
        "s2 64, 8, 16",
        compiled("s2_attention", block=64, local_blocks=8, vertical_stride=16),
        s2(64, 8, 16, HEADS),
        heads=HEADS,
    ),
)
