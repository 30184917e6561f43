"""Sets of tiles as ranges in rows: every operation against the matrix of the set."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.tile_forms.tile_lists import stretches
from tiers import examples
from tile_painting import Matrix, alike, as_matrix, as_stretches


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Matrix, Matrix]:
    """Draw two sets of one size: bands, blocks and noise."""
    rows, columns = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    noise = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
    width, size = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    kinds = [
        np.abs(r - c) < width,
        (r // size == c // size),
        noise.random((rows, columns)) < draw(st.sampled_from([0.1, 0.5, 0.9])),
        np.ones((rows, columns), dtype=np.bool_),
    ]
    return draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))


@settings(max_examples=examples(200))
@given(pairs())
def test_union_difference_and_transposition(drawn: tuple[Matrix, Matrix]) -> None:
    a, b = drawn
    x, y = as_stretches(a), as_stretches(b)
    assert (as_matrix(x) == a).all()
    assert (as_matrix(x.union(y)) == (a | b)).all()
    assert (as_matrix(x.minus(y)) == (a & ~b)).all()
    assert (as_matrix(x.transposed()) == a.T).all()
    assert alike(x.transposed(), as_stretches(a.T))
    assert alike(x.transposed().transposed(), x)
    assert np.array_equal(np.stack(x.listed(), axis=1), np.argwhere(a))


def test_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        as_stretches(np.eye(4, dtype=np.bool_)).start[0] = 1


def test_a_triangle_is_transposed_without_listing_its_tiles() -> None:
    """The triangle has 8192 rows and 33 million tiles."""
    n = 8192
    row = np.arange(n)
    triangle = stretches(n, n, row, np.zeros(n, dtype=np.int64), row)
    tracemalloc.start()
    turned = triangle.transposed()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert alike(turned, stretches(n, n, row, row + 1, np.full(n, n)))
    assert peak < 1 << 23


def test_more_tiles_than_an_index_holds_are_refused() -> None:
    from attnc.compiler.analysis.arrays import frozen

    with pytest.raises(OverflowError):
        frozen(np.array([1 << 31]))
