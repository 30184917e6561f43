"""Documents: contiguous runs of one id, each treated as a sequence of its own."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.lowering.specialise import Window


class DocumentsNotContiguousError(Exception):
    """An id comes back after another one. `position` is where, `id` which."""

    def __init__(self, position: int, identity: int) -> None:
        self.position = position
        self.identity = identity
        super().__init__(f"document {identity} comes back at position {position}")


def whole(n_q: int, n_k: int, align: Literal["start", "end"] | None) -> Window:
    """All tokens as one window; under `align end` the last query stands at the last key."""
    return Window(0, 0, n_q, n_k, n_k - n_q if align == "end" else 0)


def document_windows(ids: NDArray[Any], n_q: int, align: Literal["start", "end"] | None) -> tuple[Window, ...]:
    """A window for each document that has queries in this call, from the ids of the keys.

    Raises DocumentsNotContiguousError.
    """
    n_k = len(ids)
    if n_k == 0:
        return ()
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    _check_contiguous(ids[starts], starts)
    ends = np.append(starts[1:], n_k)
    offset = n_k - n_q if align == "end" else 0
    windows = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        first, last = max(start - offset, 0), min(end - offset, n_q)
        if last > first:
            windows.append(Window(first, start, last - first, end - start, first + offset - start))
    return tuple(windows)


def _check_contiguous(ids: NDArray[Any], starts: NDArray[np.int64]) -> None:
    distinct, first = np.unique(ids, return_index=True)
    if len(distinct) == len(ids):
        return
    again = int(np.setdiff1d(np.arange(len(ids)), first)[0])
    raise DocumentsNotContiguousError(int(starts[again]), int(ids[again]))
