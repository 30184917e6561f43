"""Growth: formulas equal counts at other lengths, laws are the published ones, and fits are labelled as fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.growth.counts import counts
from attnc.compiler.growth.growth import Growth, find_growth, fit, fit_growth
from attnc.compiler.growth.open_relation import open_relation
from attnc.compiler.growth.periods import find_period
from attnc.compiler.ir import Index, Pattern, fold
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import alone, other_sizes
from attnc.runtime.texts.library import ModuleLoader, library_source, pattern_names
from attnc.spec.errors import EvaluationError
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from expression_trees import Tree
from plan_calls import lowered
from relations import relations
from tiers import examples

AWKWARD = (1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 255, 300, 511, 640, 777, 1000, 1023, 1025, 1280, 1344, 1537)

SMALL: dict[str, dict[str, object]] = {
    "block_diffusion": {"block": 4},
    "blocked": {"block": 50},
    "dilated_window": {"window": 20, "dilation": 3},
    "gpt_oss": {"window": 65},
    "log_sparse": {"segment": 16, "window": 32},
    "long_lora": {"groups": 2},
    "moa": {"alpha": [0, 16], "beta": [Fraction(1, 4), Fraction(1, 4)], "block": 8},
    "power": {"block": 32, "window": 3, "sink": 2},
    "s2_attention": {"block": 8, "local_blocks": 3, "vertical_stride": 4},
    "sliding_window": {"window": 100, "sinks": 3},
    "softcap": {"window": 33},
    "sparse_fixed": {"segment": 32, "summary": 5, "groups": 2},
    "sparse_transformer": {"stride": 24},
    "streaming": {"window": 50, "last": 7},
    "strided": {"stride": 20, "local": 33},
}
"""Parameters for which the lengths of the test lie beyond the first length of the formulas."""

LAWS = {
    "log_sparse": "O(n²/2)",
    "moa": "O(n²·7/16)",
    "sparse_transformer": "O(n²/48)",
    "streaming": "O(n·w) with w = 61",
    "blocked": "O(n·w) with w = 50",
    "dilated_window": "O(n·w) with w = 20",
    "gpt_oss": "O(n·w) with w = 65",
    "sliding_window": "O(n·w) with w = 103",
    "softcap": "O(n·w) with w = 33",
    "neighborhood_1d": "O(n·w) with w = 7",
    "strided": "O(n²/20)",
    "long_lora": "O(n²·7/16)",
    "sink_lora": "O(n²·15/64)",
    "block_diffusion": "O(n²/4)",
    "sparse_fixed": "O(n²·5/32)",
    "s2_attention": "O(n²/4)",
    "power": "O(n log n)",
}

GRIDS = {
    *("davit_window", "freeswim", "halo", "lingen_temporal", "monarch", "monarch_rt", "neighborhood_2d"),
    *("neighborhood_3d", "radial", "sliding_tile", "svg", "videofactory", "combiner", "hierarchical", "longformer"),
    *("combiner_axial", "combiner_log_sparse", "combiner_mixture"),
}
"""Grids, which have no length, and patterns whose keys are not tokens or that need a list or an input."""

REFUSED = {
    "attention_residual": "not tokens",
    "autoformer_lags": "not tokens",
    "bigbird": "random",
    "davit_channel": "not tokens",
    "document": "doc",
    "modality_mutual": "image_start",
    "prefix_lm": "prefix",
    "tree_verify": "prefix",
}


def library(name: str) -> Pattern:
    source = library_source(name)
    assert source is not None
    return lower(bind(load_program(source, ModuleLoader(None)), SMALL.get(name, {}), None))


def of(visible: Index) -> Pattern:
    """Return a pattern with this relation."""
    pattern = lowered('pattern full\n    """Everything."""\n')
    return replace(pattern, nodes=(replace(pattern.attend, visible=visible),))


def written(visible: str) -> Pattern:
    return lowered(f"pattern p\n    align end\n    let s = isqrt(keys)\n    visible {visible}\n")


def masks(pattern: Pattern, n: int, heads: int, number: int) -> list[NDArray[np.bool_]]:
    """Return the dense masks of all branches, for the first `heads` of `number` heads."""
    relations = [alone(node.visible, n, h, number) for node in pattern.nodes for h in range(heads)]
    return [exact_evaluation.mask(relation, (0, n), (0, n)) for relation in relations]


def live(mask: NDArray[np.bool_], tile: int) -> int:
    starts = np.arange(0, len(mask), tile)
    return int(np.logical_or.reduceat(np.logical_or.reduceat(mask, starts, axis=0), starts, axis=1).sum())


def check(pattern: Pattern, growth: Growth, lengths: Iterable[int], number: int = 2) -> int:
    """Check that formulas equal dense counts wherever they apply; return at how many lengths they did."""
    said = 0
    for n in lengths:
        pairs = growth.pairs is not None and growth.pairs.holds(n)
        tiles = growth.tiles is not None and growth.tiles.holds(n)
        if pairs or tiles:
            dense_masks = masks(pattern, n, growth.heads, number)
            said += 1
            if pairs and growth.pairs is not None:
                assert growth.pairs.at(n) == sum(int(m.sum()) for m in dense_masks), n
            if tiles and growth.tiles is not None:
                assert growth.tiles.at(n) == sum(live(m, growth.tile) for m in dense_masks), n
    return said


STATIC = sorted(set(pattern_names()) - set(REFUSED) - GRIDS)


@pytest.mark.parametrize("name", STATIC)
def test_the_library(name: str) -> None:
    pattern = library(name)
    growth = find_growth(pattern, heads=2, tile=32)
    assert growth.law == LAWS.get(name, "O(n²)")
    assert not growth.fitted
    assert growth.pairs is not None
    assert growth.tiles is not None or name == "landmark"  # its period and the tile's together are 1,632
    begins = [growth.pairs.start + more * growth.pairs.step for more in (0, 3)]
    conditions = [c for c, _ in pattern.requirements if not other_sizes(c)]
    allowed = [n for n in (*AWKWARD, *begins) if all(alone(c, n, 0, 2) is fold.truth(True) for c in conditions)]
    assert check(pattern, growth, allowed) >= 2
    assert growth.checked
    assert growth.law in str(growth)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_relations_that_read_inputs_are_refused(name: str) -> None:
    growth = find_growth(library(name))
    assert growth.law.startswith("no law")
    assert REFUSED[name] in growth.law
    assert (growth.pairs, growth.tiles, growth.cost, growth.fitted) == (None, None, None, False)


def test_known_formulas() -> None:
    causal, window, power = (find_growth(library(name)) for name in ("causal", "sliding_window", "power"))
    assert str(causal.pairs) == "n·(n + 1)/2, for every n"
    assert str(window.pairs) == "103·n − 5,253, for n ≥ 102"
    assert window.pairs is not None
    assert window.pairs.at(10**9) == 103 * 10**9 - 5253
    assert "L = ⌊log₂(⌊n/32⌋ − 2)⌋" in str(power.pairs)
    assert causal.cost == "65,536·d·(N·(N + 1)/2) FLOP, where N = ⌈n/128⌉"


def test_formulas_of_power_patterns_hold_at_long_lengths() -> None:
    """Lengths at and around powers of two, far from the counted lengths."""
    pattern = library("power")
    growth = find_growth(pattern, tile=32)
    assert growth.pairs is not None
    assert growth.tiles is not None
    edges = [32 * (2**j + 2) + more for j in (3, 5) for more in (-33, -1, 0, 1, 31, 32, 40)]
    assert check(pattern, growth, edges) == len(edges)


@pytest.mark.parametrize(
    ("visible", "law"),
    [
        ("k <= q and (q - k < s or (q - k) % s == 0)", "O(n√n)"),
        ("0 <= q - k < 2 * s + 3", "O(n√n)"),
        ("k <= q and (q - k) % (2 * s + 1) == 3 or 0 <= q - k <= 7", "O(n√n)"),
        ("k <= q and q - k < s and (q - k) % 5 == 0", "O(n√n)"),
        ("k <= q and q - k > s", "O(n²)"),
        ("q - k == s", "O(n)"),
        ("k <= q and (q - k < s if head % 2 == 0 else (q - k) % s == 0)", "O(n√n)"),
        ("k <= q and (q - k < s if head % 2 == 0 else q - k < 9)", "O(n√n)"),
    ],
)
def test_roots_of_the_length(visible: str, law: str) -> None:
    pattern = written(visible)
    growth = find_growth(pattern, heads=2)
    assert (growth.law, growth.fitted) == (law, False)
    assert growth.pairs is not None
    assert check(pattern, growth, range(growth.pairs.start, growth.pairs.start + 90)) == 90
    assert check(pattern, growth, (500, 777, 1023, 1024, 1025)) == 5


@pytest.mark.parametrize(
    "visible",
    [
        "(q - k) % s == 0",
        "abs(q - k) < s",
        "k <= q and isqrt(q - k) % 2 == 0",
        "k * k <= q",
        "k <= q and (q - k + 5) % 7 == 8 or 0 <= q - k < s",
    ],
)
def test_unproved_laws_are_fitted(visible: str) -> None:
    growth = find_growth(written(visible))
    assert growth.fitted
    assert (growth.pairs, growth.tiles) == (None, None)
    assert "fitted" in growth.law
    assert "residual" in str(growth)


def test_windows_longer_than_can_be_counted_are_not_fitted() -> None:
    growth = find_growth(written("0 <= q - k < 1000000"))
    assert growth.law == "no law: the relation compares sizes of up to 1,000,004 tokens, which is too long to count"
    assert not growth.fitted


def growth_over_frames(reach: str, per_frame: tuple[int, int]) -> Growth:
    """Fit the growth over the frames of a grid; each frame sees the frames of `reach`, and a window in them."""
    text = (
        "pattern grid(frames: int, height: int, width: int)\n    tokens t: frames, y: height, x: width\n"
        f"    visible {reach} and abs(q.y - k.y) <= 3 and abs(q.x - k.x) <= 5\n"
    )

    def at(frames: int) -> tuple[Index, int]:
        n = frames * per_frame[0] * per_frame[1]
        pattern = lowered(text, frames=frames, height=per_frame[0], width=per_frame[1])
        return alone(pattern.attend.visible, n, 0, 1), n

    return fit_growth(at, (8, 16, 24, 32))


@pytest.mark.parametrize(("reach", "exponent"), [("q.t == k.t", "1.00"), ("0 < 1", "2.00")])
def test_videos_are_counted_by_bricks_where_tiles_are_too_many(reach: str, exponent: str) -> None:
    growth = growth_over_frames(reach, (45, 80))
    assert growth.law.endswith(f"·n^{exponent}, fitted")
    assert growth.checked == tuple(frames * 45 * 80 for frames in (8, 16, 24, 32))


def test_counts_by_bricks_are_those_of_the_relation() -> None:
    heights, widths = ((np.abs(np.subtract.outer(range(n), range(n))) <= w).sum() for n, w in ((6, 3), (9, 5)))
    pairs = [frames * int(heights * widths) for frames in (8, 16, 24, 32)]
    tokens = [frames * 54 for frames in (8, 16, 24, 32)]
    assert growth_over_frames("q.t == k.t", (6, 9)).law == f"{fit(dict(zip(tokens, pairs, strict=True)))}, fitted"


def test_long_windows() -> None:
    growth = find_growth(written("0 <= q - k < 40000"))
    assert str(growth.pairs) == "40,000·n − 799,980,000, for n ≥ 39,999"
    assert "distances" not in growth.derivation[0]


@pytest.mark.parametrize(
    "visible",
    [
        "k <= q and q // max(keys // 4, 1) == k // max(keys // 4, 1)",
        "k <= q and q < keys // 3 + 5",
        "abs(2 * q - keys) <= 7",
        "q + 3 >= keys and k % 4 == 1 or q == k",
        "k <= q and 2 * (q - k) <= keys // 3",
    ],
)
def test_shares_of_the_length(visible: str) -> None:
    pattern = written(visible)
    growth = find_growth(pattern, tile=8)
    if growth.pairs is None:
        assert growth.fitted
        return
    step, start = growth.pairs.step, growth.pairs.start
    assert check(pattern, growth, range(start, start + 24 * step, step)) == 24


grids = st.sampled_from([8, 13, 32])


@settings(max_examples=examples(30))
@given(relations(), grids, st.integers(0, 300))
def test_drawn_relations(tree: Tree, tile: int, beyond: int) -> None:
    """A formula holds from its first length on, beyond the counted lengths."""
    pattern = of(trees.build(tree))
    try:
        growth = find_growth(pattern, tile=tile)
        starts = [f.start for f in (growth.pairs, growth.tiles) if f is not None]
        for start in starts:
            if start <= 700:
                check(pattern, growth, {start, start + 1, start + beyond})
        check(pattern, growth, (beyond, 700 + beyond))
    except EvaluationError:
        assume(False)
    assert growth.fitted == (growth.pairs is None and not growth.law.startswith("no law"))


shares = st.builds(
    lambda divisor, more, part: fold.add(
        fold.floordiv(fold.times(fold.extent("keys"), part), fold.const(divisor)), more
    ),
    st.integers(1, 4),
    st.integers(-9, 9).map(fold.const),
    st.integers(0, 2),
)
places = st.sampled_from([fold.place("q"), fold.place("k"), fold.sub(fold.place("q"), fold.place("k"))])
bounds = st.builds(fold.less_equal, places, shares) | st.builds(fold.less_equal, shares, places)
lengthy = st.recursive(
    bounds,
    lambda inner: (
        st.builds(fold.conjunction, inner, inner)
        | st.builds(fold.disjunction, inner, inner)
        | st.builds(fold.negation, inner)
    ),
    max_leaves=5,
)


@settings(max_examples=examples(30))
@given(lengthy, st.integers(0, 60))
def test_drawn_relations_that_read_the_length(relation: Index, beyond: int) -> None:
    pattern = of(relation)
    growth = find_growth(pattern, tile=16)
    if growth.pairs is not None and growth.pairs.start <= 1200:
        first, step = growth.pairs.start, growth.pairs.step
        check(pattern, growth, {first, first + step, first + beyond * step, -(-900 // step) * step})


@given(relations(), st.sampled_from([8, 16]), st.integers(17, 30))
def test_counts_of_all_lengths(tree: Tree, tile: int, rows: int) -> None:
    relation, n = trees.build(tree), rows * tile
    try:
        mask = exact_evaluation.mask(relation, (0, n), (0, n))
    except EvaluationError:
        assume(False)
        raise
    found = counts(relation, n, tile)
    for length in (1, tile - 1, tile, n // 2, n - 1, n):
        part = mask[:length, :length]
        assert found.pairs[length] == part.sum()
        if length % tile == 0:
            assert found.tiles[length // tile] == live(part, tile)
        elif found.whole[length // tile]:
            assert found.tiles[length // tile + 1] == live(part, tile)


def test_periods() -> None:
    q, k = fold.place("q"), fold.place("k")
    window = open_relation(fold.less(fold.sub(q, k), fold.const(100)), {}, 0, 1)
    period = find_period(window)
    assert period is not None
    assert (period.length, period.start) == (1, 208)
    assert find_period(open_relation(fold.less(fold.mul(q, k), fold.const(9)), {}, 0, 1)) is None


def test_fits() -> None:
    law = fit({n: 3 * n**2 for n in (64, 128, 256, 512)})
    assert law is not None
    assert (round(law.exponent, 6), round(law.factor, 6), round(law.residual, 6)) == (2, 3, 0)
    assert fit({64: 1, 128: 2}) is None


def test_grids_are_fitted() -> None:
    def relations(height: int) -> tuple[Index, int]:
        source = library_source("neighborhood_2d")
        assert source is not None
        bound = bind(load_program(source, ModuleLoader(None)), {"height": height, "width": 16}, None)
        return alone(lower(bound).attend.visible, height * 16), height * 16

    growth = fit_growth(relations, (8, 16, 32, 64))
    assert growth.law == "about 49·n^1.00, fitted"
    assert growth.fitted
    assert growth.checked == (128, 256, 512, 1024)
