"""Keys that are units of tokens, or tokens among zeros: each vector and value made once, then attended to as keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.pooled import PooledKeys
from attnc.compiler.values import scale
from attnc.runtime.blocks import Block, Operands
from attnc.runtime.values import Values


class Keys(NamedTuple):
    """Keys and values (B, Hkv, keys, d), and the factor of their products with queries."""

    k: Tensor
    v: Tensor
    scale: float


def made(operands: Operands, relations: Relations, pooled: PooledKeys) -> Keys:
    """The keys of a call, differentiable in its tensors."""
    count, heads = relations.shape.n_k, tuple(range(0, relations.shape.heads, operands.group))
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    dtype, factor = operands.q[0].dtype, 0.0
    for batch in range(relations.shape.batch):
        (window,) = relations.windows(batch)
        alive = np.ones((1, 1, count), dtype=np.bool_)
        values = Values(operands, Block(batch, heads, window, np.zeros(1, np.int64), np.arange(count), alive))
        factor = factor or _number(operands, values, pooled)
        for side, node in zip(sides, (pooled.vector, pooled.value), strict=True):
            found = values.of(node)[:, 0]
            side.append(found.expand(len(heads), count, found.shape[-1]))
    keys, own = (torch.stack(side).to(dtype) for side in sides)
    return Keys(keys, own, factor)


def _number(operands: Operands, values: Values, pooled: PooledKeys) -> float:
    """The factor, which sizes alone make."""
    return operands.scale if pooled.factor is scale() else float(values.of(pooled.factor))
