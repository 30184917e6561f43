"""Integers and conditions in a recurrence's values, computed exactly for all tokens, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import Index, Value, Var, fold
from attnc.compiler.ir.rewrite import rebuild, rewrite, substitute
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.runtime.executors.recurrent.call_tokens import TOKEN, CallTokens

MOST_KEPT = 64
"""Maximum number of cached arrays when some depend on bound variables; each array has a number per token."""

Bound = tuple[tuple[Var, int], ...]
"""Values of the variables bound by the reductions and repetitions around a value."""


@dataclass
class TokenIntegers:
    """The integers and conditions of one call. `order`: positions in processing order, (H or 1, T); None: unchanged."""

    tokens: CallTokens
    order: NDArray[np.int64] | None = None
    _kept: dict[tuple[Index, Bound], NDArray[np.int64]] = field(default_factory=dict)

    def in_order(self, node: Index, bound: Bound = ()) -> NDArray[np.int64]:
        """Return `of(node)` in processing order, cached because every token reads it.

        Results that depend on bound variables are cached up to `MOST_KEPT`, as a variable may run over all tokens.
        """
        key = node, variables_read(node, bound)
        result = self._kept.get(key)
        if result is None:
            result = self._ordered(node, bound)
            if not key[1] or len(self._kept) < MOST_KEPT:
                self._kept[key] = result
        return result

    def _ordered(self, node: Index, bound: Bound) -> NDArray[np.int64]:
        result = self.of(node, bound)
        if self.order is None or result.shape[2] == 1:
            return result
        result = np.broadcast_to(result, (result.shape[0], max(result.shape[1], len(self.order)), result.shape[2]))
        return np.take_along_axis(result, np.broadcast_to(self.order, result.shape), 2)

    def of(self, node: Index, bound: Bound = ()) -> NDArray[np.int64]:
        """Return an integer, or a condition as 0 and 1, by position: (B or 1, H or 1, T or 1)."""
        root = substitute(node, {variable: fold.const(value) for variable, value in bound})
        return np.stack([np.stack([self._row(root, b, h) for h in self._heads(root)]) for b in self._batches(root)])

    def _row(self, node: Index, batch: int, head: int) -> NDArray[np.int64]:
        tokens = self.tokens
        count = tokens.counts[2] if TOKEN in node.below else 1
        window = Window(0, 0, tokens.counts[2], tokens.counts[2], 0)
        node = _later(node, tokens.before[min(batch, len(tokens.before) - 1)])
        specialised = specialise(node, tokens.sizes, tokens.slices, window, batch=batch, head=head, group=tokens.group)
        rows, keys = np.arange(count, dtype=np.int64), np.zeros(1, dtype=np.int64)
        active = np.ones((count, 1), dtype=np.bool_)
        wide = not fits_word(specialised, (0, max(count, 1)), (0, 1))
        return exact_evaluation.integers_at(specialised, rows, keys, active, tokens.origins, wide=wide)[:, 0]

    def _heads(self, node: Index) -> range:
        reads = any(isinstance(n, ir.HeadIndex) and n.name != "batch" for n in node.below) or _reads_dim(node, "head")
        return range(self.tokens.counts[1] if reads else 1)

    def _batches(self, node: Index) -> range:
        reads = any(isinstance(n, ir.HeadIndex) and n.name == "batch" for n in node.below) or _reads_dim(node, "batch")
        reads |= len(self.tokens.before) > 1 and TOKEN in node.below
        return range(self.tokens.counts[0] if reads else 1)


def variables_read(node: Value | Index, bound: Bound) -> Bound:
    """Return the bound variables that a node reads."""
    return tuple(pair for pair in bound if pair[0] in node.below)


def _reads_dim(node: Index, dim: str) -> bool:
    """Check whether a node looks up an input with the dimension `dim`."""
    return any(isinstance(n, ir.Lookup) and dim in n.tensor.dims for n in node.below)


@verified
def _later(node: Index, before: int) -> Index:
    """Return the index for a call after `before` tokens; inputs are still read at positions within the call."""
    if not before or TOKEN not in node.below:
        return node
    marked = rewrite(node, lambda n: rebuild(n, _children_at_here(n)) if isinstance(n, ir.Lookup) else None)
    moved = substitute(marked, {TOKEN: fold.add(TOKEN, fold.const(before))})
    return substitute(moved, {_HERE: TOKEN})


def _children_at_here(node: Index) -> tuple[Index, ...]:
    return tuple(_HERE if index is TOKEN else index for index in node.children())


_HERE = ir.intern(Var("here", -1))
