"""Token ranges equal the relation: for drawn relations, and for the library's patterns that have ranges."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import expression_trees as trees
from attnc.compiler.analysis.exact_evaluation import integers_at, mask
from attnc.compiler.analysis.token_ranges import MOST_RANGES, TokenRange, find_ranges
from attnc.compiler.ir import Index, fold
from expression_trees import DELTA, Tree, build
from plan_calls import from_library
from relations import CAUSAL, both, either, n, relations
from tiers import examples

Q, K = trees.Q, trees.K
Mask = NDArray[np.bool_]
Side = Literal["q", "k"]
SIDES: tuple[Side, Side] = ("k", "q")


def painted(ranges: tuple[TokenRange, ...], solved: Side, n_q: int, n_k: int) -> Mask:
    """Return the mask that the ranges describe, their ends clipped to the tokens."""
    q, k = np.arange(n_q), np.arange(n_k)
    columns = k[None, :] if solved == "k" else q[:, None]
    mask = np.zeros((n_q, n_k), dtype=np.bool_)
    for token_range in ranges:
        low = 0 if token_range.low is None else evaluated(token_range.low, q, k)
        high = n_q + n_k if token_range.high is None else evaluated(token_range.high, q, k)
        mask |= (low <= columns) & (columns <= high)
    return mask


def evaluated(node: Index, q: NDArray[Any], k: NDArray[Any]) -> NDArray[np.int64]:
    active = np.ones((len(q), len(k)), dtype=np.bool_)
    return integers_at(node, q.astype(np.int64), k.astype(np.int64), active, wide=False)


@st.composite
def ends(draw: st.DrawFn, place: Tree, depth: int = 2) -> Tree:
    """Draw a formula of one position as patterns write it: shifts, blocks, clamps, choices."""
    if not depth:
        return Tree("add", (place, n(draw(st.integers(-20, 20))))) if draw(st.booleans()) else place
    inner, size = ends(place, depth - 1), draw(st.integers(1, 12))
    match draw(st.integers(0, 6)):
        case 0:
            return Tree("mul", (Tree("floordiv", (draw(inner), n(size))), n(draw(st.integers(1, 12)))))
        case 1:
            return Tree("floordiv", (draw(inner), n(size)))
        case 2:
            return Tree("max", (draw(inner), n(draw(st.integers(-5, 30)))))
        case 3:
            return Tree("min", (draw(inner), n(draw(st.integers(-5, 30)))))
        case 4:
            test = Tree("lt", (Tree("mod", (place, n(size))), n(draw(st.integers(0, 12)))))
            return Tree("choice", (test, draw(inner), draw(inner)))
        case 5:
            return Tree("sub", (draw(inner), draw(inner)))
        case _:
            return draw(inner)


@st.composite
def bounded(draw: st.DrawFn) -> Tree:
    """Draw conditions that bound one position by a formula of the other."""
    a, b = draw(st.sampled_from([(Q, K), (K, Q)]))
    side = draw(ends(a))
    gap = Tree("sub", (b, side))
    reach = n(draw(st.integers(-1, 15)))
    match draw(st.integers(0, 7)):
        case 0:
            return Tree("le", (b, side))
        case 1:
            return Tree("ge", (b, side))
        case 2:
            return Tree("le", (Tree("abs", (gap,)), reach))
        case 3:
            return Tree("gt", (Tree("abs", (gap,)), reach))
        case 4:
            return Tree("eq", (Tree("floordiv", (b, n(draw(st.integers(1, 12))))), side))
        case 5:
            return Tree("le", (draw(ends(b, 1)), side))
        case 6:
            return Tree("choice", (Tree("lt", (a, reach)), Tree("le", (b, side)), CAUSAL))
        case _:
            return Tree("lt", (DELTA, n(draw(st.integers(1, 30)))))


@st.composite
def ranged(draw: st.DrawFn) -> Tree:
    """Draw unions, intersections and complements of bounded conditions."""
    match draw(st.integers(0, 5)):
        case 0:
            return either(draw(bounded()), draw(bounded()))
        case 1:
            return both(draw(bounded()), either(draw(bounded()), draw(bounded())))
        case 2:
            return Tree("not", (both(draw(bounded()), draw(bounded())),))
        case 3:
            return draw(relations())
        case _:
            return both(draw(bounded()), draw(bounded()))


@settings(max_examples=examples(400))
@given(ranged(), st.integers(1, 40), st.integers(1, 40))
def test_ranges_are_the_relation(tree: Tree, n_q: int, n_k: int) -> None:
    relation = build(tree)
    true = mask(relation, (0, n_q), (0, n_k))
    for solved in SIDES:
        found = find_ranges(relation, solved)
        if found is not None:
            assert len(found) <= MOST_RANGES
            assert np.array_equal(painted(found, solved, n_q, n_k), true), (solved, found)


def test_most_drawn_relations_have_ranges() -> None:
    """Otherwise the property above would hold vacuously."""
    found: list[bool] = []

    @settings(max_examples=examples(200), database=None)
    @given(ranged())
    def count(tree: Tree) -> None:
        found.append(find_ranges(build(tree), "k") is not None)

    count()
    assert sum(found) > len(found) // 3


LIBRARY: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("full", {}, (1, 1)),
    ("causal", {}, (1, 1)),
    ("sliding_window", {"window": 9}, (1, 1)),
    ("sliding_window", {"window": 9, "sinks": 3}, (2, 2)),
    ("blocked", {"block": 7}, (1, 1)),
    ("neighborhood_1d", {"window": 7}, (1, 1)),
    ("prefix_lm", {}, (1, 1)),
    ("moa", {"alpha": [16, 8], "beta": [0.25, 0.5], "block": 4}, (2, 1)),
    ("streaming", {"window": 9, "sinks": 3}, (2, 2)),
    ("gpt_oss", {"window": 9}, (1, 1)),
]


@pytest.mark.parametrize(("name", "values", "counts"), LIBRARY)
def test_library(name: str, values: dict[str, Any], counts: tuple[int, int]) -> None:
    relation = from_library(name, **values).attend.visible
    found = tuple(find_ranges(relation, solved) for solved in SIDES)
    assert tuple(len(ranges or ()) for ranges in found) == counts


@pytest.mark.parametrize(("name", "values"), [("power", {}), ("strided", {}), ("dilated_window", {})])
def test_patterns_without_ranges(name: str, values: dict[str, Any]) -> None:
    relation = from_library(name, **values).attend.visible
    assert find_ranges(relation, "k") is None


def test_everything_and_nothing() -> None:
    for solved in SIDES:
        assert find_ranges(fold.truth(False), solved) == ()
        (one,) = find_ranges(fold.truth(True), solved) or ()
        assert (one.low, one.high) == (None, None)


@pytest.mark.parametrize("solved", SIDES)
def test_conditions_of_rows_beside_ranges(solved: Side) -> None:
    """`make hunt`, part triton, case 153: `q != 3 or k >= q` lost the keys of rows that see every key."""
    row, column = (Q, K) if solved == "k" else (K, Q)
    for sign in ("eq", "ne"):
        for far in (fold.less_equal(build(row), build(column)), fold.less_equal(build(column), build(row))):
            only = fold.equal(build(row), fold.const(3))
            relation = fold.disjunction(only if sign == "eq" else fold.negation(only), far)
            ranges = find_ranges(relation, solved)
            assert ranges is not None
            assert np.array_equal(painted(ranges, solved, 9, 9), mask(relation, (0, 9), (0, 9)))
