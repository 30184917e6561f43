"""Spoiled rows and keys of a block: rows and keys that are not finite, and rows that see one.

A block multiplies the value of a hidden key by a weight of 0, and 0 · NaN is NaN. If the result of a block with hidden
pairs is not finite, the block is recomputed with finite numbers in place of spoiled vectors. Rows that no spoiled
vector reaches keep the bits of that result. The others are computed in parts, rows that see the same keys together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.runtime.executors.cpu.hidden_values import beyond

FILL = 0.5
"""Replacement for spoiled entries: logarithm, root and inverse of it, and of 1 minus it, are finite."""


def alike(mask: NDArray[np.bool_], rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Group rows by their row of the mask; rows with the most visible keys come first."""
    if not len(rows):
        return []
    distinct, number = np.unique(mask[rows], axis=0, return_inverse=True)
    order = np.argsort(-distinct.sum(axis=1), kind="stable").tolist()
    return [rows[number.reshape(-1) == i] for i in order]


@dataclass(frozen=True)
class Spoiled:
    """Masks of a block's spoiled queries (heads, rows) and keys (heads, keys), and of rows that see such a vector."""

    queries: Tensor
    keys: Tensor
    rows: Tensor

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The rows of the block that are reached in some head."""
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
