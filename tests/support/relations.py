"""Relations of the kinds used by attention patterns, drawn by hypothesis, as text and IR."""

from __future__ import annotations

from hypothesis import strategies as st

import expression_trees as trees
from expression_trees import DELTA, Kit, Tree

Q, K = trees.Q, trees.K


def n(value: int) -> Tree:
    return trees.number(value)


def both(*parts: Tree) -> Tree:
    return Tree("and", parts)


def either(*parts: Tree) -> Tree:
    return Tree("or", parts)


CAUSAL = Tree("le", (K, Q))


@st.composite
def windows(draw: st.DrawFn) -> Tree:
    """Draw a causal or two-sided window, perhaps with sinks."""
    width = draw(st.one_of(st.integers(1, 12), st.integers(13, 200)))
    near = both(Tree("le", (n(-draw(st.integers(0, 9))), DELTA)), Tree("lt", (DELTA, n(width))))
    if draw(st.booleans()):
        return near
    return either(near, both(CAUSAL, Tree("lt", (K, n(draw(st.integers(1, 70)))))))


@st.composite
def blocks(draw: st.DrawFn) -> Tree:
    """Draw a relation between block numbers."""
    size = draw(st.integers(1, 40))
    a, b = Tree("floordiv", (Q, n(size))), Tree("floordiv", (K, n(size)))
    gap = Tree("sub", (a, b))
    kind = draw(st.sampled_from(["same", "near", "before", "power", "causal inside"]))
    match kind:
        case "same":
            return Tree("eq", (a, b))
        case "near":
            return Tree("le", (Tree("abs", (gap,)), n(draw(st.integers(0, 3)))))
        case "before":
            return Tree("lt", (b, Tree("add", (a, n(draw(st.integers(-2, 2)))))))
        case "power":
            return both(CAUSAL, either(Tree("lt", (gap, n(2))), Tree("power_of_two", (gap,))))
        case _:
            return both(CAUSAL, Tree("eq", (a, b)))


@st.composite
def modular(draw: st.DrawFn) -> Tree:
    """Draw strides and dilations."""
    step = draw(st.integers(1, 33))
    kind = draw(st.sampled_from(["distance", "column", "corner", "class"]))
    match kind:
        case "distance":
            return both(CAUSAL, Tree("eq", (Tree("mod", (DELTA, n(step))), n(draw(st.integers(0, step - 1))))))
        case "column":
            last = Tree("eq", (Tree("mod", (K, n(step))), n(step - 1)))
            return both(CAUSAL, either(last, Tree("lt", (DELTA, n(step)))))
        case "corner":
            inside = Tree("le", (Tree("mod", (K, n(step))), Tree("mod", (Q, n(step)))))
            return both(inside, Tree("eq", (Tree("mod", (Tree("floordiv", (K, n(step))), n(2))), n(0))))
        case _:
            return Tree("eq", (Tree("mod", (Q, n(step))), Tree("mod", (K, n(step)))))


@st.composite
def relations(draw: st.DrawFn, depth: int = 1) -> Tree:
    """Draw a pattern, a union or an intersection of patterns, or any expression."""
    kinds = [windows(), windows(), blocks(), modular(), trees.truths(2, Kit(faults=False)), st.just(CAUSAL)]
    kind = draw(st.integers(0, 8)) if depth else 8
    inner = relations(depth - 1)
    match kind:
        case 0:
            return either(draw(inner), draw(inner))
        case 1:
            return both(draw(inner), draw(inner))
        case 2:
            return Tree("not", (draw(inner),))
        case _:
            return draw(st.one_of(kinds))
