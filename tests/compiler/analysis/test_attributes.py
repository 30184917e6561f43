"""Relations that read attributes of tokens: live tiles and runs, with masks evaluated where tiles share none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import Data, Index, fold
from attnc.compiler.planning import pieces, runs
from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.pieces import cover
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from plan_calls import call, lowered
from plan_checks import check_pieces, check_plan
from tiers import examples

Q, K = fold.place("q"), fold.place("k")
CAUSAL = fold.less_equal(K, Q)


def sorted_runs(rng: np.random.Generator, n: int, longest: int) -> NDArray[np.int64]:
    lengths = rng.integers(1, longest + 1, n)
    return np.repeat(np.arange(n) * 7 - 3, lengths)[:n]


def relation_of(kind: str, rng: np.random.Generator, n: int) -> Index:
    longest = int(rng.integers(1, 90))
    match kind:
        case "segments":
            seg = Data("seg", sorted_runs(rng, n, longest))
            return fold.conjunction(fold.equal(fold.data_read(seg, (Q,)), fold.data_read(seg, (K,))), CAUSAL)
        case "reach":
            ends = Data("ends", np.clip(np.arange(n) + rng.integers(-9, longest, n), 0, n))
            return fold.less(K, fold.data_read(ends, (Q,)))
        case "sorted":
            return fold.less(K, fold.data_read(Data("length", np.sort(rng.integers(0, n, n))), (Q,)))
        case "shifted":
            seg = Data("seg", sorted_runs(rng, n, longest))
            before = fold.data_read(seg, (fold.maximum(fold.sub(Q, fold.const(5)), fold.const(0)),))
            return fold.less_equal(fold.data_read(seg, (K,)), before)
        case _:
            flags = Data("flags", rng.integers(0, 9, n) > 7)
            other = Data("other", rng.integers(0, 9, n) > 7)
            marked = fold.disjunction(fold.data_read(flags, (Q,)), fold.data_read(other, (K,)))
            return fold.conjunction(marked, CAUSAL)


KINDS = ["segments", "reach", "sorted", "shifted", "flags"]
grids = st.tuples(st.sampled_from([8, 16]), st.sampled_from([0, 0, 3]))


@settings(max_examples=examples(80), deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 400), st.integers(0, 10_000), grids)
def test_equal_names_mean_equal_masks(kind: str, n: int, seed: int, tiles: tuple[int, int]) -> None:
    relation, grid = relation_of(kind, np.random.default_rng(seed), n), TileGrid(n, n, tiles[0], tiles[0], -tiles[1])
    mask = exact_evaluation.mask(relation, (0, n), (0, n))
    found = find_live_tiles(relation, grid)
    assert resolve(relation, found, {}).visible == mask.sum()
    for row, column, kind_of in zip(found.row.tolist(), found.column.tolist(), found.kind.tolist(), strict=True):
        if kind_of:
            first = int(np.flatnonzero(found.kind == kind_of)[0])
            boxes = [
                (slice(*grid.row_range(r)), slice(*grid.key_range(c)))
                for r, c in ((row, column), (int(found.row[first]), int(found.column[first])))
            ]
            assert np.array_equal(mask[boxes[0]], mask[boxes[1]])


@settings(max_examples=examples(80), deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(1, 400), st.integers(0, 10_000), grids, st.sampled_from([0, 1 << 9, 1 << 12])
)
def test_masks_evaluated_during_the_call(kind: str, n: int, seed: int, tiles: tuple[int, int], most: int) -> None:
    """However few classes may be resolved and masks kept, the pieces equal the relation."""
    relation, grid = relation_of(kind, np.random.default_rng(seed), n), TileGrid(n, n, tiles[0], tiles[0], -tiles[1])
    mask = exact_evaluation.mask(relation, (0, n), (0, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MAX_CLASS_ELEMENTS", most)
        patch.setattr(pieces, "MAX_MASK_ELEMENTS", most)
        try:
            found = cover(relation, grid, {})
        except TooManyClassesError:
            return
    check_pieces(found.pieces, found.masks, mask)
    assert found.visible in (None, mask.sum())


def test_segments_are_no_fallback() -> None:
    """Ids compared without a `documents` line give full rectangles, diagonals and shared masks."""
    lengths = [700, 1300, 90, 2000, 6]
    seg = np.repeat(np.arange(5), lengths)
    source = "pattern p\n    input seg: int[token]\n    visible seg[q] == seg[k] and k <= q\n"
    relations = Relations(lowered(source), call(len(seg), len(seg), seg=seg))
    plan = build_plan(relations)
    check_plan(plan, relations.mask(0, 0, 0, len(seg), 0, len(seg))[None, None])
    assert plan.schedule == "pieces"
    assert plan.fallback is None
    assert sum(len(g.pieces) for g in plan.groups) <= 40


def test_the_plan_mentions_masks_evaluated_during_the_call() -> None:
    n = 1 << 14
    rng = np.random.default_rng(0)
    ends = np.clip(np.arange(n) + rng.integers(0, 300, n), 0, n)
    source = "pattern p\n    input ends: int[token]\n    visible k < ends[q]\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MAX_CLASS_ELEMENTS", 1 << 20)
        plan = build_plan(Relations(lowered(source), call(n, n, ends=ends)))
    assert plan.schedule == "pieces"
    assert plan.fallback is None
    assert any("masks evaluated as they run" in reason for reason in plan.reasons)
    evaluated = sum(p.elements for g in plan.groups for p in g.pieces if p.mask == "exact")
    assert evaluated < n * n // 16
