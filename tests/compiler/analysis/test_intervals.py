"""Interval analysis against brute force: bounds, states, class keys, and numbers near the limits of 64 bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.block_conditions import refine
from attnc.compiler.analysis.box_values import FALSE, TRUE, Truths
from attnc.compiler.analysis.intervals import Analysis, Boxes, fits_word
from attnc.compiler.ir import Data, Index, Truth, Var, fold
from attnc.compiler.ir.rewrite import aggregate, substitute
from attnc.spec.errors import EvaluationError
from expression_trees import LONG, Fault, Kit, Tree
from tiers import examples

Q, K = fold.place("q"), fold.place("k")
N = 48
Box = tuple[int, int, int, int]
"""First and last row, first and last key."""


def tiles(n_q: int, n_k: int, q_tile: int, k_tile: int, q_origin: int = 0, k_origin: int = 0) -> list[Box]:
    """Return a grid of tiles, clipped at all edges."""
    rows = [(max(a, 0), min(a + q_tile, n_q) - 1) for a in range(q_origin, n_q, q_tile)]
    keys = [(max(a, 0), min(a + k_tile, n_k) - 1) for a in range(k_origin, n_k, k_tile)]
    return [(*r, *k) for r in rows for k in keys]


def boxes(many: list[Box]) -> Boxes:
    columns = np.array(many, dtype=np.int64).reshape(-1, 4).T
    return Boxes(*(np.ascontiguousarray(column) for column in columns))


def inside(mask: NDArray[Any], box: Box) -> NDArray[Any]:
    q0, q1, k0, k1 = box
    return mask[q0 : q1 + 1, k0 : k1 + 1]


def mask_of(relation: Index, n_q: int = N, n_k: int = N) -> NDArray[np.bool_]:
    try:
        return exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    except EvaluationError:
        assume(False)
        raise


def classified_on(relation: Index, on: Boxes) -> Truths:
    """Return the state and class key of a relation on each box."""
    return Analysis(on, refine=refine).truth(relation)


def check(relation: Index, many: list[Box], n_q: int = N, n_k: int = N) -> None:
    """States hold everywhere on their boxes; equal keys and extents mean equal masks."""
    mask = mask_of(relation, n_q, n_k)
    classified = classified_on(relation, boxes(many))
    states = np.broadcast_to(classified.state, len(many))
    keys = np.broadcast_to(classified.key, len(many))
    classes: dict[tuple[int, int, int], tuple[Box, NDArray[Any]]] = {}
    for box, state, key in zip(many, states.tolist(), keys.tolist(), strict=True):
        part = inside(mask, box)
        if state == TRUE:
            assert part.all(), box
        elif state == FALSE:
            assert not part.any(), box
        else:
            first, known = classes.setdefault((key, *part.shape), (box, part))
            assert (known == part).all(), (first, box)


@st.composite
def tilings(draw: st.DrawFn) -> list[Box]:
    q_tile, k_tile = draw(st.integers(1, 17)), draw(st.integers(1, 17))
    return tiles(N, N, q_tile, k_tile, -draw(st.integers(0, q_tile - 1)), -draw(st.integers(0, k_tile - 1)))


@st.composite
def scattered(draw: st.DrawFn) -> list[Box]:
    """Draw boxes anywhere, overlapping, of a few sizes: they overlap in more ways than tiles do."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    sizes = random.integers(1, 9, (3, 2))
    many = []
    for _ in range(120):
        height, width = sizes[random.integers(3)].tolist()
        q, k = int(random.integers(0, N - height + 1)), int(random.integers(0, N - width + 1))
        many.append((q, q + height - 1, k, k + width - 1))
    return many


WITH_DATA = st.lists(trees.arrays(LONG), min_size=1, max_size=2).map(lambda data: Kit(data=tuple(data)))


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit()), st.one_of(tilings(), scattered()))
def test_states_and_keys(tree: Tree, many: list[Box]) -> None:
    check(trees.build(tree), many)


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit(aggregates=False, faults=False)), st.one_of(tilings(), scattered()))
def test_states_and_keys_without_aggregates(tree: Tree, many: list[Box]) -> None:
    """Aggregates share no class key, so that they would hide errors of the other nodes."""
    check(trees.build(tree), many)


@settings(max_examples=examples(150))
@given(st.data(), st.one_of(tilings(), scattered()))
def test_states_and_keys_of_data(data: st.DataObject, many: list[Box]) -> None:
    kit = data.draw(WITH_DATA)
    check(trees.build(data.draw(trees.truths(3, kit))), many)


