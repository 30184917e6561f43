"""Runs: for each tile row, its stretches of adjacent live tiles, with a signature by which equal ones share a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact
from attnc.compiler.analysis.hashing import combine, mix
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.tiles import LiveTiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.plan import Mask
from attnc.spec.source import Span

MAX_CLASS_ELEMENTS = 1 << 25
"""Mask elements evaluated at most to resolve the classes of partial tiles."""


class TooManyClassesError(Exception):
    """The partial tiles are mostly unlike each other: shared masks do not describe the relation."""


@dataclass(frozen=True, slots=True)
class Part:
    """Adjacent tiles of one class in a run: first column, number of columns, class (0: full)."""

    column: int
    count: int
    kind: int


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent live tiles of one tile row. Equal signatures mean equal masks relative to the run's start."""

    row: int
    parts: tuple[Part, ...]
    signature: int

    @property
    def column(self) -> int:
        """First column."""
        return self.parts[0].column

    @property
    def end(self) -> int:
        """One past the last column."""
        return self.parts[-1].column + self.parts[-1].count

    @property
    def is_full(self) -> bool:
        """Whether every tile is full."""
        return len(self.parts) == 1 and self.parts[0].kind == 0


@dataclass(frozen=True, slots=True)
class Resolved:
    """Live tiles with every partial class resolved: really partial ones with their mask, others full or gone."""

    tiles: LiveTiles
    masks: Mapping[int, Mask]
    visible: int


def resolve(relation: Index, tiles: LiveTiles, origins: Mapping[Index, Span]) -> Resolved:
    """Evaluate one member of every class of partial tiles.

    Raises TooManyClassesError when that would take more than MAX_CLASS_ELEMENTS, EvaluationError on a fault.
    """
    grid = tiles.grid
    kinds, first, members = np.unique(tiles.kind, return_index=True, return_counts=True)
    if len(kinds) * grid.q_tile * grid.k_tile > MAX_CLASS_ELEMENTS:
        raise TooManyClassesError
    wide = not fits_word(relation, (0, grid.n_q), (0, grid.n_k))
    masks: dict[int, Mask] = {}
    visible = _full_elements(tiles)
    become_full, become_empty = [], []
    for kind, at, count in zip(kinds, first, members, strict=True):
        if kind == 0:
            continue
        rows, keys = grid.row_range(int(tiles.row[at])), grid.key_range(int(tiles.column[at]))
        mask = exact.mask(relation, rows, keys, origins, wide=wide)
        visible += int(mask.sum()) * int(count)
        if mask.all():
            become_full.append(kind)
        elif mask.any():
            masks[int(kind)] = mask
        else:
            become_empty.append(kind)
    return Resolved(_reclassified(tiles, become_full, become_empty), masks, visible)


def _full_elements(tiles: LiveTiles) -> int:
    grid, full = tiles.grid, tiles.kind == 0
    row, column, count = tiles.row[full], tiles.column[full], tiles.count[full]
    heights = np.minimum((row + 1) * grid.q_tile, grid.n_q) - row * grid.q_tile
    starts = np.maximum(grid.k_origin + column * grid.k_tile, 0)
    ends = np.minimum(grid.k_origin + (column + count) * grid.k_tile, grid.n_k)
    return int((heights * (ends - starts)).sum())


def _reclassified(tiles: LiveTiles, full: list[np.uint64], empty: list[np.uint64]) -> LiveTiles:
    kind = np.where(np.isin(tiles.kind, full), np.uint64(0), tiles.kind) if full else tiles.kind
    keep = ~np.isin(tiles.kind, empty) if empty else np.ones(len(kind), dtype=np.bool_)
    return LiveTiles(tiles.grid, tiles.row[keep], tiles.column[keep], tiles.count[keep], kind[keep])


