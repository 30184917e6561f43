"""Relations over the coordinates of a grid of tokens, drawn by hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Index, fold

Q, K = fold.place("q"), fold.place("k")
Extents = tuple[int, ...]


def strides(extents: Extents) -> list[int]:
    return [int(np.prod(extents[i + 1 :])) for i in range(len(extents))]


def coordinate(place: Index, extents: Extents, axis: int, first: int = 0) -> Index:
    extent = None if axis == 0 else fold.const(extents[axis])
    return fold.coord(place, fold.const(first), fold.const(strides(extents)[axis]), extent, f"a{axis}")


def near(a: Index, b: Index, reach: int) -> Index:
    return fold.less_equal(fold.absolute(fold.sub(a, b)), fold.const(reach))


@st.composite
def one_axis(draw: st.DrawFn, extents: Extents, axis: int) -> Index:
    """Draw a relation between coordinates of one axis: windows, shifted windows, dilations, blocks, halves, ends."""
    q, k, n = coordinate(Q, extents, axis), coordinate(K, extents, axis), extents[axis]
    gap = fold.sub(q, k)
    size, reach = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    kinds = [
        near(q, k, reach),
        fold.less_equal(k, q),
        fold.equal(fold.mod(gap, fold.const(size + 1)), fold.const(0)),
        fold.conjunction(near(q, k, 2 * reach), fold.equal(fold.mod(gap, fold.const(size + 1)), fold.const(0))),
        fold.equal(fold.floordiv(q, fold.const(size)), fold.floordiv(k, fold.const(size))),
        fold.less(k, fold.const(size)),
        fold.less(fold.const(reach), q),
        near(fold.minimum(fold.maximum(q, fold.const(reach)), fold.const(max(n - 1 - reach, reach))), k, reach),
    ]
    return draw(st.sampled_from(kinds))


@st.composite
def grids(draw: st.DrawFn) -> tuple[Extents, Index]:
    """Draw extents, and a combination of relations on their axes, some of which couple two axes."""
    extents = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    parts = [draw(one_axis(extents, draw(st.integers(0, len(extents) - 1)))) for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        gaps = [fold.absolute(fold.sub(coordinate(Q, extents, i), coordinate(K, extents, i))) for i in (0, 1)]
        parts.append(fold.less_equal(fold.add(gaps[0], fold.times(gaps[1], 2)), fold.const(draw(st.integers(0, 9)))))
    if draw(st.booleans()):
        parts[0] = fold.negation(parts[0])
    while len(parts) > 1:
        join = draw(st.sampled_from([fold.conjunction, fold.disjunction]))
        parts = [join(parts[0], parts[1]), *parts[2:]]
    return extents, parts[0]


def truth(relation: Index, n: int) -> NDArray[np.bool_]:
    return exact_evaluation.mask(relation, (0, n), (0, n))
