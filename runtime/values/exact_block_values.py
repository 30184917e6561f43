"""Integers and conditions of the IR over one block of pairs, and the mask of active pairs of each node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis.exact_evaluation import PairLanes
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.lowering.specialise import specialise
from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.pair_blocks import (
    Int64,
    Loops,
    Operands,
    PairBlock,
    PairMask,
)
from attnc.runtime.values.scaled import Quantity, ScaledTensor
from attnc.runtime.values.window_forms import form_of_window

S = TypeVar("S", np.int64, np.float64, np.bool_)

_HEAD = ir.intern(ir.Var("a head", 0))
_ENTRY = ir.intern(ir.Var("a batch entry", 0))


class ExactBlockValues:
    """Exact values over one block: arrays (…, heads or 1, rows or 1, keys or 1), with a leading dimension per loop.

    These are the pair dimensions. A pair is active where its value is used; entries of inactive pairs are arbitrary.
    """

    def __init__(self, operands: Operands, block: PairBlock, loops: Loops) -> None:
        self.operands = operands
        self.block = block
        self.loops = loops
        self._axes: dict[ir.Value | ir.Index, tuple[bool, ...]] = {}
        self._active: dict[tuple[bool, ...], PairMask] = {}

    def holds(self, condition: ir.Index) -> PairMask:
        """Return where a condition holds: (heads or 1, rows or 1, keys or 1)."""
        if not ir.is_truth(condition):
            return np.asarray(self.integers(condition) != 0)
        return self._by_head(condition, PairLanes.truths)

    def integer(self, node: ir.Index) -> int:
        """Return an integer that is equal for all pairs."""
        return int(self.integers(node).flat[0])

    def integers(self, node: ir.Index) -> Int64:
        """Return an integer, or a condition as 0 and 1, over the pair dimensions that it reads.

        Entries of inactive pairs are arbitrary.
        """
        return self._by_head(node, PairLanes.integers)

    def floats(self, node: ir.Index) -> NDArray[np.float64]:
        """Return an integer in binary64, even where it exceeds 64 bits."""
        return self._by_head(node, PairLanes.floats)

    # --- pair dimensions ---

    @property
    def pair_dims(self) -> int:
        """The number of pair dimensions."""
        return 3 + self.loops.depth

    def over_loops(self, mask: PairMask) -> PairMask:
        """Return a mask with a leading dimension of size one for every loop that it lacks."""
        return mask.reshape((1,) * (self.pair_dims - mask.ndim) + mask.shape)

    def rank_of(self, value: Quantity) -> int:
        """Return how many dimensions a value has beyond the pair dimensions."""
        return (value.mantissa if isinstance(value, ScaledTensor) else value).ndim - self.pair_dims

    def axes(self, node: ir.Value | ir.Index) -> tuple[bool, ...]:
        """Return for each pair dimension whether a node depends on it."""
        axes = self._axes.get(node)
        if axes is None:
            axes = self._axes[node] = self._axes_of(node)
        return axes

    def _axes_of(self, node: ir.Value | ir.Index) -> tuple[bool, ...]:
        read = reads(node)
        axes = [False] * self.loops.depth + [self.differs_by_head(read), "q" in read, "k" in read]
        for value in self.loops.of(node).values():
            axes = [a or n > 1 for a, n in zip(axes, value.shape, strict=True)]
        return tuple(axes)

    def differs_by_head(self, read: frozenset[str]) -> bool:
        """Check whether a node that reads `read` depends on the head dimension.

        That dimension also holds the batch entry where several entries are folded into heads.
        """
        return "head" in read or (self.operands.entry_heads is not None and "batch" in read)

    def active(self, node: ir.Value | ir.Index) -> PairMask:
        """Return the active pairs, reduced to the pair dimensions that a node reads."""
        axes = self.axes(node)
        active = self._active.get(axes)
        if active is None:
            unread = tuple(i for i, read in enumerate(axes) if not read)
            active = np.asarray(self.over_loops(self.block.active).any(axis=unread, keepdims=True))
            self._active[axes] = active
        return active

    def constant(self, value: float) -> Tensor:
        """Return a number with pair dimensions of size one."""
        shape = (1,) * self.pair_dims
        return torch.full(shape, value, dtype=self.operands.dtype, device=self.operands.device)

    def tensor(self, array: NDArray[np.int64 | np.bool_]) -> Tensor:
        """Return an array as a tensor on the device of the call."""
        return on_device(array, self.operands.device)

    # --- evaluation ---

    def _by_head(self, node: ir.Index, evaluate: Callable[[PairLanes, ir.Index], NDArray[S]]) -> NDArray[S]:
        """Evaluate an exact expression for all heads at once, or head by head where it is tabulated for each."""
        block, axes = self.block, self.axes(node)
        active, bound = self.active(node), self.loops.of(node)
        places = block.rows if axes[-2] else block.rows[:1], block.keys if axes[-1] else block.keys[:1]
        counts = block.window.n_q, block.window.n_k
        origins, masks = self.operands.origins, self.operands.masks
        heads = np.array(block.heads if axes[-3] else block.heads[:1])
        parts = []
        for at in self._evaluated_at_once(node, heads):
            head_active, variables = select_heads(active, at), {v: select_heads(x, at) for v, x in bound.items()}
            entry, head = self._entries_and_heads(heads[at])
            if at.stop - at.start == 1:
                variables = {v: x[..., 0, :, :] for v, x in variables.items()}
                specialised, lengths = self._specialised(node, int(entry[0]), int(head[0]))
                pairs = PairLanes(*places, {**variables, **lengths}, head_active[..., 0, :, :], counts, origins, masks)
                parts.append(evaluate(pairs, specialised)[..., None, :, :])
                continue
            variables |= {_HEAD: head[:, None, None], _ENTRY: entry[:, None, None]}
            one_entry = int(entry[0]) if entry[0] == entry[-1] else _ENTRY
            specialised, lengths = self._specialised(node, one_entry, _HEAD)
            pairs = PairLanes(*places, {**variables, **lengths}, head_active, counts, origins, masks)
            part = evaluate(pairs, specialised)
            shape = np.broadcast_shapes(part.shape, (len(head), 1, 1))
            parts.append(part if part.shape == shape else np.array(np.broadcast_to(part, shape)))
        return np.concatenate(parts, -3) if len(parts) > 1 else parts[0]

    def _evaluated_at_once(self, node: ir.Index, heads: Int64) -> list[slice]:
        """Return the slices of the block's heads that share one evaluation of an exact expression."""
        # RoundToInt is tabulated for each head.
        if any(isinstance(subexpression, ir.RoundToInt) for subexpression in node.below):
            return [slice(i, i + 1) for i in range(len(heads))]
        return [slice(0, len(heads))]

    def _entries_and_heads(self, heads: Int64) -> tuple[Int64, Int64]:
        """Return the batch entry of each head of the block, and the head's index within that entry."""
        size, first = self.operands.entry_heads, self.block.batch
        return (np.full_like(heads, first), heads) if size is None else (first + heads // size, heads % size)

    def _specialised(
        self, node: ir.Index, entry: int | ir.Var, head: int | ir.Var
    ) -> tuple[ir.Index, Mapping[ir.Var, Int64]]:
        """Return an exact expression for the block's window, a batch entry and a head, with sizes that it reads."""
        block, operands = self.block, self.operands
        window, group = block.index_window, operands.group
        form = form_of_window(node, operands.sizes, window, entry, head, group)
        if form is not None:
            return form
        key = (node, window, entry, head)
        specialised = operands.specialised.get(key)
        if specialised is None:
            at = {"batch": entry, "head": head, "group": group}
            specialised = specialise(node, operands.sizes, operands.slices, window, **at)  # type: ignore[arg-type]
            operands.specialised[key] = specialised
        return specialised, {}


def select_heads(array: NDArray[S], heads: slice) -> NDArray[S]:
    """Return some heads of an array (…, heads or 1, rows, keys)."""
    return array if array.shape[-3] == 1 else array[..., heads, :, :]
