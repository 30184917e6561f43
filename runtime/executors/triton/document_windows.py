"""The windows of packed sequences, computed on the device without waiting for it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Align = Literal["start", "end"] | None


def windows_of_documents(ids: Tensor, n_q: int, align: Align) -> tuple[Tensor, Tensor]:
    """Return the document window of every query and of every key, from ids (batch, keys) in contiguous runs.

    Each is int32 (batch, 5, tokens): first row, last row + 1, first key, last key + 1, and the offset by which a
    query's position in its document exceeds its row in the window.
    """
    n_k = ids.shape[1]
    position = torch.arange(n_k, device=ids.device)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(new, position, 0).cummax(1).values
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    end = torch.where(last, position + 1, n_k).flip(1).cummin(1).values.flip(1)
    return _windows(start, end, n_q, n_k, align)


def windows_of_boundaries(ends: Tensor, n_q: int, n_k: int, align: Align) -> tuple[Tensor, Tensor]:
    """Return the document windows from cumulative lengths, (sequences + 1,), for one batch entry."""
    position = torch.arange(n_k, device=ends.device, dtype=ends.dtype)
    number = torch.searchsorted(ends[1:].contiguous(), position, right=True).clamp(max=max(len(ends) - 2, 0))
    return _windows(ends[number][None].long(), ends[number + 1][None].long(), n_q, n_k, align)


def _windows(start: Tensor, end: Tensor, n_q: int, n_k: int, align: Align) -> tuple[Tensor, Tensor]:
    offset = n_k - n_q if align == "end" else 0
    row, row_end = (start - offset).clamp(min=0), (end - offset).clamp(max=n_q)
    of_keys = torch.stack([row, torch.maximum(row_end, row), start, end, row + offset - start], 1)
    key = torch.arange(n_q, device=start.device) + offset
    of_queries = (
        of_keys[:, :, key.clamp(min=0, max=max(n_k - 1, 0))] if n_k else of_keys.new_zeros((len(start), 5, n_q))
    )
    none = (key < 0) | (key >= n_k)  # queries before the first key and past the last key belong to no document
    empty = torch.zeros_like(of_queries)
    return torch.where(none, empty, of_queries).int().contiguous(), of_keys.int().contiguous()
