"""Masks as attnc and as FlexAttention write them, by length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention

MaskMod = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A pattern, for each length, as attnc and as FlexAttention write it."""

    name: str
    attention: Callable[[int], Attention]
    mask_mod: Callable[[int], MaskMod]
    inputs: Callable[[int], dict[str, Any]] = lambda n: {}


def compiled(spec: str, **params: Any) -> Callable[[int], Attention]:
    """A pattern whose parameters are those of every length."""
    return lambda n: compile_attention(spec, **params)


# --- shapes ----------------------------------------------------------------------------------------------------------


def document_ids(n: int) -> Tensor:
    """Eight documents of uneven lengths, (1, n)."""
    weights = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    lengths = weights * n // weights.sum()
    lengths[-1] += n - lengths.sum()
    return torch.repeat_interleave(torch.arange(8), lengths)[None]


def grid_of(n: int) -> tuple[int, int]:
    """Height and width of a picture with n tokens, n a power of two."""
    height = 1 << (n.bit_length() - 1) // 2
    return height, n // height


# --- FlexAttention's masks -------------------------------------------------------------------------------------------


def causal(n: int) -> MaskMod:
    """Keys up to the query."""
    return lambda b, h, q, k: q >= k


def full(n: int) -> MaskMod:
    """Every key."""
    return lambda b, h, q, k: q >= 0


def window(width: int, sinks: int) -> Callable[[int], MaskMod]:
    """The last keys, and the first."""
    return lambda n: lambda b, h, q, k: (q >= k) & ((q - k < width) | (k < sinks))


def strided(step: int) -> Callable[[int], MaskMod]:
    """The last keys, and each so many-th before."""
    return lambda n: lambda b, h, q, k: (q >= k) & ((q - k < step) | ((q - k) % step == 0))


def power(block: int, near: int) -> Callable[[int], MaskMod]:
    """Blocks at distances that are powers of two, the nearest blocks and the first one."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        gap = q // block - k // block
        return (q >= k) & ((gap < near) | (gap & (gap - 1) == 0) | (k < block))

    return lambda n: visible


def dilated(width: int, dilation: int) -> Callable[[int], MaskMod]:
    """Each so many-th key of the last ones."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < width * dilation) & ((q - k) % dilation == 0)

    return lambda n: visible


def neighborhood(n: int) -> MaskMod:
    """A square around the query that stays inside the picture."""
    height, width = grid_of(n)

    def near(a: Tensor, b: Tensor, extent: int) -> Tensor:
        first = torch.clamp(a - NEIGHBORS // 2, 0, extent - NEIGHBORS)
        return (b >= first) & (b < first + NEIGHBORS)

    return lambda b, h, q, k: near(q // width, k // width, height) & near(q % width, k % width, width)


def document(n: int) -> MaskMod:
    """Keys of the query's document, up to it."""
    doc = document_ids(n)[0]
    return lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k)


def _neighborhood_2d(n: int) -> Attention:
    height, width = grid_of(n)
    return compile_attention("neighborhood_2d", height=height, width=width, window=NEIGHBORS)


NEIGHBORS = 13

DENSE = (Case("full", compiled("full"), full), Case("causal", compiled("causal"), causal))

WINDOWS = (
    Case("window 512", compiled("sliding_window", window=512), window(512, 0)),
    Case("window 300 + 7 sinks", compiled("sliding_window", window=300, sinks=7), window(300, 7)),
    Case("strided 128", compiled("strided", stride=128), strided(128)),
    Case("power 256, 5", compiled("power", block=256, window=5), power(256, 5)),
    Case("dilated 16 x 64", compiled("dilated_window", window=16, dilation=64), dilated(16, 64)),
    Case("neighborhood 13 x 13", _neighborhood_2d, neighborhood),
    Case("document", compiled("document"), document, lambda n: {"doc": document_ids(n)}),
)
