"""Rectangles of full tiles: exactly these, once, and few."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.planning.runs import Resolved
from attnc.compiler.tile_forms.rectangles import merge_rectangles
from attnc.compiler.tile_forms.stretches import Stretches, stretches
from attnc.compiler.tile_forms.tile_runs import find_tile_runs
from tile_painting import Matrix, as_stretches, patterns


def check(tiles: Stretches, matrix: Matrix) -> None:
    found = merge_rectangles(tiles)
    times = np.zeros(matrix.shape, dtype=np.int64)
    for row, row_end, column, column_end in found:
        times[row:row_end, column:column_end] += 1
    assert (times == matrix).all()
    assert found.tiles == matrix.sum()
    assert np.array_equal(np.stack(found.listed(), axis=1), np.argwhere(matrix))
    assert len(found) <= len(as_stretches(matrix))


@settings(max_examples=150)
@given(patterns())
def test_rectangles_are_the_full_tiles(drawn: tuple[Resolved, Matrix]) -> None:
    runs = find_tile_runs(drawn[0])
    full = np.zeros((runs.full.rows, runs.full.columns), dtype=np.bool_)
    full[runs.full.listed()] = True
    check(runs.full, full)


@settings(max_examples=100)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 1 << 30))
def test_any_set(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).random((rows, columns)) < 0.7
    check(as_stretches(matrix), matrix)


@pytest.mark.parametrize(
    ("matrix", "count"),
    [
        (np.ones((5, 7), dtype=np.bool_), 1),
        (np.kron(np.eye(3, dtype=np.bool_), np.ones((4, 4), dtype=np.bool_)), 3),
        (np.arange(9)[:, None] % 3 + 0 * np.arange(8)[None, :] == 0, 3),
        (np.arange(8)[None, :] % 3 + 0 * np.arange(9)[:, None] == 0, 3),
        (np.tri(6, dtype=np.bool_), 6),
        (np.zeros((3, 4), dtype=np.bool_), 0),
        (np.repeat(np.tri(3, dtype=np.bool_), 5, axis=0), 3),
    ],
    ids=["all", "blocks", "rows", "columns", "triangle", "none", "steps"],
)
def test_how_many(matrix: Matrix, count: int) -> None:
    assert len(merge_rectangles(as_stretches(matrix))) == count


def test_long_stretches_that_never_meet() -> None:
    """By columns there would be 4000 times as many."""
    row = np.arange(4)
    tall = stretches(4, 9000, row, row % 2 * 4000, row % 2 * 4000 + 4000)
    assert tall.by_columns == 16_000
    assert len(merge_rectangles(tall)) == 4


def test_a_window_over_a_million_tokens() -> None:
    """4096 of 1,048,576 tokens on tiles of 128: 253,456 full tiles."""
    row = np.arange(8192)
    found = merge_rectangles(stretches(8192, 8192, row, np.maximum(row - 31, 0), row))
    assert found.tiles == 253_456
    assert len(found) <= 8192
