"""Keys that are units of tokens, each with one vector and one value: made once, then attended to as keys."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.heads import heads_read
from attnc.compiler.values import reads, scale, vector
from attnc.runtime.blocks import Block
from attnc.runtime.cpu.autograd import attend as attend_plain
from attnc.runtime.cpu.planned_call import Call
from attnc.runtime.values import Values


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


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, inputs: list[Tensor], pooled: tuple[ir.Value, ir.Value]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q (B, Hq, Nq, dk) over such keys, differentiable in q, k, v and the inputs."""
    operands = call.operands(q.unbind(0), k.unbind(0), v.unbind(0), inputs)
    count, heads = call.plan.n_k, tuple(range(0, q.shape[1], operands.group))
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in range(q.shape[0]):
        (window,) = call.relations.windows(batch)
        alive = np.ones((1, 1, count), dtype=np.bool_)
        values = Values(operands, Block(batch, heads, window, np.zeros(1, np.int64), np.arange(count), alive))
        for side, node in zip(sides, pooled, strict=True):
            found = values.of(node)[:, 0]
            side.append(found.expand(len(heads), count, found.shape[-1]))
    keys, own = (torch.stack(side).to(q.dtype) for side in sides)
    return attend_plain(q, keys, own, call.plan, call.scale)
