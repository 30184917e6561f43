"""The forms of one set of tiles: their sizes are those of what is made, and nothing is made unasked."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from attnc.compiler import fold
from attnc.compiler.analysis.tiles import Grid, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import Resolved, resolve
from attnc.compiler.tile_forms.forms import Forms, forms_of
from tile_painting import Matrix, patterns

Q, K = fold.place("q"), fold.place("k")
CAUSAL = fold.less_equal(K, Q)
WINDOW = fold.conjunction(CAUSAL, fold.less(fold.sub(Q, K), fold.const(4096)))
MILLION = 1 << 20


def forms(relation: Index, grid: Grid) -> Forms:
    return forms_of(resolve(relation, find_live_tiles(relation, grid), {}))


def scattered(block: int) -> Index:
    """Blocks of keys, one in five, others for every block of queries."""
    rows, columns = fold.floordiv(Q, fold.const(8)), fold.floordiv(K, fold.const(block))
    return fold.zero(fold.mod(fold.add(fold.mul(rows, rows), columns), fold.const(5)))


@settings(max_examples=100)
@given(patterns())
def test_sizes_are_those_of_the_arrays(drawn: tuple[Resolved, Matrix]) -> None:
    found = forms_of(drawn[0])
    sizes = found.sizes
    assert "lists" not in vars(found)
    runs, lists = found.runs, found.lists
    assert sizes["runs"] == sum(a.nbytes for s in (runs.full, runs.partial) for a in (s.pointers, s.start, s.end))
    assert sizes["lists"] == sum(s.pointers.nbytes + s.columns.nbytes for s in (lists.full, lists.partial))
    assert ("bounds" in sizes) == (found.bounds is not None)
    assert sizes[found.smallest] == min(sizes.values())


def test_each_form_can_be_the_smallest() -> None:
    assert forms(WINDOW, Grid(65536, 65536, 128, 128)).smallest == "bounds"
    assert forms(scattered(8), Grid(400, 400, 8, 8)).smallest == "lists"
    assert forms(scattered(32), Grid(1600, 1600, 8, 8)).smallest == "runs"


def test_the_choice_says_why() -> None:
    text = str(forms(WINDOW, Grid(65536, 65536, 128, 128)))
    assert text == "bounds: bounds 192 bytes, runs 16,128 bytes, lists 69,576 bytes; 10.9 tiles a run"


@pytest.mark.parametrize(("relation", "tiles"), [(WINDOW, 253_456), (CAUSAL, 33_550_336)], ids=["window", "causal"])
def test_a_million_tokens_take_little_memory(relation: Index, tiles: int) -> None:
    """Runs, rectangles and bounds, forwards and transposed; of the causal relation, no list of its tiles."""
    tracemalloc.start()
    found = forms(relation, Grid(MILLION, MILLION, 128, 128))
    for one in (found, found.transposed):
        assert one.runs.full.tiles == one.rectangles.tiles == tiles
        assert one.bounds is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_lists_of_a_million_tokens() -> None:
    found = forms(WINDOW, Grid(MILLION, MILLION, 128, 128))
    tracemalloc.start()
    turned = found.lists.transposed()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(turned.full) == 253_456
    assert np.array_equal(turned.full.of_row(5000), np.arange(5001, 5032))
    assert peak < 32 << 20
