"""Keys that are units of tokens, or tokens among zeros: each vector and value made once, then attended to as keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.pooled import PooledKeys
from attnc.compiler.values import scale
from attnc.runtime.blocks import Block, Operands
from attnc.runtime.values import Values


class Keys(NamedTuple):
    """Keys and values (B, Hkv, keys, d), or of each query head; the score is `scale * dot(q, k) + more`."""

    k: Tensor
    v: Tensor
    scale: float
    more: float

    def of_scores(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(out, lse) of a softmax over products alone as that over the scores."""
        return (found[0], found[1] + self.more) if self.more else found


def made(operands: Operands, relations: Relations, pooled: PooledKeys) -> Keys:
    """The keys of a call, differentiable in its tensors."""
    step = 1 if pooled.by_head else operands.group
    count, heads = relations.shape.n_k, tuple(range(0, relations.shape.heads, step))
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    dtype, numbers = operands.q[0].dtype, (0.0, 0.0)
    for batch in range(relations.shape.batch):
        (window,) = relations.windows(batch)
        alive = np.ones((1, 1, count), dtype=np.bool_)
        values = Values(operands, Block(batch, heads, window, np.zeros(1, np.int64), np.arange(count), alive))
        numbers = _number(operands, values, pooled.factor), _number(operands, values, pooled.more)
        for side, node in zip(sides, (pooled.vector, pooled.value), strict=True):
            found = values.of(node)[:, 0]
            side.append(found.expand(len(heads), count, found.shape[-1]))
    keys, own = (torch.stack(side).to(dtype) for side in sides)
    return Keys(keys, own, *numbers)


def _number(operands: Operands, values: Values, node: ir.Value | None) -> float:
    """What sizes and the scale alone make."""
    if node is None:
        return 0.0
    return operands.scale if node is scale() else float(values.of(node))
