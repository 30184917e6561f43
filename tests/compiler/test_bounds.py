"""Loop bounds: exact wherever they are given, found for the patterns that have them, printed as they are evaluated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnc.compiler import fold
from attnc.compiler.analysis.tiles import Grid, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import Resolved, resolve
from attnc.compiler.tile_forms.bounds import Bounds, Line, has_no_overlap
from attnc.compiler.tile_forms.fit_bounds import fit_bounds
from attnc.compiler.tile_forms.fit_lines import FREE, Asked, exactly, fit_line
from attnc.compiler.tile_forms.forms import forms_of
from attnc.compiler.tile_forms.stretches import Stretches
from attnc.compiler.tile_forms.tile_runs import TileRuns, find_tile_runs
from tile_painting import Matrix, as_matrix, as_stretches, patterns

Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)
CAUSAL = fold.less_equal(K, Q)


def runs_of(relation: Index, grid: Grid) -> TileRuns:
    return find_tile_runs(resolve(relation, find_live_tiles(relation, grid), {}))


def window(width: int) -> Index:
    return fold.conjunction(CAUSAL, fold.less(GAP, fold.const(width)))


def first_keys(n: int) -> Index:
    return fold.less(K, fold.const(n))


def same_block(size: int) -> Index:
    return fold.equal(fold.floordiv(Q, fold.const(size)), fold.floordiv(K, fold.const(size)))


def read(text: str, row: int) -> int:
    """A printed expression's value."""

    def clamp(value: int, low: int, high: int) -> int:
        return max(low, min(value, high))

    return int(eval(text, {"__builtins__": {}}, {"r": row, "min": min, "max": max, "clamp": clamp}))


def check(bounds: Bounds, tiles: Stretches) -> None:
    """Row by row, from the printed text."""
    matrix = as_matrix(tiles)
    times = np.zeros(matrix.shape, dtype=np.int64)
    for interval in bounds.intervals:
        for row in range(interval.first, interval.last):
            start, end = read(str(interval.start), row), read(str(interval.end), row)
            assert end <= start or 0 <= start < end <= tiles.columns
            times[row, start : max(end, start)] += 1
    assert (times == matrix).all()
    assert bounds.enumerated() == tiles
    assert has_no_overlap(bounds)


@settings(max_examples=150)
@given(patterns())
def test_bounds_are_exact_where_they_are_given(drawn: tuple[Resolved, Matrix]) -> None:
    runs = find_tile_runs(drawn[0])
    for one in (runs, runs.transposed()):
        for tiles in (one.full, one.partial, one.live):
            bounds = fit_bounds(tiles)
            if bounds is not None:
                check(bounds, tiles)


@settings(max_examples=40)
@given(st.integers(0, 14), st.integers(1, 14), st.integers(0, 1 << 30))
def test_any_set_of_tiles(rows: int, columns: int, seed: int) -> None:
    tiles = as_stretches(np.random.default_rng(seed).random((rows, columns)) < 0.3)
    bounds = fit_bounds(tiles)
    if bounds is not None:
        check(bounds, tiles)


SHAPES: dict[str, Callable[[int], Index]] = {
    "window": window,
    "two-sided window": lambda n: fold.less(fold.absolute(GAP), fold.const(n)),
    "causal": lambda _: CAUSAL,
    "all": lambda _: fold.truth(True),
    "prefix": lambda n: fold.disjunction(CAUSAL, first_keys(n)),
    "blocks": lambda n: same_block(16 * (n % 9 + 1)),
    "causal blocks": lambda n: fold.conjunction(CAUSAL, same_block(16 * (n % 9 + 1))),
    "blocks before": lambda n: fold.less_equal(fold.floordiv(K, fold.const(48)), fold.floordiv(Q, fold.const(48))),
    "sinks": lambda n: fold.disjunction(window(n), fold.conjunction(CAUSAL, first_keys(n % 40 + 1))),
    "a window far away": lambda n: fold.conjunction(fold.less(fold.const(n), GAP), fold.less(GAP, fold.const(2 * n))),
}


@settings(max_examples=120)
@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 300), st.integers(900, 1800))
def test_patterns_with_bounds_have_them(name: str, width: int, n: int) -> None:
    """Square tiles; forwards and transposed."""
    runs = runs_of(SHAPES[name](width), Grid(n, n, 16, 16))
    for one in (runs, runs.transposed()):
        for tiles in (one.full, one.partial, one.live):
            bounds = fit_bounds(tiles)
            assert bounds is not None
            check(bounds, tiles)


