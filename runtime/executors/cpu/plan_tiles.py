"""The tiles of a plan, one by one: rows and keys of a batch entry and some heads, with their mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece

ROWS = 256
KERNEL_ROWS = 512
"""Maximum number of rows of a tile, in torch and for the kernel."""

ELEMENTS = 1 << 21
"""Maximum number of scores of a tile, over all heads."""


@dataclass(frozen=True)
class PlanTile:
    """Rows and keys (tokens of the call) of one batch entry and some heads, with their mask (rows, keys)."""

    batch: int
    heads: tuple[int, ...]
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    mask: NDArray[np.bool_]

    @cached_property
    def at(self) -> tuple[Tensor, Tensor]:
        """Indices of the tile's rows in the heads and tokens of its batch entry."""
        return torch.tensor(self.heads)[:, None], torch.from_numpy(self.rows)

    def at_keys(self, group: int) -> tuple[Tensor, Tensor]:
        """Return indices of the tile's keys in kv heads and tokens, if `group` query heads share a kv head."""
        return torch.tensor(self.heads)[:, None] // group, torch.from_numpy(self.keys)

    def part(self, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> PlanTile:
        """Return some rows and keys, by their numbers in the tile."""
        return PlanTile(self.batch, self.heads, self.rows[rows], self.keys[keys], self.mask[np.ix_(rows, keys)])


def tiles(plan: Plan, most_rows: int) -> Iterator[PlanTile]:
    """Yield the tiles of a plan; the tiles of a row come one after another."""
    for group in plan.groups:
        most_keys = max(128, ELEMENTS // (most_rows * max(len(group.heads), 1)))
        for piece in group.pieces:
            for rows, keys, mask in _parts(plan, group, piece, most_rows, most_keys):
                for batch in group.batches:
                    yield PlanTile(batch, group.heads, rows, keys, mask)


def _parts(
    plan: Plan, group: Group, piece: PlanPiece, most_rows: int, most_keys: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield query tokens, key tokens, and the mask between them, in parts of bounded size."""
    if min(piece.queries.count, piece.queries.length, piece.keys.length) <= 0:
        return
    inside_q, inside_k = piece.queries.inside(), piece.keys.inside()
    starts = zip(piece.queries.starts().tolist(), piece.keys.starts().tolist(), strict=True)
    shared = plan.masks[piece.mask].whole() if isinstance(piece.mask, int) else None
    for q_start, k_start in starts:
        for r in range(0, len(inside_q), most_rows):
            rows = inside_q[r : r + most_rows] + q_start
            last = min(len(inside_k), r + len(rows)) if piece.mask == "causal" else len(inside_k)
            for c in range(0, last, most_keys):
                keys = inside_k[c : min(c + most_keys, last)] + k_start
                if shared is not None:
                    mask = shared[r : r + len(rows), c : c + len(keys)]
                elif piece.mask == "full":
                    mask = np.ones((len(rows), len(keys)), dtype=np.bool_)
                elif piece.mask == "causal":
                    mask = np.tri(len(rows), len(keys), r - c, dtype=np.bool_)
                else:
                    first = group.batches[0], group.heads[0]
                    mask = plan.exact_mask(*first, rows[0], rows[-1] + 1, keys[0], keys[-1] + 1)
                if mask.any():
                    yield rows, keys, mask
