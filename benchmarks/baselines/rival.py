"""The interface of every rival: a mask in its own form, a call, and the reason why the rival is absent."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v, each (batch, heads, tokens, width)."""

MaskMod = Callable[..., Tensor]
"""FlexAttention's form of a mask: whether (batch, head, query, key) is visible."""


@dataclass(frozen=True)
class Absent:
    """A rival that does not run, and why."""

    reason: str


@dataclass(frozen=True)
class Neighborhood:
    """NATTEN's words: a grid of tokens, and by axis the window, its stride, its dilation and whether it is causal."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        grid: tuple[int, ...],
        window: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        causal: tuple[bool, ...] | None = None,
    ) -> Neighborhood:
        """Without dilation; by default without strides and not causal."""
        ones = (1,) * len(grid)
        return cls(grid, window, stride or ones, ones, causal or (False,) * len(grid))


@dataclass(frozen=True)
class Mask:
    """Who sees whom among `n` tokens, in the words of each rival; None where these do not say it."""

    n: int
    mod: MaskMod | None = None
    """None: every pair."""
    heads: int | None = None
    """How many heads the mask tells apart; None: it is one for all."""
    causal: bool = False
    """Exactly the keys up to the query."""
    window: tuple[int, int] | None = None
    """FlashAttention's words: the keys before and after the query's, −1 for all."""
    neighborhood: Neighborhood | None = None


def full(n: int) -> Mask:
    """Every pair."""
    return Mask(n, window=(-1, -1))


def causal(n: int) -> Mask:
    """Every key up to the query."""
    return Mask(n, lambda b, h, q, k: q >= k, causal=True, window=(-1, 0))


def imported(name: str) -> ModuleType | None:
    """A module, None where it, or a library that it needs, cannot be loaded."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library that is missing
        return None


def version(module: str, *distributions: str) -> str | None:
    """The version of the first distribution that is installed, of a module that can be imported; else None."""
    if imported(module) is None:
        return None
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
