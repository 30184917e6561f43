"""Spoiled rows and keys of a tile: rows and keys that are not finite, and rows that see one.

A tile multiplies the value of a hidden key by a weight of 0, and 0 · NaN is NaN. If the result of a tile with hidden
pairs is not finite, the tile is recomputed with finite numbers in place of spoiled vectors. Rows that no spoiled vector
reaches keep the bits of that result. The others are computed from `cuts` of the tile: parts in which nothing spoiled is
hidden, and small parts whose pairs are computed one by one, without the hidden pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.runtime.executors.cpu.hidden_values import beyond

FILL = 0.5
"""Replacement for spoiled entries: logarithm, root and inverse of it, and of 1 minus it, are finite."""

PAIR_ROWS = 32
"""Maximum number of rows of a part whose pairs are computed one by one, each with its own vectors."""


@dataclass(frozen=True)
class Cut:
    """Rows and keys of a tile, by their numbers in it. `by_pairs`: hidden pairs must not enter any sum."""

    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    by_pairs: bool


def cuts(mask: NDArray[np.bool_], harm: NDArray[np.bool_], rows: NDArray[np.int64]) -> Iterator[Cut]:
    """Yield parts that cover the visible pairs of some rows exactly once; only parts by pairs contain harmful pairs.

    `mask` and `harm` (rows, keys) mark the visible pairs of the tile, and the hidden pairs that would spoil a sum.
    """
    yield from _cuts(mask, harm, rows, np.arange(mask.shape[1]))


def _cuts(
    mask: NDArray[np.bool_], harm: NDArray[np.bool_], rows: NDArray[np.int64], keys: NDArray[np.int64]
) -> Iterator[Cut]:
    keys = keys[mask[np.ix_(rows, keys)].any(axis=0)]
    harmed = harm[np.ix_(rows, keys)].any(axis=0)
    if not harmed.all():
        yield Cut(rows, keys[~harmed], by_pairs=False)
    if not harmed.any():
        return
    if len(rows) <= PAIR_ROWS:
        yield Cut(rows, keys[harmed], by_pairs=True)
        return
    for half in np.array_split(rows, 2):
        yield from _cuts(mask, harm, half, keys[harmed])


def alike(mask: NDArray[np.bool_], rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Group rows by their row of the mask; rows with the most visible keys come first."""
    if not len(rows):
        return []
    distinct, number = np.unique(mask[rows], axis=0, return_inverse=True)
    order = np.argsort(-distinct.sum(axis=1), kind="stable").tolist()
    return [rows[number.reshape(-1) == i] for i in order]


def by_pair(mask: NDArray[np.bool_], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Expand q (heads, rows, d) and k (heads, keys, d) to pairs (heads, rows, keys, d), with `FILL` in hidden pairs."""
    seen = torch.from_numpy(mask).to(q.device)[..., None]
    return torch.where(seen, q[:, :, None], FILL), torch.where(seen, k[:, None], FILL)


@dataclass(frozen=True)
class Spoiled:
    """Masks of a tile's spoiled queries (heads, rows) and keys (heads, keys), and of rows that see a spoiled vector."""

    queries: Tensor
    keys: Tensor
    rows: Tensor

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The rows of the tile that are reached in some head."""
        return np.flatnonzero(self.rows.any(0).numpy(force=True))

    def filled_queries(self, q: Tensor) -> Tensor:
        """Return vectors (heads, rows, d) with spoiled vectors replaced by `FILL`."""
        return torch.where(self.queries[..., None], FILL, q)

    def filled_keys(self, x: Tensor) -> Tensor:
        """Return keys or values (heads, keys, d) with spoiled vectors replaced by `FILL`."""
        return torch.where(self.keys[..., None], FILL, x)

    def and_rows(self, rows: Tensor) -> Spoiled:
        """Return the masks with further rows (heads, rows) marked."""
        return Spoiled(self.queries, self.keys, self.rows | rows)


def spoiled(mask: NDArray[np.bool_], q: Tensor, k: Tensor, v: Tensor, further: Tensor | None = None) -> Spoiled:
    """Find the spoiled vectors of q (heads, rows, dk), k and v (heads, keys, d); `mask` (rows, keys): visible pairs.

    `further`: rows (heads, rows) that are spoiled for another reason.
    """
    queries, keys = beyond(q), beyond(k) | beyond(v)
    seen = torch.from_numpy(mask).to(q.device)
    rows = queries | (keys[:, None] & seen).any(-1)
    return Spoiled(queries, keys, rows if further is None else rows | further)