@settings(max_examples=100)
@given(
    st.sampled_from(["window", "two-sided window", "causal", "prefix", "blocks"]),
    st.integers(1, 300),
    st.integers(1800, 2600),
    st.sampled_from([(32, 16), (16, 32), (64, 16), (16, 48)]),
)
def test_tiles_need_not_be_square(name: str, width: int, n: int, tile: tuple[int, int]) -> None:
    runs = runs_of(SHAPES[name](width), Grid(n, n, *tile))
    bounds = fit_bounds(runs.live)
    assert bounds is not None
    check(bounds, runs.live)


def test_what_has_no_bounds_gets_none() -> None:
    noise = np.random.default_rng(3).random((40, 40)) < 0.5
    assert fit_bounds(as_stretches(noise)) is None
    rows = np.arange(200)
    squares = np.arange(200)[None, :] == (rows * rows % 199)[:, None]
    assert fit_bounds(as_stretches(squares)) is None


@settings(max_examples=300)
@given(st.integers(-9, 9), st.integers(1, 12), st.integers(-400, 400), st.integers(1, 5), st.integers(0, 4), st.data())
def test_lines_are_found(slope: int, divisor: int, offset: int, scale: int, shift: int, data: st.DataObject) -> None:
    low = data.draw(st.one_of(st.none(), st.integers(-40, 0)))
    high = data.draw(st.one_of(st.none(), st.integers(1, 90)))
    line = Line(slope, (offset,), divisor, scale, shift, low, high)
    rows = np.arange(240)
    values = line.at(rows)
    assume(((values > values.min()) & (values < values.max())).sum() > 4 * divisor or len(set(values.tolist())) == 1)
    found = fit_line(exactly(rows, values))
    assert found is not None
    assert (found.at(rows) == values).all()
    assert [read(str(found), row) for row in rows.tolist()] == values.tolist()


@settings(max_examples=100)
@given(st.integers(-4, 4), st.integers(2, 9), st.data())
def test_lines_by_class_are_found(slope: int, classes: int, data: st.DataObject) -> None:
    offsets = tuple(data.draw(st.lists(st.integers(0, 30), min_size=classes, max_size=classes)))
    rows = np.arange(120)
    values = Line(slope, offsets).at(rows)
    found = fit_line(exactly(rows, values))
    assert found is not None
    assert (found.at(rows) == values).all()
    assert [read(str(found), row) for row in rows.tolist()] == values.tolist()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-5, 20), st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=40))
def test_a_line_that_is_given_keeps_to_what_was_asked(asked: list[tuple[int, int, int]]) -> None:
    """Rows with a value, a range or a bound on one side."""
    least = np.array([a if kind < 2 else -FREE for a, _, kind in asked], dtype=np.int64)
    most = np.array([a + (b if kind else 0) for a, b, kind in asked], dtype=np.int64)
    rows = np.arange(len(asked)) * 3 + 1
    line = fit_line(Asked(rows, least, most))
    if line is not None:
        values = line.at(rows)
        assert ((least <= values) & (values <= most)).all()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (Line(1, (0,)), "r"),
        (Line(1, (-31,), low=0), "max(r - 31, 0)"),
        (Line(3, (5,), 2, low=0, high=9), "clamp((3 * r + 5) // 2, 0, 9)"),
        (Line(1, (0,), 4, 4), "4 * (r // 4)"),
        (Line(-1, (7,), high=3), "min(-r + 7, 3)"),
        (Line(0, (5,)), "5"),
        (Line(2, (0, 1, -1)), "2 * r + [0, 1, -1][r % 3]"),
        (Line(1, (0,), 1, 2, 1), "2 * (r) + 1"),
    ],
)
def test_lines_are_printed(line: Line, text: str) -> None:
    assert str(line) == text
    assert [read(text, row) for row in range(9)] == line.at(np.arange(9)).tolist()


def test_a_window_over_a_million_tokens() -> None:
    forms = forms_of(resolve(window(4096), find_live_tiles(window(4096), Grid(1 << 20, 1 << 20, 128, 128)), {}))
    assert str(forms.bounds) == ("full: [max(r - 31, 0), r)\npartial: [max(r - 32, 0), r - 31)\npartial: [r, r + 1)")
    assert str(forms.transposed.bounds) == (
        "full: [r + 1, min(r + 32, 8192))\npartial: [r, r + 1)\npartial: [r + 32, min(r + 33, 8192))"
    )


def test_bounds_of_some_rows_say_which() -> None:
    """Keys of the first block are seen by all queries."""
    relation = fold.disjunction(window(64), first_keys(16))
    bounds = fit_bounds(runs_of(relation, Grid(512, 512, 16, 16)).transposed().live)
    assert str(bounds) == "[0, 32) for r in 0..1\n[r, min(r + 5, 32)) for r in 1..32"
