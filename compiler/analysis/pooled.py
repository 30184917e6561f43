"""Keys that are computed from tokens, such as units, with a vector and a value that do not depend on the query."""

from __future__ import annotations

from typing import NamedTuple

from attnc.compiler import ir
from attnc.compiler.analysis.heads import heads_read
from attnc.compiler.ir.value_nodes import (
    is_plain,
    is_scored,
    reads,
    vector,
)


class PooledKeys(NamedTuple):
    """The vector and value of a key, which do not depend on the query; the score is `factor * dot(q, vector) + more`.

    `more`: a number, None for 0. `by_head`: keys differ between the query heads of a kv head.
    """

    factor: ir.Value
    vector: ir.Value
    value: ir.Value
    more: ir.Value | None
    by_head: bool


def is_plain_or_pooled(node: ir.Attend) -> bool:
    """Whether an attention is the softmax of a multiple of `dot(q, k)`, after its keys are computed."""
    return node.family is None and (is_plain(node) or pooled_keys(node) is not None)


def pooled_keys(node: ir.Attend) -> PooledKeys | None:
    """Return the keys of an attention over units, or over tokens that read other tokens; None for other attentions."""
    softmax = isinstance(node.weights, ir.Softmax) and node.weights.extra is None
    if not softmax or node.stack is not None or node.family is not None or is_scored(node):
        return None
    score, more = _split_constant(node.score)
    match score:
        case ir.Apply(op="mul", operands=(factor, ir.Dot() as product)):
            pass
        case ir.Apply(op="mul", operands=(ir.Dot() as product, factor)):
            pass
        case _:
            return None
    if vector("q") not in (product.left, product.right) or not _is_constant(factor):
        return None
    key = product.right if product.left is vector("q") else product.left
    if "q" in reads(key) or "q" in reads(node.value):
        return None
    return PooledKeys(factor, key, node.value, more, heads_read([key, node.value]) == "head")


def _split_constant(score: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Split a score from a constant that is added to it; None for no constant."""
    match score:
        case ir.Apply(op="add", operands=(a, b)) if _is_constant(b):
            return a, b
        case ir.Apply(op="add", operands=(a, b)) if _is_constant(a):
            return b, a
        case _:
            return score, None


def _is_constant(node: ir.Value) -> bool:
    """Whether a number is the same for all queries, keys and heads, and reads no input."""
    return not reads(node) and not any(isinstance(below, ir.Element | ir.Lookup | ir.Vec) for below in node.below)
