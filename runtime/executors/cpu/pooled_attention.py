"""Keys that are units of tokens, or padded tokens: their vectors and values are computed once, then attended to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis.pooled import PooledKeys
from attnc.compiler.ir.value_nodes import scale
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.executors.cpu.hidden_values import is_finite
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.folded import (
    AT_ONCE,
    entries_at_once,
    folded,
    folded_heads,
)
from attnc.runtime.values.pair_blocks import Operands, PairBlock


class PooledTensors(NamedTuple):
    """Keys and values (B, Hkv, keys, d), or (B, Hq, keys, d); the score is `scale * dot(q, k) + more`."""

    k: Tensor
    v: Tensor
    scale: float
    more: float

    def in_call(self, call: CallArguments) -> CallArguments:
        """Return a call over these keys and values."""
        return replace(call, k=self.k, v=self.v, scale=self.scale, known_sizes=call.sizes)

    def of_scores(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Convert (out, lse) of a softmax over products into (out, lse) over the scores."""
        return (pair[0], pair[1] + self.more) if self.more else pair


def made(operands: Operands, relations: Relations, pooled: PooledKeys) -> PooledTensors:
    """Compute the keys of a call, differentiable in its tensors."""
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
                vectors = values.of(node)[:, 0]
                vectors = vectors.expand(len(heads), window.n_k, vectors.shape[-1])
                if vectors.requires_grad and not is_finite(vectors.detach()):
                    vectors = _apart(vectors.detach(), node, at_once, entries.start, heads, window)
                part.append(vectors)
        for side, part in zip(sides, parts, strict=True):
            side.append(torch.unflatten(torch.cat(part, 1), 0, (len(entries), len(one_entry))))
    keys, pooled_values = (torch.cat(side).to(dtype) for side in sides)
    return PooledTensors(keys, pooled_values, *numbers)


def _cut(operands: Operands, relations: Relations) -> Iterator[range]:
    """Yield the batch entries whose keys are computed at once; single entries if each has its own documents."""
    shape = relations.shape
    width = max(x[0].shape[-1] for x in (operands.q, operands.v))
    numbers = AT_ONCE if relations.pattern.documents is not None else shape.heads * max(shape.n_q, shape.n_k) * width
    return entries_at_once(shape.batch, numbers, AT_ONCE)


def _values(
    operands: Operands, batch: int, heads: tuple[int, ...], window: Window, keys: NDArray[np.int64]
) -> BlockValues:
    """Return the evaluator for vectors of the keys `keys`."""
    active = np.ones((1, 1, len(keys)), dtype=np.bool_)
    return BlockValues(operands, PairBlock(batch, heads, window, np.zeros(1, np.int64), keys, active))


def _apart(
    vectors: Tensor, node: ir.Value, operands: Operands, batch: int, heads: tuple[int, ...], window: Window
) -> Tensor:
    """Recompute vectors (heads, keys, d), the non-finite ones one by one, so that gradients stay separate.

    A key that no row sees has a gradient of 0, and 0 · NaN is NaN.
    """
    finite = vectors.isfinite().all(-1).all(0)
    groups = [finite.nonzero().flatten(), *(~finite).nonzero()]
    parts = []
    for group in groups:
        part = _values(operands, batch, heads, window, group.numpy()).of(node)[:, 0] if len(group) else vectors[:, :0]
        part = part.expand(len(heads), len(group), vectors.shape[-1])
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
    """Yield the windows of a batch entry by their keys, and windows of the keys between them, which no row sees."""
    end, count = 0, relations.shape.n_k
    for window in sorted((w for w in relations.windows(batch) if w.n_k), key=lambda w: w.key):
        if window.key > end:
            yield Window(0, end, 1, window.key - end, 0)
        yield window
        end = window.key + window.n_k
    if end < count or not count:
        yield Window(0, end, 1, count - end, 0)


def _number(operands: Operands, values: BlockValues, node: ir.Value | None) -> float:
    """Evaluate a number that depends on sizes and the scale alone."""
    if node is None:
        return 0.0
    return operands.scale if node is scale() else float(values.of(node))
