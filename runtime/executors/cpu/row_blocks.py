"""The rows of a plan in blocks that hold all of their keys, for attentions that are computed by whole rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece
from attnc.runtime.values.pair_blocks import PairBlock, PairMask

Int64 = NDArray[np.int64]

ELEMENTS = 1 << 21
"""Maximum number of entries of a tensor over the pairs of a block, over all heads; a single row may exceed it."""

MOST_ROWS = 256

LANES = 16
"""Numbers that a vector instruction sums at once, at most."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of one window of a batch entry and some heads, with every key that one of the rows sees.

    `rows` and `keys` are tokens of the call; `mask` (rows, keys) marks visible pairs.
    """

    batch: int
    heads: tuple[int, ...]
    window: Window
    rows: Int64
    keys: Int64
    mask: NDArray[np.bool_]

    @property
    def at(self) -> tuple[int, Tensor, Tensor]:
        """Indices of the rows in a tensor (B, Hq, Nq, …)."""
        return self.batch, torch.tensor(self.heads)[:, None], torch.from_numpy(self.rows)

    def pairs(self, first_key: int, visible: PairMask | None = None) -> PairBlock:
        """Return the pairs of the block, with keys counted from `first_key`; `visible` as in `PairBlock`."""
        rows, keys = self.rows - self.window.row, self.keys - first_key
        return PairBlock(self.batch, self.heads, self.window, rows, keys, self.mask[None], visible=visible)

    def part(self, rows: Int64, keys: Int64) -> RowBlock:
        """Return some rows and keys, by their numbers in the block."""
        return replace(self, rows=self.rows[rows], keys=self.keys[keys], mask=self.mask[np.ix_(rows, keys)])


def row_blocks(plan: Plan, relations: Relations, entries: Callable[[int], int], least_rows: int) -> Iterator[RowBlock]:
    """Yield the blocks of a plan; rows that see nothing are in no block.

    `entries`: returns the number of entries of a row's largest tensor, from its number of keys. `least_rows`: the
    number of rows below which a block holds fewer heads instead of fewer rows.
    """
    for group in plan.groups:
        pieces = [piece for piece in group.pieces if piece.elements]
        if not (pieces and group.batches and group.heads):
            continue
        keys = max(1, sum(piece.elements for piece in pieces) // max(plan.n_q, 1))
        max_rows = max(1, ELEMENTS // entries(keys))
        heads = max(1, min(len(group.heads), max_rows // least_rows))
        rows = max(1, min(MOST_ROWS, max_rows // heads))
        for batch in group.batches:
            windows = list(relations.windows(batch))
            for window, first, last, parts in _blocks(pieces, windows, rows):
                block_rows, seen, mask = _assembled(plan, group, parts, first, last)
                if not len(seen):
                    continue
                for i in range(0, len(group.heads), heads):
                    yield RowBlock(batch, group.heads[i : i + heads], window, block_rows, seen, mask)


_Part = tuple[PlanPiece, int]
"""A piece, and the number of one of its stretches."""


def _blocks(
    pieces: list[PlanPiece], windows: list[Window], rows: int
) -> Iterator[tuple[Window, int, int, list[_Part]]]:
    """Yield stretches of rows inside the windows, each with the parts of pieces that touch it."""
    starts = np.concatenate([np.arange(w.row, w.row + w.n_q, rows) for w in windows])
    ends = np.concatenate([np.minimum(np.arange(w.row, w.row + w.n_q, rows) + rows, w.row + w.n_q) for w in windows])
    owner = np.repeat(np.arange(len(windows)), [-(-w.n_q // rows) for w in windows])
    touching: list[list[_Part]] = [[] for _ in starts]
    for piece in pieces:
        inside = piece.queries.inside()
        for number, start in enumerate(piece.queries.starts().tolist()):
            blocks = np.searchsorted(starts, inside + start, side="right") - 1
            for block in np.unique(blocks).tolist():
                touching[block].append((piece, number))
    for i in np.flatnonzero([bool(parts) for parts in touching]).tolist():
        yield windows[owner[i]], int(starts[i]), int(ends[i]), touching[i]


def _assembled(
    plan: Plan, group: Group, parts: list[_Part], first: int, last: int
) -> tuple[Int64, Int64, NDArray[np.bool_]]:
    """Return rows, keys, and the mask between them."""
    masks_of_parts = []
    for piece, number in parts:
        inside = piece.queries.inside() + piece.queries.starts()[number]
        keys = piece.keys.inside() + piece.keys.starts()[number]
        inside_block = np.flatnonzero((inside >= first) & (inside < last))
        masks_of_parts.append(
            (inside[inside_block] - first, keys, _mask(plan, group, piece, inside, keys, inside_block))
        )
    seen = np.unique(np.concatenate([keys for _, keys, _ in masks_of_parts]))
    mask = np.zeros((last - first, len(seen)), dtype=np.bool_)
    for rows, keys, part in masks_of_parts:
        mask[np.ix_(rows, np.searchsorted(seen, keys))] |= part
    used = mask.any(axis=0)
    # Whole vectors of keys: a last key that one row sees changes no bit of the others.
    columns = np.flatnonzero(used)
    columns = np.append(columns, np.flatnonzero(~used)[: -len(columns) % LANES])
    return np.arange(first, last), seen[columns], mask[:, columns]


def _mask(
    plan: Plan, group: Group, piece: PlanPiece, rows: Int64, keys: Int64, row_numbers: Int64
) -> NDArray[np.bool_]:
    """Return the mask of some rows of a stretch."""
    match piece.mask:
        case "full":
            return np.ones((len(row_numbers), len(keys)), dtype=np.bool_)
        case "causal":
            return np.asarray(np.arange(len(keys))[None] <= row_numbers[:, None])
        case "exact":
            low, high = int(rows[row_numbers[0]]), int(rows[row_numbers[-1]]) + 1
            return plan.exact_mask(group.batches[0], group.heads[0], low, high, int(keys[0]), int(keys[-1]) + 1)
        case number:
            return plan.masks[number].whole()[row_numbers]
