"""Masked pieces cut at the keys that all their rows see: the middle then needs no mask, at the price of merges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from attnc.compiler.planning.cpu_plan import GridMask, Mask, PlanPiece, Strip, StripAxis
from attnc.compiler.planning.pieces import Cover, join_pieces
from attnc.compiler.planning.rates import KEY_BLOCK
from attnc.compiler.planning.runs import is_diagonal


def split_full_parts(cover: Cover) -> Cover | None:
    """The cover with the full middle of every masked piece apart; None where no piece has one that is most of it."""
    masks: list[GridMask] = []
    pieces: list[PlanPiece] = []
    for piece in cover.pieces:
        if isinstance(piece.mask, int):
            pieces.extend(_parts(piece, cover.masks[piece.mask], masks))
        else:
            pieces.append(piece)
    if len(pieces) == len(cover.pieces):
        return None
    return Cover(join_pieces(pieces), tuple(masks), cover.full_tiles, cover.partial_tiles, cover.visible)


def split_triangles(cover: Cover) -> Cover | None:
    """The cover with short causal pieces in halves of their rows; None where there are none.

    Of a causal call the kernel leaves out no keys where they fit in one of its blocks: the upper half has a quarter of
    the pairs to itself, the lower one a mask.
    """
    masks, pieces = list(cover.masks), []
    for piece in cover.pieces:
        length = piece.queries.length
        if piece.mask != "causal" or not LEAST <= length <= KEY_BLOCK or piece.queries.flat() is None:
            pieces.append(piece)
            continue
        half = -(-length // (2 * EVEN)) * EVEN
        upper, lower = _columns(piece.queries, 0, half), _columns(piece.queries, half, length)
        mask = _number(GridMask((np.tri(length - half, length, half, dtype=np.bool_),)), masks)
        pieces.append(PlanPiece(upper, _columns(piece.keys, 0, half), "causal", piece.fresh))
        pieces.append(PlanPiece(lower, piece.keys, mask, piece.fresh))
    if len(pieces) == len(cover.pieces):
        return None
    return Cover(join_pieces(pieces), tuple(masks), cover.full_tiles, cover.partial_tiles, cover.visible)


LEAST = 128
"""Rows of a causal piece that may be worth two calls."""

EVEN = 32
"""The number that divides the rows of the upper half."""


def _parts(piece: PlanPiece, mask: GridMask, masks: list[GridMask]) -> Iterator[PlanPiece]:
    """A piece in up to three; `masks` takes in those that are needed."""
    start, stop = _full_columns(mask.factors[0]) if len(mask.factors) == 1 else (0, 0)
    if 2 * (stop - start) < mask.shape[1]:
        yield PlanPiece(piece.queries, piece.keys, _number(mask, masks), piece.fresh)
        return
    if stop - start > 1 and is_diagonal(mask.factors[0][:, stop - 1 :]):  # all rows see its first column
        stop -= 1
    yield PlanPiece(piece.queries, _columns(piece.keys, start, stop), "full", piece.fresh)
    for low, high in ((0, start), (stop, mask.shape[1])):
        if high > low:
            part = np.ascontiguousarray(mask.factors[0][:, low:high])
            name: Literal["causal"] | int = "causal"
            if not is_diagonal(part):
                name = _number(GridMask((part,)), masks)
            yield PlanPiece(piece.queries, _columns(piece.keys, low, high), name, fresh=False)


def _full_columns(mask: Mask) -> tuple[int, int]:
    """The longest stretch of columns that all rows see."""
    edges = np.diff(np.concatenate([[0], mask.all(axis=0).astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return 0, 0
    longest = int((stops - starts).argmax())
    return int(starts[longest]), int(stops[longest])


def _columns(keys: Strip, start: int, stop: int) -> Strip:
    (axis,) = keys.axes
    return Strip(keys.start + start * axis.stride, (StripAxis(axis.step, axis.count, stop - start, axis.stride),))


def _number(mask: GridMask, masks: list[GridMask]) -> int:
    """The number of a mask, which is appended where no equal one stands."""
    for i, known in enumerate(masks):
        same = known is mask or len(known.factors) == len(mask.factors) == 1
        if same and np.array_equal(known.factors[0], mask.factors[0]):
            return i
    masks.append(mask)
    return len(masks) - 1
