"""Split masked pieces at the keys that all rows see: the full middle needs no mask, but its results are merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from attnc.compiler.planning.cpu_plan import GridMask, Mask, PlanPiece, Strip, StripAxis
from attnc.compiler.planning.pieces import Cover, join_pieces
from attnc.compiler.planning.rates import KEY_BLOCK
from attnc.compiler.planning.runs import is_diagonal


def split_full_parts(cover: Cover) -> Cover | None:
    """Return the cover with the full middle of masked pieces split off; None if no middle is half of its piece."""
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
    """Return the cover with short causal pieces split in halves of their rows; None if there are none.

    The kernel skips no keys of a causal call whose keys fit in one block: the upper half is then a causal piece with a
    quarter of the pairs, the lower half a masked piece.
    """
    masks, pieces = list(cover.masks), []
    for piece in cover.pieces:
        length = piece.queries.length
        if piece.mask != "causal" or not LEAST <= length <= KEY_BLOCK or piece.queries.flat() is None:
            pieces.append(piece)
            continue
        half = -(-length // (2 * EVEN)) * EVEN
        upper, lower = _columns(piece.queries, 0, half), _columns(piece.queries, half, length)
        mask = _mask_index(GridMask((np.tri(length - half, length, half, dtype=np.bool_),)), masks)
        pieces.append(PlanPiece(upper, _columns(piece.keys, 0, half), "causal", piece.fresh))
        pieces.append(PlanPiece(lower, piece.keys, mask, piece.fresh))
    if len(pieces) == len(cover.pieces):
        return None
    return Cover(join_pieces(pieces), tuple(masks), cover.full_tiles, cover.partial_tiles, cover.visible)


LEAST = 128
"""Minimum number of rows of a causal piece that is split into two calls."""

EVEN = 32
"""The number of rows of the upper half is a multiple of this."""


def _parts(piece: PlanPiece, mask: GridMask, masks: list[GridMask]) -> Iterator[PlanPiece]:
    """Yield the up to three parts of a piece; their masks are appended to `masks`."""
    start, stop = _full_columns(mask.factors[0]) if len(mask.factors) == 1 else (0, 0)
    if 2 * (stop - start) < mask.shape[1]:
        yield PlanPiece(piece.queries, piece.keys, _mask_index(mask, masks), piece.fresh)
        return
    # all rows see the first column of a triangle, so that it begins one column earlier
    if stop - start > 1 and is_diagonal(mask.factors[0][:, stop - 1 :]):
        stop -= 1
    yield PlanPiece(piece.queries, _columns(piece.keys, start, stop), "full", piece.fresh)
    for low, high in ((0, start), (stop, mask.shape[1])):
        if high > low:
            part = np.ascontiguousarray(mask.factors[0][:, low:high])
            name: Literal["causal"] | int = "causal"
            if not is_diagonal(part):
                name = _mask_index(GridMask((part,)), masks)
            yield PlanPiece(piece.queries, _columns(piece.keys, low, high), name, fresh=False)


def _full_columns(mask: Mask) -> tuple[int, int]:
    """Return the longest stretch of columns that all rows see, half-open."""
    edges = np.diff(np.concatenate([[0], mask.all(axis=0).astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return 0, 0
    longest = int((stops - starts).argmax())
    return int(starts[longest]), int(stops[longest])


def _columns(keys: Strip, start: int, stop: int) -> Strip:
    """Return the tokens `start .. stop` of every stretch of a strip."""
    (axis,) = keys.axes
    return Strip(keys.start + start * axis.stride, (StripAxis(axis.step, axis.count, stop - start, axis.stride),))


def _mask_index(mask: GridMask, masks: list[GridMask]) -> int:
    """Return the index of a mask in `masks`, to which it is appended if no equal mask exists."""
    for i, existing in enumerate(masks):
        same = existing is mask or len(existing.factors) == len(mask.factors) == 1
        if same and np.array_equal(existing.factors[0], mask.factors[0]):
            return i
    masks.append(mask)
    return len(masks) - 1
