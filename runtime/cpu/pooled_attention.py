"""Keys that are units of tokens, or tokens among zeros: each vector and value made once, then attended to as keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.pooled import PooledKeys
from attnc.compiler.value_nodes import scale
from attnc.runtime.block_values import BlockValues
from attnc.runtime.cpu.hidden_values import is_finite
from attnc.runtime.folded import AT_ONCE, entries_at_once, folded, folded_heads
from attnc.runtime.pair_blocks import Operands, PairBlock


class PooledTensors(NamedTuple):
    """Keys and values (B, Hkv, keys, d), or of each query head; the score is `scale * dot(q, k) + more`."""

    k: Tensor
    v: Tensor
    scale: float
    more: float

    def of_scores(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(out, lse) of a softmax over products alone as that over the scores."""
        return (found[0], found[1] + self.more) if self.more else found


def made(operands: Operands, relations: Relations, pooled: PooledKeys) -> PooledTensors:
    """The keys of a call, differentiable in its tensors."""
    shape, dtype, numbers = relations.shape, operands.q[0].dtype, (0.0, 0.0)
    one_entry = range(0, shape.heads, 1 if pooled.by_head else operands.group)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for entries in _cut(operands, relations):
        at_once = folded(operands, entries)
        heads = folded_heads(one_entry, entries, shape.heads)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for window in _covering(relations, entries.start):
            values = _values(at_once, entries.start, heads, window, np.arange(window.n_k))
            numbers = _number(operands, values, pooled.factor), _number(operands, values, pooled.more)
            for part, node in zip(parts, (pooled.vector, pooled.value), strict=True):
                found = values.of(node)[:, 0]
                found = found.expand(len(heads), window.n_k, found.shape[-1])
                if found.requires_grad and not is_finite(found.detach()):
                    found = _apart(found.detach(), node, at_once, entries.start, heads, window)
                part.append(found)
        for side, part in zip(sides, parts, strict=True):
            side.append(torch.unflatten(torch.cat(part, 1), 0, (len(entries), len(one_entry))))
    keys, own = (torch.cat(side).to(dtype) for side in sides)
    return PooledTensors(keys, own, *numbers)


def _cut(operands: Operands, relations: Relations) -> Iterator[range]:
    """The batch entries whose keys are made at once; each alone where it has documents of its own."""
    shape = relations.shape
    width = max(x[0].shape[-1] for x in (operands.q, operands.v))
    numbers = AT_ONCE if relations.pattern.documents is not None else shape.heads * max(shape.n_q, shape.n_k) * width
    return entries_at_once(shape.batch, numbers, AT_ONCE)


def _values(
    operands: Operands, batch: int, heads: tuple[int, ...], window: Window, keys: NDArray[np.int64]
) -> BlockValues:
    """Return the evaluator for vectors of the keys `keys`."""
    alive = np.ones((1, 1, len(keys)), dtype=np.bool_)
    return BlockValues(operands, PairBlock(batch, heads, window, np.zeros(1, np.int64), keys, alive))


def _apart(
    found: Tensor, node: ir.Value, operands: Operands, batch: int, heads: tuple[int, ...], window: Window
) -> Tensor:
    """Vectors (heads, keys, d) of which some are not finite, each of these by itself, so that gradients are kept apart.

    A key that no row sees has a gradient of 0, and 0 · NaN is NaN.
    """
    finite = found.isfinite().all(-1).all(0)
    groups = [finite.nonzero().flatten(), *(~finite).nonzero()]
    parts = []
    for group in groups:
        part = _values(operands, batch, heads, window, group.numpy()).of(node)[:, 0] if len(group) else found[:, :0]
        part = part.expand(len(heads), len(group), found.shape[-1])
        parts.append(part if group is groups[0] else cast("Tensor", _StopZeros.apply(part)))  # type: ignore[no-untyped-call]
    return torch.cat(parts, 1).index_select(1, torch.cat(groups).argsort())


class _StopZeros(torch.autograd.Function):
    """An identity whose backward drops a gradient of zeros, so that autograd goes no further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad if grad.any() else None


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


def _number(operands: Operands, values: BlockValues, node: ir.Value | None) -> float:
    """What sizes and the scale alone make."""
    if node is None:
        return 0.0
    return operands.scale if node is scale() else float(values.of(node))