def find_runs(tiles: LiveTiles) -> list[Run]:
    """The runs of every tile row, by row and column."""
    if not len(tiles.row):
        return []
    row, column, count, kind = _merged(tiles)
    end = column + count
    starts_run = np.ones(len(row), dtype=np.bool_)
    starts_run[1:] = (row[1:] != row[:-1]) | (column[1:] != end[:-1])
    first = np.flatnonzero(starts_run)
    origin = np.repeat(column[first], np.diff(np.append(first, len(row))))
    signature = np.add.reduceat(combine(kind, mix(column - origin), mix(count)), first)
    parts = [Part(*p) for p in zip(column.tolist(), count.tolist(), kind.tolist(), strict=True)]
    bounds = [*first.tolist(), len(row)]
    return [Run(int(row[a]), tuple(parts[a:b]), int(signature[i])) for i, (a, b) in enumerate(pairwise(bounds))]


Columns = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]


def _merged(tiles: LiveTiles) -> Columns:
    """Entries with adjacent full stretches joined, so that equal rows read equal."""
    row, column, count, kind = tiles.row, tiles.column, tiles.count, tiles.kind
    starts = np.ones(len(row), dtype=np.bool_)
    adjacent = (row[1:] == row[:-1]) & (column[1:] == column[:-1] + count[:-1])
    starts[1:] = ~(adjacent & (kind[1:] == 0) & (kind[:-1] == 0))
    first = np.flatnonzero(starts)
    return row[first], column[first], np.add.reduceat(count, first), kind[first]


def run_mask(run: Run, resolved: Resolved) -> Mask:
    """The mask of a run over its rows and keys, put together from its classes."""
    grid = resolved.tiles.grid
    start, stop = grid.row_range(run.row)
    columns = []
    for part in run.parts:
        low, _ = grid.key_range(part.column)
        _, high = grid.key_range(part.column + part.count - 1)
        columns.append(resolved.masks[part.kind] if part.kind else np.ones((stop - start, high - low), dtype=np.bool_))
    return np.concatenate(columns, axis=1)


def split_runs(runs: list[Run]) -> list[Run]:
    """Runs of a signature that few rows share are cut around long full stretches, whose parts then may be shared."""
    members: dict[int, int] = {}
    for run in runs:
        members[run.signature] = members.get(run.signature, 0) + 1
    result: list[Run] = []
    for run in runs:
        result.extend(_cut(run) if members[run.signature] < SHARED and _long_full(run) else (run,))
    return result


SHARED = 4
LONG_FULL = 4
"""A full stretch of at least this many tiles, in a run shared by fewer than SHARED rows, becomes a piece of its own."""


def _long_full(run: Run) -> bool:
    return len(run.parts) > 1 and any(p.kind == 0 and p.count >= LONG_FULL for p in run.parts)


def _cut(run: Run) -> list[Run]:
    pieces: list[list[Part]] = [[]]
    for part in run.parts:
        if part.kind == 0 and part.count >= LONG_FULL:
            pieces.extend([[part], []])
        else:
            pieces[-1].append(part)
    return [_signed(run.row, tuple(parts)) for parts in pieces if parts]


def _signed(row: int, parts: tuple[Part, ...]) -> Run:
    origin = parts[0].column
    signature = hash(tuple((p.column - origin, p.count, p.kind) for p in parts))
    return Run(row, parts, signature)


def is_diagonal(mask: Mask) -> bool:
    """Whether row r sees exactly the columns ≤ r of a square."""
    rows, columns = mask.shape
    return rows == columns and bool(np.array_equal(mask, np.tri(rows, dtype=np.bool_)))


def staircases(runs: list[Run], resolved: Resolved) -> tuple[list[list[Run]], list[Run]]:
    """Groups of runs in adjacent rows, full from one column to the diagonal tile that ends them; and the rest."""
    diagonal = {kind for kind, mask in resolved.masks.items() if is_diagonal(mask)}
    groups: list[list[Run]] = []
    rest: list[Run] = []
    for run in runs:
        again = bool(groups) and groups[-1][-1].row == run.row  # a row is written once
        if again or not _is_step(run, diagonal):
            rest.append(run)
        elif groups and _follows(groups[-1][-1], run):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups, rest


def _is_step(run: Run, diagonal: set[int]) -> bool:
    return run.parts[-1].kind in diagonal and all(p.kind == 0 for p in run.parts[:-1])


def _follows(previous: Run, run: Run) -> bool:
    return run.row == previous.row + 1 and run.column == previous.column and run.end == previous.end + 1
