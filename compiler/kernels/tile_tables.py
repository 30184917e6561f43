"""The tile lists that kernels with a `ListedWalk` walk, for one call shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import Int32, frozen
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.kernels.walks import WORD
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import TileCounts
from attnc.compiler.planning.runs import resolve
from attnc.compiler.tile_forms.tile_lists import TileLists, TileRuns, find_tile_runs, list_tiles, mask_edges

MEAN_RUN = 3
"""Mean length from which runs of full tiles are walked as runs, as every run restarts the loop over its tiles."""


@dataclass(frozen=True, eq=False)
class TileTables:
    """Tile lists by tile row, for each group of lanes that see the same pairs, and the bits of the masks.

    `list_of_lane`: the group of every batch entry and query head. `tile_order`: the tile rows of a group, the longest
    first. The tiles of row r of group g begin at entry `g * (rows + 1) + r` of the pointers and end at the next entry.
    `full_tiles` has one extra entry, because kernels load one tile ahead. `runs`: full tiles are listed as runs of
    adjacent tiles, by the first tile of a run and one past its last tile.
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
        """Return the arrays by the name of the kernel argument."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("runs", "counts", "visible")}


def tile_tables(relations: Relations, q_tile: int, k_tile: int, *, by_key: bool) -> TileTables:
    """Return the tables of a call whose tokens are one window, by rows of queries or of keys.

    Raises TooManyTilesError or TooManyClassesError if tiles of this size do not describe the relation, and
    EvaluationError.
    """
    shape = relations.shape
    lanes = np.zeros(shape.batch * shape.heads, dtype=np.int64)
    group_runs: list[tuple[TileRuns, int]] = []
    groups: dict[Index, int] = {}
    for batches, heads, (local,) in relations.groups(cut=False):
        if local.relation not in groups:
            grid = TileGrid(shape.n_q, shape.n_k, q_tile, k_tile)
            resolved = resolve(local.relation, find_live_tiles(local.relation, grid), relations.pattern.origins)
            groups[local.relation] = len(group_runs)
            group_runs.append((mask_edges(find_tile_runs(resolved)), 0))
        number = groups[local.relation]
        group_lanes = [b * shape.heads + h for b in batches for h in heads]
        lanes[group_lanes] = number
        group_runs[number] = (group_runs[number][0], group_runs[number][1] + len(group_lanes))
    return _join_tables(lanes, group_runs, by_key, relations)


def _join_tables(
    lanes: NDArray[np.int64], group_runs: Sequence[tuple[TileRuns, int]], by_key: bool, relations: Relations
) -> TileTables:
    parts = [runs.transposed() if by_key else runs for runs, _ in group_runs]
    lists = [list_tiles(part) for part in parts]
    full_runs = [part.full for part in parts]
    by_runs = sum(len(tiles.full) for tiles in lists) >= MEAN_RUN * max(sum(map(len, full_runs)), 1)
    masks: list[NDArray[np.int32]] = []
    kinds = []
    for tiles in lists:
        kinds.append(tiles.classes.astype(np.int64) + len(masks))
        masks += [_bits(mask, tiles.frame.tile) for mask in tiles.masks]
    order = [
        np.argsort(-(np.diff(tiles.full.pointers) + np.diff(tiles.partial.pointers)), kind="stable") for tiles in lists
    ]
    full_pointers = [runs.pointers for runs in full_runs] if by_runs else [tiles.full.pointers for tiles in lists]
    pairs = [np.stack([runs.start, runs.end], axis=1).ravel() for runs in full_runs]
    full_tiles = pairs if by_runs else [tiles.full.columns for tiles in lists]
    return TileTables(
        frozen(lanes),
        frozen(np.concatenate([*order, _EMPTY])),
        frozen(np.concatenate([*_pointers(full_pointers), _EMPTY])),
        frozen(np.concatenate([*full_tiles, [0]])),
        frozen(np.concatenate([*_pointers([tiles.partial.pointers for tiles in lists]), _EMPTY])),
        frozen(np.concatenate([*(tiles.partial.columns for tiles in lists), [0]])),
        frozen(np.concatenate([*kinds, [0]])),
        _read_only(np.concatenate(masks) if masks else np.zeros(1, dtype=np.int32)),
        by_runs,
        _counts(lists, group_runs, relations),
        sum(runs.visible * n for runs, n in group_runs),
    )


def _counts(lists: Sequence[TileLists], group_runs: Sequence[tuple[TileRuns, int]], relations: Relations) -> TileCounts:
    shape, tile = relations.shape, group_runs[0][0].frame.tile if group_runs else (1, 1)
    lane_counts = [count for _, count in group_runs]
    total = -(-shape.n_q // tile[0]) * -(-shape.n_k // tile[1]) * shape.batch * shape.heads
    full, partial = (
        sum(len(getattr(tiles, name)) * n for tiles, n in zip(lists, lane_counts, strict=True))
        for name in ("full", "partial")
    )
    return TileCounts(total, full + partial, full, partial)


_EMPTY = np.zeros(0, dtype=np.int64)


def _read_only(array: NDArray[np.int32]) -> Int32:
    array.setflags(write=False)
    return array


def _pointers(parts: Sequence[Int32]) -> Iterator[NDArray[np.int64]]:
    """Yield the pointers of each part, offset by the number of entries of the parts before."""
    start = 0
    for pointers in parts:
        yield pointers.astype(np.int64) + start
        start += int(pointers[-1])


def _bits(mask: NDArray[np.bool_], tile: tuple[int, int]) -> NDArray[np.int32]:
    """Return the mask of a tile with one bit per pair, the first column's lowest; bits past the edges are 0."""
    rows, columns = tile
    padded = np.zeros((rows, max(columns, WORD)), dtype=np.bool_)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    packed = np.packbits(padded.reshape(rows, -1, WORD), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4").ravel().astype(np.int32)
