"""Tile forms painted back onto the matrix, each tile once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import expression_trees as trees
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.planning.runs import ResolvedRuns, resolve
from attnc.compiler.tile_forms.tile_lists import Stretches, TileFrame, TileLists, stretches
from relations import relations
from tile_grids import grids, mask_of

Matrix = NDArray[np.bool_]


def alike(a: object, b: object) -> bool:
    """Return whether two tile forms have one type and equal arrays."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if is_dataclass(a) and type(a) is type(b):
        return all(alike(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[ResolvedRuns, Matrix]:
    """Draw a relation's live tiles on a grid, and the relation by brute force."""
    relation, grid = trees.build(draw(relations())), draw(grids())
    mask = mask_of(relation, grid)
    return resolve(relation, find_live_tiles(relation, grid), {}), mask


def frame_ranges(sizes: NDArray[np.int32]) -> list[slice]:
    """Return the tokens of each tile row or column."""
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes.tolist(), strict=True)]


def brute(mask: Matrix, frame: TileFrame) -> NDArray[np.int64]:
    """Return every tile's visible pairs, -1 for full tiles."""
    rows, columns = frame_ranges(frame.heights), frame_ranges(frame.widths)
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            part = mask[row, column]
            counts[i, j] = -1 if part.all() else part.sum()
    return counts


def painted(lists: TileLists) -> Matrix:
    """Return the relation that tile lists describe."""
    frame = lists.frame
    rows, columns = frame_ranges(frame.heights), frame_ranges(frame.widths)
    times = np.zeros((frame.heights.sum(), frame.widths.sum()), dtype=np.int64)
    for i, row in enumerate(rows):
        for column in lists.full.of_row(i).tolist():
            times[row, columns[column]] += 1
        entries = slice(lists.partial.pointers[i], lists.partial.pointers[i + 1])
        for column, kind in zip(lists.partial.columns[entries].tolist(), lists.classes[entries].tolist(), strict=True):
            times[row, columns[column]] += lists.masks[kind]
    assert times.max(initial=0) <= 1
    return times > 0


def as_matrix(tiles: Stretches) -> Matrix:
    """Return which tiles are in a set, whose form must be canonical."""
    matrix = np.zeros((tiles.rows, tiles.columns), dtype=np.bool_)
    for row in range(tiles.rows):
        end = -1
        for i in range(tiles.pointers[row], tiles.pointers[row + 1]):
            assert end < tiles.start[i] < tiles.end[i] <= tiles.columns
            end = int(tiles.end[i])
            matrix[row, tiles.start[i] : end] = True
    assert tiles.tiles == matrix.sum()
    return matrix


def as_stretches(matrix: Matrix) -> Stretches:
    """Build a set from a matrix, tile by tile."""
    row, column = np.nonzero(matrix)
    return stretches(len(matrix), matrix.shape[1], row, column, column + 1)


def grid_frame(grid: TileGrid) -> tuple[list[int], list[int]]:
    """Return the number of tokens of every tile row and column."""
    rows = [stop - start for start, stop in map(grid.row_range, range(grid.rows))]
    return rows, [stop - start for start, stop in map(grid.key_range, range(grid.columns))]