def div(x: Tree, n: int) -> Tree:
    return Tree("floordiv", (x, trees.number(n)))


def mod(x: Tree, n: int) -> Tree:
    return Tree("mod", (x, trees.number(n)))


def minus(x: Tree, y: Tree) -> Tree:
    return Tree("sub", (x, y))


@st.composite
def coordinates(draw: st.DrawFn) -> Tree:
    """Draw flattened coordinates, their differences and extremes, on which plain intervals lose most."""
    place = draw(st.sampled_from([trees.Q, trees.K, trees.DELTA, minus(trees.K, trees.Q)]))
    width, extent = draw(st.sampled_from([1, 2, 3, 5, 8])), draw(st.sampled_from([2, 3, 4, 6, 7]))
    one = draw(st.sampled_from([div(place, width), mod(place, extent), mod(div(place, width), extent)]))
    other = draw(st.sampled_from([trees.Q, trees.K, div(trees.K, width), mod(trees.K, extent), trees.number(3)]))
    op = draw(st.sampled_from(["sub", "add", "min", "max"]))
    both = Tree(op, (one, other))
    return draw(
        st.sampled_from([both, Tree("abs", (both,)), mod(both, extent), div(both, width), minus(both, trees.Q)])
    )


@settings(max_examples=examples(150))
@given(coordinates(), coordinates(), st.sampled_from(["le", "eq", "lt"]), st.one_of(tilings(), scattered()))
def test_keys_of_coordinates(x: Tree, y: Tree, op: str, many: list[Box]) -> None:
    relation = Tree(op, (x, y))
    check(trees.build(relation), many)
    check(trees.build(Tree("choice", (relation, Tree("le", (y, trees.K)), Tree("lt", (x, trees.Q))))), many)
    picked = Tree("choice", (relation, x, y))
    check(trees.build(Tree("eq", (picked, trees.number(1)))), many)


@settings(max_examples=examples(150))
@given(
    st.one_of(trees.integers(3, Kit()), coordinates()),
    st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 4)] * 2), max_size=8),
)
def test_bounds_hold_every_value(tree: Tree, places: list[tuple[int, int, int, int]]) -> None:
    many = [(q, q + h - 1, k, k + w - 1) for q, k, h, w in places]
    assume(many)
    found = Analysis(boxes(many)).integer(trees.build(tree))
    lows, highs = np.broadcast_to(found.low, len(many)), np.broadcast_to(found.high, len(many))
    for (q0, q1, k0, k1), low, high in zip(many, lows.tolist(), highs.tolist(), strict=True):
        for q in range(q0, q1 + 1):
            for k in range(k0, k1 + 1):
                with suppress(Fault):
                    assert low <= trees.value(tree, {"q": q, "k": k}) <= high


DIFFERENCES: dict[str, Callable[[Index], Index]] = {
    "window": lambda d: fold.conjunction(fold.less_equal(fold.const(0), d), fold.less(d, fold.const(9))),
    "causal": lambda d: fold.less_equal(fold.const(0), d),
    "far": lambda d: fold.less(fold.const(11), fold.absolute(d)),
    "blocks of distance": lambda d: fold.less(fold.floordiv(d, fold.const(5)), fold.const(2)),
    "clamped": lambda d: fold.less(fold.minimum(fold.maximum(d, fold.const(-4)), fold.const(6)), fold.const(3)),
    "doubling": lambda d: fold.less_equal(fold.function("bitlen", fold.absolute(d)), fold.const(3)),
}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("tile", [3, 8, 13])
def test_monotone_differences_are_decided_exactly(name: str, tile: int) -> None:
    relation = DIFFERENCES[name](fold.sub(Q, K))
    mask, many = mask_of(relation), tiles(N, N, tile, tile)
    classified = classified_on(relation, boxes(many))
    for box, state in zip(many, np.broadcast_to(classified.state, len(many)).tolist(), strict=True):
        part = inside(mask, box)
        assert (state == TRUE) == part.all(), box
        if name != "window":
            assert (state == FALSE) == (not part.any()), box


@pytest.mark.parametrize("name", DIFFERENCES)
def test_tiles_on_one_diagonal_are_one_class(name: str) -> None:
    relation = DIFFERENCES[name](fold.sub(Q, K))
    many = tiles(N, N, 8, 8)
    keys = np.broadcast_to(classified_on(relation, boxes(many)).key, len(many)).tolist()
    by_distance = defaultdict(set)
    for (q, _, k, _), key in zip(many, keys, strict=True):
        by_distance[q - k].add(key)
    assert all(len(class_keys) == 1 for class_keys in by_distance.values())


