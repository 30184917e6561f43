"""Batch entries computed at once, as if their heads were those of one entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from attnc.runtime.pair_blocks import Operands

AT_ONCE = 1 << 21
"""Numbers of the largest tensor that batch entries make at once; 8 MiB in fp32."""


def folded(operands: Operands, entries: range) -> Operands:
    """The operands of consecutive batch entries with all their heads one after another; unchanged for one entry.

    A block of the result starts at batch entry `entries.start`, and head h of the i-th of the entries has the number
    i * query heads + h.
    """
    if len(entries) == 1:
        return operands
    q, k, v = (
        [torch.stack(list(x[entries.start : entries.stop])).flatten(0, 1)] * (entries.start + 1)
        for x in (operands.q, operands.k, operands.v)
    )
    return replace(operands, q=q, k=k, v=v, entry_heads=operands.q[0].shape[0])


def folded_heads(heads: Iterable[int], entries: range, of_entry: int) -> tuple[int, ...]:
    """The numbers of some heads of every one of the entries, each with `of_entry` query heads."""
    own = tuple(heads)
    return tuple(i * of_entry + head for i in range(len(entries)) for head in own)


def entries_at_once(batch: int, numbers: int, most: int) -> Iterator[range]:
    """Cut a batch so that entries of `numbers` numbers each, taken together, hold at most `most`; one at least."""
    step = max(most // max(numbers, 1), 1)
    for start in range(0, batch, step):
        yield range(start, min(start + step, batch))


__all__ = ["AT_ONCE", "entries_at_once", "folded", "folded_heads"]
