"""Keys that are units of tokens, with one vector and one value each, whatever the query."""

from __future__ import annotations

from attnc.compiler import ir
from attnc.compiler.heads import heads_read
from attnc.compiler.values import reads, scale, vector


def pooled_keys(node: ir.Attend) -> tuple[ir.Value, ir.Value] | None:
    """The vector and the value of a key, where the score is `scale * dot(q, vector)` and neither depends on a query."""
    softmax = isinstance(node.weights, ir.Softmax) and node.weights.extra is None
    if node.keys is None or not softmax or node.stack is not None or node.family is not None:
        return None
    match node.score:
        case ir.Apply(op="mul", operands=(a, b)) if scale() in (a, b):
            product = b if a is scale() else a
        case _:
            return None
    if not isinstance(product, ir.Dot) or vector("q") not in (product.left, product.right):
        return None
    key = product.right if product.left is vector("q") else product.left
    if "q" in reads(key) or "q" in reads(node.value) or heads_read([key, node.value]) == "head":
        return None
    return key, node.value