def test_variables_of_unrolled_loops() -> None:
    """Unrolling the outer loop leaves inner loops that share a variable and differ in their ends."""
    i, j = fold.var("i", 1), fold.var("j", 2)
    inner = aggregate("any", j, Q, fold.add(Q, i), fold.truth(True), fold.equal(K, j))
    relation = aggregate("any", i, fold.const(1), fold.const(4), fold.less(Q, fold.const(40)), inner)
    for tile in (1, 2, 5):
        check(relation, tiles(N, N, tile, tile))


# --- blocks ----------------------------------------------------------------------------------------------------------

Keep = Callable[[NDArray[np.bool_]], bool]


def at_least(share: Index, whole: Index, numerator: int, denominator: int) -> Index:
    return fold.less_equal(fold.times(whole, numerator), fold.times(share, denominator))


def number_of(variable: Var, low: Index, high: Index, condition: Index) -> Index:
    return aggregate("sum", variable, low, high, fold.truth(True), fold.choice(condition, ONE, ZERO))


ONE, ZERO, YES = fold.const(1), fold.const(0), fold.truth(True)


@st.composite
def rounded(draw: st.DrawFn) -> tuple[Index, NDArray[np.bool_], tuple[int, int]]:
    """Draw a relation in blocks, with its mask computed block by block and the sizes of a block."""
    inner = trees.build(
        draw(st.one_of(trees.truths(2, Kit(aggregates=False, faults=False)), windows_and_coordinates()))
    )
    sizes, shifts = [draw(st.integers(1, 9)) for _ in "qk"], [draw(st.integers(0, 11)) for _ in "qk"]
    numbers, inside = (
        [fold.var(name, 0) for name in "ab"],
        [fold.var(name, serial) for name, serial in (("i", 1), ("j", 2))],
    )
    starts = [fold.sub(fold.times(n, size), fold.const(s)) for n, size, s in zip(numbers, sizes, shifts, strict=True)]
    lows = [fold.maximum(ZERO, fold.times(start, -1)) for start in starts]
    highs = [
        fold.minimum(fold.const(z), fold.sub(fold.const(N), start)) for z, start in zip(sizes, starts, strict=True)
    ]
    visible = substitute(inner, {Q: fold.add(starts[0], inside[0]), K: fold.add(starts[1], inside[1])})
    rows, columns = (inside[0], lows[0], highs[0]), (inside[1], lows[1], highs[1])
    height, width = (fold.sub(high, low) for _, low, high in (rows, columns))
    per_column = number_of(*rows, visible)
    forms: dict[str, tuple[Index, Keep]] = {
        "any": (aggregate("any", *columns, YES, aggregate("any", *rows, YES, visible)), lambda m: bool(m.any())),
        "all": (aggregate("all", *rows, YES, aggregate("all", *columns, YES, visible)), lambda m: bool(m.all())),
        "columns": (
            at_least(number_of(*columns, at_least(per_column, height, 1, 2)), width, 1, 3),
            lambda m: 3 * (2 * m.sum(0) >= len(m)).sum() >= m.shape[1],
        ),
        "even": (
            fold.zero(fold.mod(aggregate("sum", *columns, YES, per_column), fold.const(2))),
            lambda m: m.sum() % 2 == 0,
        ),
    }
    keep, counted = forms[draw(st.sampled_from(sorted(forms)))]
    units = [
        fold.floordiv(fold.add(p, fold.const(s)), fold.const(z)) for p, s, z in zip((Q, K), shifts, sizes, strict=True)
    ]
    relation = fold.rounded((numbers[0],), (units[0],), (numbers[1],), (units[1],), keep)
    return relation, blockwise(mask_of(inner), sizes, shifts, counted), (sizes[0], sizes[1])


@st.composite
def windows_and_coordinates(draw: st.DrawFn) -> Tree:
    width = draw(st.integers(0, 12))
    near = Tree("le", (Tree("abs", (trees.DELTA,)), trees.number(width)))
    row = draw(st.sampled_from([5, 8, 12]))
    places = Tree("abs", (minus(mod(trees.Q, row), mod(trees.K, row)),))
    same = Tree("le", (places, trees.number(draw(st.integers(0, 4)))))
    frames = Tree("le", (Tree("abs", (minus(div(trees.Q, row), div(trees.K, row)),)), trees.number(1)))
    return draw(st.sampled_from([near, same, Tree("and", (same, frames)), Tree("or", (near, frames))]))


