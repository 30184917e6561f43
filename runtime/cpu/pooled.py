"""Keys that are units of tokens, or tokens among zeros: each vector and value made once, then attended to as keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import Window
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
    heads = tuple(range(0, relations.shape.heads, step))
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    dtype, numbers = operands.q[0].dtype, (0.0, 0.0)
    for batch in range(relations.shape.batch):
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for window in _covering(relations, batch):
            alive = np.ones((1, 1, window.n_k), dtype=np.bool_)
            values = Values(operands, Block(batch, heads, window, np.zeros(1, np.int64), np.arange(window.n_k), alive))
            numbers = _number(operands, values, pooled.factor), _number(operands, values, pooled.more)
            for part, node in zip(parts, (pooled.vector, pooled.value), strict=True):
                found = values.of(node)[:, 0]
                part.append(found.expand(len(heads), window.n_k, found.shape[-1]))
        for side, part in zip(sides, parts, strict=True):
            side.append(torch.cat(part, 1))
    keys, own = (torch.stack(side).to(dtype) for side in sides)
    return Keys(keys, own, *numbers)


def _covering(relations: Relations, batch: int) -> Iterator[Window]:
    """The windows of a batch entry by their keys, and windows of the keys between them, which no row sees."""
    at, count = 0, relations.shape.n_k
    for window in sorted((w for w in relations.windows(batch) if w.n_k), key=lambda w: w.key):
        if window.key > at:
            yield Window(0, at, 1, window.key - at, 0)
        yield window
        at = window.key + window.n_k
    if at < count or not count:
        yield Window(0, at, 1, count - at, 0)


def _number(operands: Operands, values: Values, node: ir.Value | None) -> float:
    """What sizes and the scale alone make."""
    if node is None:
        return 0.0
    return operands.scale if node is scale() else float(values.of(node))
