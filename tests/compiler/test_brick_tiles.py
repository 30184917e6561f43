"""Bricks of a grid of tokens: what the axes say, and the list of bricks, against the relation token by token."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.separation import Axis, TokenGrid, grid_of, separate_axes
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.tile_forms import brick_tiles
from attnc.compiler.tile_forms.brick_tiles import BrickTiles, find_brick_tiles
from attnc.compiler.tile_forms.forms import BrickForms
from attnc.compiler.tile_forms.tile_lists import TileLists
from grid_relations import Extents, K, Q, coordinate, grids, near, truth
from tile_painting import Matrix

Tokens = list[NDArray[np.int64]]


def brick_tokens(grid: TokenGrid, brick: tuple[int, ...]) -> Tokens:
    """The tokens of every brick, in order."""
    n = int(np.prod([axis.extent for axis in grid]))
    number = np.zeros(n, dtype=np.int64)
    for axis, side in zip(grid, brick, strict=True):
        number = number * -(-axis.extent // side) + np.arange(n) // axis.stride % axis.extent // side
    return [np.flatnonzero(number == i) for i in range(int(number.max()) + 1)]


def check(lists: TileLists, mask: Matrix, rows: Tokens, columns: Tokens) -> tuple[int, int]:
    """Every brick's class and mask; how many are full and partial."""
    assert lists.frame.heights.tolist() == [len(tokens) for tokens in rows]
    assert lists.frame.widths.tolist() == [len(tokens) for tokens in columns]
    full = partial = 0
    for i, row in enumerate(rows):
        parts = [mask[np.ix_(row, column)] for column in columns]
        whole = [j for j, part in enumerate(parts) if part.all()]
        some = [j for j, part in enumerate(parts) if part.any() and not part.all()]
        at = slice(lists.partial.pointers[i], lists.partial.pointers[i + 1])
        assert lists.full.of_row(i).tolist() == whole
        assert lists.partial.of_row(i).tolist() == some
        for j, kind in zip(some, lists.classes[at].tolist(), strict=True):
            assert np.array_equal(lists.masks[kind], parts[j])
        full, partial = full + len(whole), partial + len(some)
    return full, partial


@st.composite
def bricked(draw: st.DrawFn) -> tuple[BrickTiles, Matrix, Tokens, Tokens]:
    extents, relation = draw(grids())
    n = int(np.prod(extents))
    grid = grid_of(relation, n)
    assume(grid is not None)
    assert grid is not None
    q_brick, k_brick = (tuple(draw(st.integers(1, min(axis.extent, 5))) for axis in grid) for _ in "qk")
    if draw(st.booleans()):
        k_brick = q_brick
    found = find_brick_tiles(separate_axes(relation, grid), grid, q_brick, k_brick, {})
    return found, truth(relation, n), brick_tokens(grid, q_brick), brick_tokens(grid, k_brick)


@settings(max_examples=120)
@given(bricked())
def test_listed_bricks_are_the_relation(drawn: tuple[BrickTiles, Matrix, Tokens, Tokens]) -> None:
    found, mask, rows, columns = drawn
    lists = found.enumerated()
    full, partial = check(lists, mask, rows, columns)
    assert found.visible == lists.visible == mask.sum()
    assert len(set(map(bytes, (m.tobytes() + bytes(m.shape) for m in lists.masks)))) == len(lists.masks)
    if len(found.products) == 1:
        assert (found.products[0].full, found.products[0].partial) == (full, partial)


@settings(max_examples=80)
@given(bricked())
def test_transposed_bricks_are_the_transposed_relation(drawn: tuple[BrickTiles, Matrix, Tokens, Tokens]) -> None:
    found, mask, rows, columns = drawn
    check(found.transposed().enumerated(), mask.T, columns, rows)
    check(found.enumerated().transposed(), mask.T, columns, rows)
    assert found.transposed().transposed() == found


EXTENTS: Extents = (1000, 800, 1200)
GRID: TokenGrid = (Axis(1000, 960_000), Axis(800, 1200), Axis(1200, 1))


def test_a_large_grid_stays_a_product() -> None:
    """960 million tokens: the axes are planned, no brick is listed."""
    parts = [near(coordinate(Q, EXTENTS, i), coordinate(K, EXTENTS, i), 20) for i in range(3)]
    relation = fold.conjunction(*parts)
    tracemalloc.start()
    found = find_brick_tiles(separate_axes(relation, GRID), GRID, (4, 8, 8), (4, 8, 8), {})
    (product,) = found.products
    forms = BrickForms(product)
    sizes = forms.sizes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seen = [sum(min(i + 20, n - 1) - max(i - 20, 0) + 1 for i in range(n)) for n in EXTENTS]
    assert found.visible == seen[0] * seen[1] * seen[2]
    assert forms.smallest == "axes"
    assert sizes["axes"] < 1000 < 1 << 30 < sizes["lists"]
    assert all(axis.bounds is not None for axis in forms.axes)
    assert peak < 1 << 22


def test_too_many_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    extents: Extents = (6, 7)
    relation = fold.conjunction(*(near(coordinate(Q, extents, i), coordinate(K, extents, i), 1) for i in (0, 1)))
    grid = grid_of(relation, 42)
    assert grid is not None
    found = find_brick_tiles(separate_axes(relation, grid), grid, (2, 2), (2, 2), {})
    monkeypatch.setattr(brick_tiles, "MAX_CLASS_ELEMENTS", 64)
    with pytest.raises(TooManyClassesError):
        found.enumerated()


def test_a_relation_that_sees_nothing_has_no_bricks() -> None:
    grid = (Axis(4, 6), Axis(6, 1))
    found = find_brick_tiles([], grid, (2, 3), (2, 3), {})
    lists = found.enumerated()
    assert (len(lists.full), len(lists.partial), lists.frame.rows) == (0, 0, 4)
    assert str(found) == "nothing"
