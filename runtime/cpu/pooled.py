"""Keys that are units of tokens, each with one vector and one value: made once, then attended to as keys."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.runtime.blocks import Block
from attnc.runtime.cpu.autograd import attend as attend_plain
from attnc.runtime.cpu.planned_call import Call
from attnc.runtime.values import Values


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
