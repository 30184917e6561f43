"""The inputs of kernels for selected blocks besides the call's tensors: tables of blocks, and lists of pairs by block.

Tables are built on the host, once per call shape. Lists are built on the device from the selection, without making the
host wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.kernels.selected.selected_problem import PairCondition, rest_text
from attnc.compiler.planning.selected_keys import ROWS, BlockKeys, Int64
from attnc.runtime.process.device_constants import keep_captured

SHORT = 1 << 15
"""Bound of numbers that fit into 16 bits."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The blocks of a call, on a device.

    Block i has two sides: 2 i, with the pairs that see all of its keys, and 2 i + 1, with the pairs that may not; all
    other pairs have side 2 · places. `starts`: first keys of the blocks, and twice the end. `side_of`: the side by
    block, including the block past the last, per query tile of `ROWS` or for all queries; `offsets`: where a query's
    entries begin in `side_of`. `order` and `positions`: of keys, if the keys of a block are not contiguous. `sides`:
    the number of sides that may have pairs. `largest`: the maximum number of keys of a block.
    """

    starts: Tensor
    side_of: Tensor
    offsets: Tensor
    order: Tensor | None
    positions: Tensor | None
    row_of: Tensor | None
    rest: PairCondition | None
    numbers: tuple[int, ...]
    sides: int
    largest: int
    places: int
    tiles: Callable[[int], Tensor]
    """A function from a tile size to the key tiles: (block, first key) of each."""
    _key_tiles: dict[int, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors that kernels read, by name."""
        return {"starts": self.starts, **({} if self.positions is None else {"order": self.positions})}

    def key_tiles(self, size: int) -> Tensor:
        """Return the key tiles of a size: (block, first key) of each."""
        if size not in self._key_tiles:
            self._key_tiles[size] = self.tiles(size)
        keep_captured([self._key_tiles[size]])
        return self._key_tiles[size]


_TABLES: WeakKeyDictionary[BlockKeys, dict[torch.device, Tables]] = WeakKeyDictionary()


def tables_of(blocks: BlockKeys, n_q: int, device: torch.device) -> Tables:
    """Return the tables, built once, or by each of several threads at once. Raises NotInKernelsError."""
    by_device = _TABLES.setdefault(blocks, {})
    if device not in by_device:
        by_device[device] = _made(blocks, n_q, device)
    tables = by_device[device]
    keep_captured(x for x in vars(tables).values() if isinstance(x, Tensor))
    return tables


def _made(blocks: BlockKeys, n_q: int, device: torch.device) -> Tables:
    rest, numbers = rest_text(blocks.rest)
    starts = blocks.starts
    count, sizes = len(starts) - 1, np.diff(starts)
    states = np.ones((1, count), dtype=np.int8) if blocks.states is None else blocks.states
    sides = np.where(states == 1, 0, 1) + 2 * np.arange(count)
    sides = np.where((states == -1) | (sizes == 0), 2 * count, sides)
    table = np.concatenate([sides, np.full((len(sides), 1), 2 * count)], 1)
    offsets = np.arange(n_q) // ROWS * (count + 1) if blocks.states is not None else np.zeros(n_q)

    def moved(x: Int64, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).to(device)

    return Tables(
        starts=moved(np.append(starts, starts[-1])),
        side_of=moved(table.flatten()),
        offsets=moved(offsets.astype(np.int64)),
        order=None if blocks.order is None else moved(blocks.order, torch.int64),
        positions=None if blocks.order is None else moved(blocks.order),
        row_of=None if blocks.row_of is None else moved(blocks.row_of),
        rest=rest,
        numbers=numbers,
        sides=len(np.setdiff1d(table, [2 * count])),
        largest=int(sizes.max(initial=0)),
        places=count,
        tiles=lambda size: moved(_key_tiles(starts, size)),
    )


def _key_tiles(starts: Int64, size: int) -> Int64:
    """Return the key tiles of a size: (block, first key) of each."""
    counts = -(-np.diff(starts) // size)
    place = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([place, starts[place] + number * size], 1)


class SelectedLists(NamedTuple):
    """Pairs of some head groups; here a head group is a batch entry with heads that share a selection, or share keys.

    A pair is a block in a slot of a row; pairs are numbered row by row within a head group. `slots_of` (head groups,
    rows, slots): the pair's side; `pairs`: pair numbers, by head group and side; `rows_of`, `queries_of`: the row and
    query of each. `begins`: where each side of each head group begins. `tiles_of` (programs, 4): head group, side,
    first pair and end of each tile.
    """

    slots_of: Tensor
    pairs: Tensor
    rows_of: Tensor
    queries_of: Tensor
    begins: Tensor
    tiles_of: Tensor


def listed(selected: Tensor, tables: Tables, slots: int, size: int) -> SelectedLists:
    """List the pairs of `selected` (head groups, selecting heads, rows, blocks), in tiles of `size` pairs.

    Blocks past the first `slots` of a row are left out.
    """
    first_blocks = _first(selected, slots)
    if tables.row_of is not None:
        first_blocks = first_blocks.index_select(2, tables.row_of)
    groups, heads, queries, _ = first_blocks.shape
    side = tables.side_of.index_select(0, (first_blocks + tables.offsets[:, None]).flatten())
    group_pairs, sides, count = heads * queries * slots, 2 * tables.places + 1, groups * (2 * tables.places + 1)
    device = selected.device
    group_index = torch.arange(groups, dtype=torch.int32, device=device)
    keys, where = torch.sort((side.view(groups, group_pairs) + group_index[:, None] * sides).flatten(), stable=True)
    numbers = torch.arange(count + 1, dtype=torch.int32, device=device)
    begins = torch.searchsorted(keys, numbers, out_int32=True)
    pairs = (where % group_pairs).int()
    rows = pairs // slots
    programs = min(groups * group_pairs, groups * tables.sides + groups * group_pairs // size)
    tiles = _tiles(begins, groups, programs, size)
    return SelectedLists(side.view(groups, -1, slots), pairs, rows, rows % queries, begins, tiles)


def _first(selected: Tensor, slots: int) -> Tensor:
    """Return the first blocks that rows select, ascending, padded with the number of blocks: int32 (…, rows, slots)."""
    count = selected.shape[-1]
    if slots == count:
        return torch.where(selected, torch.arange(count, dtype=torch.int32, device=selected.device), count)
    dtype = torch.int16 if count < SHORT else torch.int32
    ranks = selected * torch.arange(count, 0, -1, dtype=dtype, device=selected.device)
    return count - ranks.topk(slots, dim=-1).values.int()


def _tiles(begins: Tensor, groups: int, programs: int, size: int) -> Tensor:
    """Return `programs` tiles of the sides of all head groups, except each group's last side; spare tiles are empty."""
    count = len(begins) - 1
    tiles = (begins[1:] - begins[:-1] + (size - 1)) // size
    tiles.view(groups, -1)[:, -1].zero_()
    ends = torch.cumsum(tiles, 0, dtype=torch.int32)
    number = torch.arange(programs, dtype=torch.int32, device=begins.device)
    which = torch.searchsorted(ends, number, right=True, out_int32=True).clamp(max=count - 1)
    first = number - ends.index_select(0, which) + tiles.index_select(0, which)
    last = begins.index_select(0, which + 1)
    first = torch.where(number < ends[-1:], begins.index_select(0, which) + first * size, last)
    sides = count // groups
    return torch.stack([which // sides, which % sides, first, last], 1)
