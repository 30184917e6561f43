"""The interface of rivals: a mask in the rival's form, a call, or the reason why the rival is absent."""

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
"""FlexAttention's form of a mask: returns whether (batch, head, query, key) is visible."""


@dataclass(frozen=True)
class Absent:
    """A rival that does not run, with the reason."""

    reason: str


@dataclass(frozen=True)
class Neighborhood:
    """NATTEN's form of a mask: the grid, and for each axis the window, its stride, its dilation, and causality."""

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
        """Return a neighbourhood without dilation; by default without strides and not causal."""
        ones = (1,) * len(grid)
        return cls(grid, window, stride or ones, ones, causal or (False,) * len(grid))


@dataclass(frozen=True)
class Mask:
    """The visible pairs among `n` tokens, in each rival's form; None if the rival cannot express them."""

    n: int
    mod: MaskMod | None = None
    """The mask for FlexAttention; None for every pair."""
    heads: int | None = None
    """Number of heads with masks of their own; None for one mask."""
    causal: bool = False
    """Whether exactly the keys up to the query are visible."""
    window: tuple[int, int] | None = None
    """FlashAttention's form: the keys before and after the query, −1 for all."""
    neighborhood: Neighborhood | None = None


def full(n: int) -> Mask:
    """Return the mask of every pair."""
    return Mask(n, window=(-1, -1))


def causal(n: int) -> Mask:
    """Return the mask of every key up to the query."""
    return Mask(n, lambda b, h, q, k: q >= k, causal=True, window=(-1, 0))


def imported(name: str) -> ModuleType | None:
    """Return a module, None if the module, or a library that it needs, cannot be loaded."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library is missing
        return None


def version(module: str, *distributions: str) -> str | None:
    """Return the version of the first installed distribution of a module that can be imported, else None."""
    if imported(module) is None:
        return None
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
