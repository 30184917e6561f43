"""The cost of a selection, counted from its expressions and sizes: rows, blocks, products, operations."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attnc.compiler import ir
from attnc.compiler.analysis.keeping import most_kept
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.simulation.cpu_choices import Deciding
from attnc.runtime.call.call_shapes import TensorSizes
from attnc.runtime.executors.selections.head_sums import head_sums
from attnc.runtime.executors.selections.score_limits import AT_ONCE

PRODUCT = 64
"""Number of multiply-adds that count as one product."""

Node = ir.Value | ir.Index


def deciding(item: ir.Selection, sizes: TensorSizes, rows: int, items: int, at_once: int = AT_ONCE) -> Deciding:
    """Count the cost of a selection among `items` blocks for `rows` rows, with up to `at_once` scores at a time."""
    sums = list(head_sums(item.score))
    deciding_heads = {"head": sizes.heads, "kv_head": sizes.kv_heads}.get(item.by_heads or "", 1)
    outer = list(_nodes([item.score], {head_sum.node for head_sum in sums}))
    inner = list(_nodes([part for head_sum in sums for part in (head_sum.condition, head_sum.term)], ()))
    tested = [*_nodes([item.candidates, item.always], ()), *(x for x in (*outer, *inner) if not _is_value(x))]
    wide = sizes.heads if sums else deciding_heads
    blocks = -(-rows // (rows if item.pairs else max(at_once // max(items * wide, 1), 1))) if rows else 0
    scores = sizes.batch * deciding_heads * rows * items
    per_head = sizes.batch * sizes.heads * rows * items
    counted = most_kept(item.keep) is not None
    ranks = {node.name for node in item.keep.below if isinstance(node, ir.Ranking)} & {"rank", "mass"}
    return Deciding(
        nodes=len({*outer, *inner, *tested}) * blocks * sizes.batch,
        rows=sizes.batch * deciding_heads * rows,
        places=scores if counted else 0,
        ordered=scores if ranks and not counted else 0,
        products=(_products(outer) * scores + _products(inner) * per_head) * sizes.dk / PRODUCT,
        operations=_operations(outer) * scores + (_operations(inner) + len(sums)) * per_head,
        tests=sum(map(_is_paired, tested)) * sizes.batch * rows * items,
        pooled=sum(_pooled(node, sizes) for node in {*outer, *inner}),
    )


def besides(pattern: ir.Pattern, sizes: TensorSizes) -> Deciding:
    """Count the cost of combining the attentions of a pattern and of averaging keys over units of tokens."""
    roots = [root for root in (pattern.combine,) if root is not None]
    joining = sum(isinstance(node, ir.Apply) for node in _nodes(roots, ()))
    units = sum(node.keys is not None for node in pattern.nodes)
    keys = sizes.batch * sizes.kv_heads * sizes.n_k * (sizes.dk + sizes.dv)
    return Deciding(operations=joining * sizes.batch * sizes.heads * sizes.n_q * sizes.dv, pooled=units * keys)


def _nodes(roots: Collection[Node], inner: Collection[ir.Value]) -> Iterator[Node]:
    """Yield every distinct node, without the subexpressions of `inner` and the terms of other aggregates."""
    seen = set[object](inner)
    pending: list[object] = list(roots)
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, ir.Node):
            continue
        seen.add(node)
        yield node  # type: ignore[misc]  # children of values and indices are values or indices
        if not isinstance(node, ir.ValueReduce | ir.VisibleReduce):
            pending.extend(node.children())


def _is_value(node: Node) -> bool:
    return isinstance(node, ir.VALUES)


def _is_paired(node: Node) -> bool:
    """Check whether an index expression differs for every pair of row and block."""
    return not _is_value(node) and {"q", "k"} <= reads(node)


def _products(nodes: list[Node]) -> int:
    return sum(isinstance(node, ir.Dot) and {"q", "k"} <= reads(node) for node in nodes)


def _operations(nodes: list[Node]) -> int:
    return sum(isinstance(node, ir.Apply | ir.FloatSelect) and {"q", "k"} <= reads(node) for node in nodes)


def _pooled(node: Node, sizes: TensorSizes) -> int:
    """Return how many elements of keys, or of queries, an aggregate averages."""
    if not isinstance(node, ir.ValueReduce):
        return 0
    heads, tokens = (sizes.heads, sizes.n_q) if "q" in reads(node) else (sizes.kv_heads, sizes.n_k)
    return sizes.batch * heads * tokens * sizes.dk


__all__ = ["PRODUCT", "besides", "deciding"]
