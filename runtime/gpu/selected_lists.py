"""What kernels of chosen places read beside tensors of the call: tables of places, and lists of pairs by place.

Tables are made on the host, once for a call shape. Lists are made on the device from what was chosen, by operations
that no host waits for.
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
from attnc.runtime.device_constants import keep_captured

SHORT = 1 << 15
"""Numbers below this fit into 16 bits."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The places of a call on a device.

    A place has two sides: 2 i, with the pairs that see all of its keys, and 2 i + 1, with those that may not; what is
    left over is the side 2 · places. `starts`: of the places, and twice the end. `side_of`: of a place, the one past
    the last too, for queries in tiles of `ROWS`, or for all; `offsets`: where it begins for each query. `order` and
    `positions`: of keys, where those of a place do not lie side by side. `sides`: how many may have pairs. `largest`:
    keys of a place at most.
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
    """The keys in tiles of a size: (place, first key) of each."""
    _key_tiles: dict[int, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """What kernels read."""
        return {"starts": self.starts, **({} if self.positions is None else {"order": self.positions})}

    def key_tiles(self, size: int) -> Tensor:
        """The keys in tiles: (place, first key) of each."""
        if size not in self._key_tiles:
            self._key_tiles[size] = self.tiles(size)
        keep_captured([self._key_tiles[size]])
        return self._key_tiles[size]


_TABLES: WeakKeyDictionary[BlockKeys, dict[torch.device, Tables]] = WeakKeyDictionary()


def tables_of(places: BlockKeys, n_q: int, device: torch.device) -> Tables:
    """The tables, made once, or by each of several threads at once. Raises NotInKernelsError."""
    known = _TABLES.setdefault(places, {})
    if device not in known:
        known[device] = _made(places, n_q, device)
    found = known[device]
    keep_captured(x for x in vars(found).values() if isinstance(x, Tensor))
    return found


def _made(places: BlockKeys, n_q: int, device: torch.device) -> Tables:
    rest, numbers = rest_text(places.rest)
    starts = places.starts
    count, sizes = len(starts) - 1, np.diff(starts)
    states = np.ones((1, count), dtype=np.int8) if places.states is None else places.states
    sides = np.where(states == 1, 0, 1) + 2 * np.arange(count)
    sides = np.where((states == -1) | (sizes == 0), 2 * count, sides)
    table = np.concatenate([sides, np.full((len(sides), 1), 2 * count)], 1)
    offsets = np.arange(n_q) // ROWS * (count + 1) if places.states is not None else np.zeros(n_q)

    def moved(x: Int64, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).to(device)

    return Tables(
        starts=moved(np.append(starts, starts[-1])),
        side_of=moved(table.flatten()),
        offsets=moved(offsets.astype(np.int64)),
        order=None if places.order is None else moved(places.order, torch.int64),
        positions=None if places.order is None else moved(places.order),
        row_of=None if places.row_of is None else moved(places.row_of),
        rest=rest,
        numbers=numbers,
        sides=len(np.setdiff1d(table, [2 * count])),
        largest=int(sizes.max(initial=0)),
        places=count,
        tiles=lambda size: moved(_key_tiles(starts, size)),
    )


def _key_tiles(starts: Int64, size: int) -> Int64:
    """The keys in tiles of a size: (place, first key) of each."""
    counts = -(-np.diff(starts) // size)
    place = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([place, starts[place] + number * size], 1)


class SelectedLists(NamedTuple):
    """Pairs of some lanes; a lane is a batch entry and those heads that choose alike, or share keys.

    A pair is the place in a slot of a row, numbered row by row in a lane. `slots_of` (lanes, rows, slots): its side;
    `pairs`: their numbers, by lane and side; `rows_of`, `queries_of`: of each its row and query. `begins`: where each
    side of each lane begins. `tiles_of` (programs, 4): lane, side, first pair and end of each tile.
    """

    slots_of: Tensor
    pairs: Tensor
    rows_of: Tensor
    queries_of: Tensor
    begins: Tensor
    tiles_of: Tensor


def listed(chosen: Tensor, tables: Tables, slots: int, size: int) -> SelectedLists:
    """The pairs of `chosen` (lanes, heads that choose for themselves, rows, places), in tiles of a size.

    Places past the first so many of a row are left out.
    """
    found = _first(chosen, slots)
    if tables.row_of is not None:
        found = found.index_select(2, tables.row_of)
    lanes, heads, queries, _ = found.shape
    side = tables.side_of.index_select(0, (found + tables.offsets[:, None]).flatten())
    each, sides, count = heads * queries * slots, 2 * tables.places + 1, lanes * (2 * tables.places + 1)
    device = chosen.device
    lane = torch.arange(lanes, dtype=torch.int32, device=device)
    keys, where = torch.sort((side.view(lanes, each) + lane[:, None] * sides).flatten(), stable=True)
    numbers = torch.arange(count + 1, dtype=torch.int32, device=device)
    begins = torch.searchsorted(keys, numbers, out_int32=True)
    pairs = (where % each).int()
    rows = pairs // slots
    programs = min(lanes * each, lanes * tables.sides + lanes * each // size)
    tiles = _tiles(begins, lanes, programs, size)
    return SelectedLists(side.view(lanes, -1, slots), pairs, rows, rows % queries, begins, tiles)


def _first(chosen: Tensor, slots: int) -> Tensor:
    """The first places that rows choose, in their order, and then the number of places: int32 (…, rows, slots)."""
    count = chosen.shape[-1]
    if slots == count:
        return torch.where(chosen, torch.arange(count, dtype=torch.int32, device=chosen.device), count)
    dtype = torch.int16 if count < SHORT else torch.int32
    ranks = chosen * torch.arange(count, 0, -1, dtype=dtype, device=chosen.device)
    return count - ranks.topk(slots, dim=-1).values.int()


def _tiles(begins: Tensor, lanes: int, programs: int, size: int) -> Tensor:
    """Tiles of the sides of all lanes but their last ones, so many of them at most; the others have nothing."""
    count = len(begins) - 1
    tiles = (begins[1:] - begins[:-1] + (size - 1)) // size
    tiles.view(lanes, -1)[:, -1].zero_()
    ends = torch.cumsum(tiles, 0, dtype=torch.int32)
    number = torch.arange(programs, dtype=torch.int32, device=begins.device)
    which = torch.searchsorted(ends, number, right=True, out_int32=True).clamp(max=count - 1)
    first = number - ends.index_select(0, which) + tiles.index_select(0, which)
    last = begins.index_select(0, which + 1)
    first = torch.where(number < ends[-1:], begins.index_select(0, which) + first * size, last)
    sides = count // lanes
    return torch.stack([which // sides, which % sides, first, last], 1)
