"""Rows and keys of a tile that are not finite, and rows that see one: only there may a result be no number.

A tile multiplies the value of a hidden key by a weight of 0, and 0 · NaN is NaN. Where what a tile gives is not finite,
the tile is computed again with numbers in place of spoiled vectors, and every row that such a vector reaches by itself,
with the keys that the row sees and no others. All other rows keep the bits that they have without spoiled vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.runtime.cpu.hidden_values import beyond

FILL = 0.5
"""In place of what is spoiled: a number whose logarithm, root and inverse are numbers, and those of 1 less it."""


@dataclass(frozen=True)
class Spoiled:
    """Which queries (heads, rows) and keys (heads, keys) of a tile are spoiled, and the rows that these reach."""

    queries: Tensor
    keys: Tensor
    rows: Tensor

    @property
    def numbers(self) -> list[int]:
        """The rows of the tile that are reached in some head."""
        return [int(i) for i in self.rows.any(0).nonzero().flatten()]

    def filled_queries(self, q: Tensor) -> Tensor:
        """Vectors (heads, rows, d) with numbers in place of spoiled ones."""
        return torch.where(self.queries[..., None], FILL, q)

    def filled_keys(self, x: Tensor) -> Tensor:
        """Keys or values (heads, keys, d) with numbers in place of spoiled ones."""
        return torch.where(self.keys[..., None], FILL, x)

    def and_rows(self, rows: Tensor) -> Spoiled:
        """The same with further rows (heads, rows) that are to be computed by themselves."""
        return Spoiled(self.queries, self.keys, self.rows | rows)


def spoiled(mask: NDArray[np.bool_], q: Tensor, k: Tensor, v: Tensor, further: Tensor | None = None) -> Spoiled:
    """What is spoiled of q (heads, rows, dk), k and v (heads, keys, d), of which `mask` (rows, keys) is visible.

    `further`: rows (heads, rows) that are spoiled by something else.
    """
    queries, keys = beyond(q), beyond(k) | beyond(v)
    seen = torch.from_numpy(mask).to(q.device)
    rows = queries | (keys[:, None] & seen).any(-1)
    return Spoiled(queries, keys, rows if further is None else rows | further)