def blockwise(mask: NDArray[np.bool_], sizes: list[int], shifts: list[int], keep: Keep) -> NDArray[np.bool_]:
    kept = np.zeros_like(mask)
    of_row, of_key = ((np.arange(N) + s) // z for s, z in zip(shifts, sizes, strict=True))
    for a in set(of_row.tolist()):
        for b in set(of_key.tolist()):
            block = np.ix_(of_row == a, of_key == b)
            kept[block] = keep(mask[block])
    return kept


@settings(max_examples=examples(120))
@given(rounded(), st.one_of(tilings(), scattered()))
def test_blocks(case: tuple[Index, NDArray[np.bool_], tuple[int, int]], many: list[Box]) -> None:
    """A rounded relation is the count of its blocks; states and keys hold, and boxes inside few blocks are decided."""
    relation, wanted, sizes = case
    assert (mask_of(relation) == wanted).all()
    check(relation, many)
    states = np.broadcast_to(classified_on(relation, boxes(many)).state, len(many))
    for box, state in zip(many, states.tolist(), strict=True):
        part = inside(wanted, box)
        few = (box[1] - box[0]) // sizes[0] + 2, (box[3] - box[2]) // sizes[1] + 2
        if not isinstance(relation, Truth) and few[0] * few[1] <= 64:
            assert (state == TRUE, state == FALSE) == (part.all(), not part.any()), box


# --- the limits of 64 bits --------------------------------------------------------------------------------------------


@st.composite
def large(draw: st.DrawFn) -> Tree:
    """Draw small expressions over numbers up to 2^63."""
    big = (1 << draw(st.integers(50, 63))) * draw(st.sampled_from([-1, 1])) + draw(st.integers(-3, 3))
    number = trees.number(max(-(1 << 63), min((1 << 63) - 1, big)))
    small = draw(st.sampled_from([trees.Q, trees.K, trees.DELTA, trees.number(draw(st.integers(-5, 5)))]))
    op = draw(st.sampled_from(["add", "sub", "mul", "min", "max", "floordiv", "mod", "bitand", "bitor", "xor"]))
    swapped = op in ("floordiv", "mod") and draw(st.booleans())
    both = Tree(op, (small, number) if swapped else (number, small))
    size = Tree("abs", (both,))
    functions = [both, size, div(both, 3), mod(both, 7), Tree("bitlen", (size,)), Tree("isqrt", (size,))]
    return draw(st.sampled_from([*functions, Tree("sub", (both, number)), Tree("mul", (both, small))]))


def unbounded(tree: Tree, q: int, k: int) -> Any:
    """Return the value in unbounded integers, or None where a step leaves 64 bits or has no value."""
    operands = [unbounded(operand, q, k) for operand in tree.operands]
    if None in operands:
        return None
    if tree.op in ("floordiv", "mod") and operands[1] == 0:
        return None
    result = trees._apply(tree, operands) if operands else trees.value(tree, {"q": q, "k": k})
    return result if -(1 << 63) <= result < 1 << 63 else None


@settings(max_examples=examples(120))
@given(large(), large(), st.sampled_from(["le", "eq"]))
@example(trees.number(-(1 << 50)), minus(Tree("bitor", (trees.number(1 << 62), trees.Q)), trees.number(1 << 62)), "le")
@example(minus(mod(trees.DELTA, 1 << 62), trees.number(0)), trees.number((1 << 61) + 1), "le")
@example(Tree("bitlen", (Tree("add", (trees.Q, trees.number((1 << 57) - 1))),)), trees.number(57), "eq")
def test_saturation_is_sound(x: Tree, y: Tree, op: str) -> None:
    """Decisions about huge numbers are true, and values that are called safe for 64 bits are evaluated exactly."""
    tree = Tree(op, (x, y))
    relation = trees.build(tree)
    n = 6
    wanted = [[unbounded(tree, q, k) for k in range(n)] for q in range(n)]
    many = [*tiles(n, n, 1, 1), *tiles(n, n, 3, 2), (0, n - 1, 0, n - 1)]
    found = classified_on(relation, boxes(many))
    for (q0, q1, k0, k1), state in zip(many, np.broadcast_to(found.state, len(many)).tolist(), strict=True):
        cells = {wanted[q][k] for q in range(q0, q1 + 1) for k in range(k0, k1 + 1)} - {None}
        assert state == 0 or cells <= {state == TRUE}, (q0, q1, k0, k1)
    for q in range(n):
        for k in range(n):
            if wanted[q][k] is not None:
                try:
                    assert exact_evaluation.mask(relation, (q, q + 1), (k, k + 1)).item() == wanted[q][k]
                except EvaluationError as error:
                    assert "64 bits" in str(error)  # a difference of two 64-bit numbers may need more than 64 bits


def test_expressions_that_fit_64_bits() -> None:
    small = fold.less_equal(fold.mul(Q, K), fold.const(1 << 40))
    assert fits_word(small, (0, 1 << 20), (0, 1 << 20))
    assert not fits_word(small, (0, 1 << 31), (0, 1 << 31))
    assert not fits_word(fold.less(fold.power(Q, K), fold.const(5)), (0, 100), (0, 100))
    assert not fits_word(fold.less(fold.times(Q, 1 << 62), K), (0, 4), (0, 4))


# --- data ------------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(60))
@given(st.integers(1, 300), st.integers(0, 1 << 16), st.booleans())
def test_range_tables(length: int, seed: int, matrix: bool) -> None:
    from attnc.compiler.analysis.range_table import RangeTable

    random = np.random.default_rng(seed)
    array = random.integers(-99, 99, (3, length) if matrix else length)
    first = np.sort(random.integers(0, length, (2, 40)), axis=0)
    row = np.full(40, 1, dtype=np.int64)
    ranges = [(row, row), (first[0], first[1])] if matrix else [(first[0], first[1])]
    low, high = RangeTable(Data("x", array)).bounds(ranges)
    line = array[1] if matrix else array
    wanted = [(line[a : b + 1].min(), line[a : b + 1].max()) for a, b in first.T.tolist()]
    found = zip(np.broadcast_to(low, 40).tolist(), np.broadcast_to(high, 40).tolist(), strict=True)
    assert list(found) == wanted


def test_range_tables_of_several_axes() -> None:
    """Short ranges are exact; longer ranges have the bounds of the whole array."""
    from attnc.compiler.analysis.range_table import RangeTable

    random = np.random.default_rng(3)
    array = random.integers(-99, 99, (5, 40, 30))
    first = random.integers(0, (5, 40, 30), (200, 3))
    last = np.minimum(first + random.integers(0, 7, (200, 3)) * (random.random((200, 1)) < 0.7), (4, 39, 29))
    low, high = RangeTable(Data("x", array)).bounds([(first[:, i], last[:, i]) for i in range(3)])
    for i, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        short = max(y - x for x, y in zip(a, b, strict=True)) < 4
        part = array[tuple(slice(x, y + 1) for x, y in zip(a, b, strict=True))] if short else array
        assert (low[i], high[i]) == (part.min(), part.max())


def test_boxes_that_read_the_same_entries_share_a_class() -> None:
    """In a map of blocks that numbers a few masks, all blocks with one number share a class."""
    kinds = np.random.default_rng(4).integers(0, 4, (16, 16))
    masks = np.random.default_rng(5).random((4, 8, 8)) < 0.5
    number = fold.data_read(Data("map", kinds), (fold.floordiv(Q, fold.const(8)), fold.floordiv(K, fold.const(8))))
    within = (fold.mod(Q, fold.const(8)), fold.mod(K, fold.const(8)))
    relation = fold.data_read(Data("masks", masks), (number, *within))
    rows, columns = (8 * x.ravel() for x in np.indices((16, 16)))
    classified = classified_on(relation, Boxes(rows, rows + 7, columns, columns + 7))
    keys = np.broadcast_to(classified.key, 256)
    assert len(set(keys.tolist())) == 4
    for number_of in range(4):
        assert len(set(keys[kinds.ravel() == number_of].tolist())) == 1


def test_range_tables_of_long_arrays_widen() -> None:
    from attnc.compiler.analysis.range_table import RangeTable

    array = np.arange((1 << 16) + 70)
    ends = np.array([0, 100, 1 << 16], dtype=np.int64), np.array([3, 200, (1 << 16) + 69], dtype=np.int64)
    low, high = RangeTable(Data("x", array)).bounds([ends])
    assert (low <= ends[0]).all() and (high >= ends[1]).all()
    assert (ends[0] - low < 64).all() and (high - ends[1] < 64).all()
