"""Receptive fields by dense matrices, and properties that receptive fields by sets must have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import networkx
import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Index
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.documents import Windows
from attnc.compiler.receptive.fields import Layer, WindowPairs, find_path, find_reach

Mask = NDArray[np.bool_]


def layer_of(n: int, *heads: Index) -> Layer:
    """Return a layer of some heads on n tokens."""
    return Layer(n, [WindowPairs(Windows.of(Window(0, 0, n, n, 0)), head, None, {}) for head in heads])


def fields(masks: Sequence[Mask], order: Sequence[int], layers: int) -> list[Mask]:
    """Return the (queries, tokens) reached after 0, 1, … layers: products of the matrices, each with its diagonal."""
    reached = [np.eye(len(masks[0]), dtype=np.bool_)]
    for layer in range(layers):
        mask = masks[order[layer % len(order)]].astype(np.float64)
        reached.append(reached[-1] | (mask @ reached[-1].astype(np.float64) > 0))
    return reached


def check_reach(kinds: Sequence[Layer], masks: Sequence[Mask], order: Sequence[int], query: int) -> None:
    """Check a query's receptive field, and the paths to it, against the matrices."""
    n = len(masks[0])
    tokens = range(n)
    used = [masks[kind] for kind in set(order)]
    reach = find_reach(kinds, order, query, 5, tokens)
    reached = [field[query] for field in fields(masks, order, len(reach.after) + 2 * len(order))]
    distance = np.abs(np.arange(n) - query)
    looks_back = not any(np.triu(mask, 1).any() for mask in used)
    assert reach.looks_back == looks_back
    wanted = np.arange(n) <= query if looks_back else np.ones(n, dtype=np.bool_)
    assert reach.wanted == wanted.sum()
    for item, field in zip(reach.after, reached, strict=False):
        assert item.tokens == field.sum()
        assert item.furthest == distance[field].max()
        missing = distance[wanted & ~field]
        assert item.within == (missing.min() - 1 if len(missing) else distance[wanted].max())
    first = [next((i for i, field in enumerate(reached) if field[t]), None) for t in tokens]
    assert list(reach.known) == first
    complete = [i for i, field in enumerate(reached) if (field | ~wanted).all()]
    assert reach.complete == (complete[0] if complete else None)
    assert reach.final == next(i for i, field in enumerate(reached) if (field == reached[-1]).all())
    for token in {0, n // 2, n - 1}:
        layer = first[token]
        if layer is not None:
            check_way(find_path(kinds, order, query, token, layer), masks, order)


def check_way(way: Sequence[int], masks: Sequence[Mask], order: Sequence[int]) -> None:
    """Check that every step is visible in its layer, or stays at its token."""
    for layer, (before, after) in enumerate(pairwise(way)):
        assert before == after or masks[order[layer % len(order)]][after, before], way


def fewest_changes(masks: Sequence[Mask], order: Sequence[int], query: int, token: int, layers: int) -> int:
    """Return the least number of changes of token on a path through this many layers."""
    graph = networkx.DiGraph()
    graph.add_node((layers, query))
    n = len(masks[0])
    for layer in range(layers):
        for after, before in np.argwhere(masks[order[layer % len(order)]] | np.eye(n, dtype=np.bool_)).tolist():
            graph.add_edge((layer, before), (layer + 1, after), changes=int(before != after))
    length: int = networkx.shortest_path_length(graph, (0, token), (layers, query), weight="changes")
    return length
