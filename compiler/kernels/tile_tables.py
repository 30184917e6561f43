"""The lists that kernels of the form `ListedWalk` walk, for one call shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.kernels.walks import WORD
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import TileCounts
from attnc.compiler.planning.runs import resolve
from attnc.compiler.tile_forms.arrays import Int32, frozen
from attnc.compiler.tile_forms.tile_lists import TileLists, list_tiles
from attnc.compiler.tile_forms.tile_runs import TileRuns, find_tile_runs, mask_edges

MEAN_RUN = 3
"""Full tiles that are so many in a row, or more, are walked as runs: the loop over a run starts anew for each."""


@dataclass(frozen=True, eq=False)
class TileTables:
    """Lists by group of lanes that see the same and by tile row, and the bits of the masks.

    `list_of_lane`: the group of every batch entry and query head. `tile_order`: tile rows of a group, the longest
    first. Tiles of row r of group g are those from entry `g * (rows + 1) + r` of the pointers to the next one. There is
    one entry too many in `full_tiles`, as kernels look one ahead. `runs`: they are runs of adjacent tiles, the first of
    each and one past its last.
    """

    list_of_lane: Int32
    tile_order: Int32
    full_pointers: Int32
    full_tiles: Int32
    partial_pointers: Int32
    partial_tiles: Int32
    partial_kinds: Int32
    masks: Int32
    runs: bool
    counts: TileCounts
    visible: int

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        """The arrays of a kernel's arguments, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("runs", "counts", "visible")}


def tile_tables(relations: Relations, q_tile: int, k_tile: int, *, by_key: bool) -> TileTables:
    """The tables of a call whose tokens are one window, by rows of queries, or of keys.

    Raises TooManyTilesError, TooManyClassesError where tiles of this size do not describe the relation, and
    EvaluationError.
    """
    shape = relations.shape
    lanes = np.zeros(shape.batch * shape.heads, dtype=np.int64)
    found: list[tuple[TileRuns, int]] = []
    known: dict[Index, int] = {}
    for batches, heads, (local,) in relations.groups(cut=False):
        if local.relation not in known:
            grid = TileGrid(shape.n_q, shape.n_k, q_tile, k_tile)
            resolved = resolve(local.relation, find_live_tiles(local.relation, grid), relations.pattern.origins)
            known[local.relation] = len(found)
            found.append((mask_edges(find_tile_runs(resolved)), 0))
        number = known[local.relation]
        at = [b * shape.heads + h for b in batches for h in heads]
        lanes[at] = number
        found[number] = (found[number][0], found[number][1] + len(at))
    return _joined(lanes, found, by_key, relations)


def _joined(
    lanes: NDArray[np.int64], found: Sequence[tuple[TileRuns, int]], by_key: bool, relations: Relations
) -> TileTables:
    parts = [runs.transposed() if by_key else runs for runs, _ in found]
    lists = [list_tiles(part) for part in parts]
    runs = [part.full for part in parts]
    by_runs = sum(len(one.full) for one in lists) >= MEAN_RUN * max(sum(map(len, runs)), 1)
    masks: list[NDArray[np.int32]] = []
    kinds = []
    for one in lists:
        kinds.append(one.classes.astype(np.int64) + len(masks))
        masks += [_bits(mask, one.frame.tile) for mask in one.masks]
    order = [np.argsort(-(np.diff(one.full.pointers) + np.diff(one.partial.pointers)), kind="stable") for one in lists]
    full_pointers = [one.pointers for one in runs] if by_runs else [one.full.pointers for one in lists]
    pairs = [np.stack([one.start, one.end], axis=1).ravel() for one in runs]
    full_tiles = pairs if by_runs else [one.full.columns for one in lists]
    return TileTables(
        frozen(lanes),
        frozen(np.concatenate([*order, _EMPTY])),
        frozen(np.concatenate([*_pointers(full_pointers), _EMPTY])),
        frozen(np.concatenate([*full_tiles, [0]])),
        frozen(np.concatenate([*_pointers([one.partial.pointers for one in lists]), _EMPTY])),
        frozen(np.concatenate([*(one.partial.columns for one in lists), [0]])),
        frozen(np.concatenate([*kinds, [0]])),
        _read_only(np.concatenate(masks) if masks else np.zeros(1, dtype=np.int32)),
        by_runs,
        _counts(lists, found, relations),
        sum(one.visible * n for one, n in found),
    )


def _counts(lists: Sequence[TileLists], found: Sequence[tuple[TileRuns, int]], relations: Relations) -> TileCounts:
    shape, tile = relations.shape, found[0][0].frame.tile if found else (1, 1)
    times = [count for _, count in found]
    total = -(-shape.n_q // tile[0]) * -(-shape.n_k // tile[1]) * shape.batch * shape.heads
    full, partial = (
        sum(len(getattr(one, name)) * n for one, n in zip(lists, times, strict=True)) for name in ("full", "partial")
    )
    return TileCounts(total, full + partial, full, partial)


_EMPTY = np.zeros(0, dtype=np.int64)


def _read_only(array: NDArray[np.int32]) -> Int32:
    array.setflags(write=False)
    return array


def _pointers(parts: Sequence[Int32]) -> Iterator[NDArray[np.int64]]:
    """Pointers of each part, those of later ones past the entries of earlier ones."""
    start = 0
    for pointers in parts:
        yield pointers.astype(np.int64) + start
        start += int(pointers[-1])


def _bits(mask: NDArray[np.bool_], tile: tuple[int, int]) -> NDArray[np.int32]:
    """The mask of a tile, a bit for each pair, the first column's lowest; nothing is seen past the edges."""
    rows, columns = tile
    whole = np.zeros((rows, max(columns, WORD)), dtype=np.bool_)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    packed = np.packbits(whole.reshape(rows, -1, WORD), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4").ravel().astype(np.int32)
