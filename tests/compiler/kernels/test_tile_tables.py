"""Tile tables for kernels: the relation rebuilt from tile lists and masks is the original relation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnc.compiler.kernels.tile_tables import TileTables, tile_tables
from attnc.compiler.planning.build_plan import Relations
from plan_calls import call, from_library

CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("power", {"block": 32, "window": 2}, 300, 300),
    ("power", {"block": 32, "window": 12}, 500, 500),
    ("strided", {"stride": 16, "local": 16}, 130, 200),
    ("sparse_transformer", {"stride": 16}, 97, 97),
    ("long_lora", {}, 256, 256),
    ("log_sparse", {"segment": 32, "window": 4}, 200, 200),
]


@pytest.mark.parametrize(("name", "params", "n_q", "n_k"), CASES)
@pytest.mark.parametrize("tile", [(64, 32), (32, 64), (16, 16)])
@pytest.mark.parametrize("by_key", [False, True])
def test_tables_are_the_relation(
    name: str, params: dict[str, Any], n_q: int, n_k: int, tile: tuple[int, int], by_key: bool
) -> None:
    relations = Relations(from_library(name, **params), call(n_q, n_k, heads=2))
    tables = tile_tables(relations, *tile, by_key=by_key)
    for head in range(2):
        actual = dense(tables, head, (n_q, n_k), tile, by_key)
        assert np.array_equal(actual, relations.mask(0, head, 0, n_q, 0, n_k))
    assert tables.visible == sum(int(relations.mask(0, h, 0, n_q, 0, n_k).sum()) for h in range(2))


def test_long_runs_are_stored_as_runs() -> None:
    runs = {
        name: tile_tables(Relations(from_library(name), call(n, n, heads=4)), 64, 32, by_key=False).runs
        for name, n in (("long_lora", 1024), ("power", 4096), ("strided", 1024))
    }
    assert runs == {"long_lora": True, "power": True, "strided": False}


def dense(
    tables: TileTables, lane: int, size: tuple[int, int], tile: tuple[int, int], by_key: bool
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Rebuild the mask that a kernel reads from its tables."""
    (rows, columns), (row_tile, column_tile) = (size[::-1], tile[::-1]) if by_key else (size, tile)
    count = -(-rows // row_tile)
    whole = np.zeros((count * row_tile, -(-columns // column_tile) * column_tile), dtype=np.int64)
    group = int(tables.list_of_lane[lane])
    order = tables.tile_order[group * count : (group + 1) * count]
    assert sorted(order.tolist()) == list(range(count))
    for row in order.tolist():
        entry = group * (count + 1) + row
        entries = range(tables.full_pointers[entry], tables.full_pointers[entry + 1])
        listed = (
            [range(*tables.full_tiles[2 * i : 2 * i + 2]) for i in entries]
            if tables.runs
            else [tables.full_tiles[entries]]
        )
        band = whole[row * row_tile : (row + 1) * row_tile]
        for column in (int(c) for some in listed for c in some):
            band[:, column * column_tile : (column + 1) * column_tile] += 1
        for i in range(tables.partial_pointers[entry], tables.partial_pointers[entry + 1]):
            column = int(tables.partial_tiles[i])
            mask = bits(tables, int(tables.partial_kinds[i]), (row_tile, column_tile))
            band[:, column * column_tile : (column + 1) * column_tile] += mask
    assert whole.max() <= 1  # no pair twice
    assert not whole[rows:].any()
    assert not whole[:, columns:].any()
    visible = whole[:rows, :columns] > 0
    return visible.T if by_key else visible


def bits(tables: TileTables, kind: int, tile: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Unpack the mask of a tile kind; its shape is (rows, columns)."""
    words = max(tile[1] // 32, 1)
    words_of_kind = tables.masks[kind * tile[0] * words : (kind + 1) * tile[0] * words].reshape(tile[0], words)
    spread = (words_of_kind[:, :, None] >> np.arange(32)) & 1
    return spread.reshape(tile[0], -1)[:, : tile[1]].astype(np.int64)
