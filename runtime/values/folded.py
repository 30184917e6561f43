"""Batch entries computed at once, with their heads folded into one entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from attnc.runtime.values.pair_blocks import Operands

AT_ONCE = 1 << 21
"""Maximum number of elements of the largest tensor of entries computed at once; 8 MiB in fp32."""


def folded(operands: Operands, entries: range) -> Operands:
    """Return the operands of consecutive batch entries with their heads concatenated; unchanged for one entry.

    A block of the result starts at batch entry `entries.start`, and head h of the i-th entry has the index i * query
    heads + h.
    """
    if len(entries) == 1:
        return operands
    q, k, v = (
        [torch.stack(list(x[entries.start : entries.stop])).flatten(0, 1)] * (entries.start + 1)
        for x in (operands.q, operands.k, operands.v)
    )
    return replace(operands, q=q, k=k, v=v, entry_heads=operands.q[0].shape[0])


def folded_heads(heads: Iterable[int], entries: range, of_entry: int) -> tuple[int, ...]:
    """Return the folded indices of some heads of every entry, each entry with `of_entry` query heads."""
    selected = tuple(heads)
    return tuple(i * of_entry + head for i in range(len(entries)) for head in selected)


def entries_at_once(batch: int, numbers: int, most: int) -> Iterator[range]:
    """Yield ranges of a batch whose entries, `numbers` elements each, hold at most `most` together; at least one."""
    step = max(most // max(numbers, 1), 1)
    for start in range(0, batch, step):
        yield range(start, min(start + step, batch))
