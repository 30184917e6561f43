"""Read-only arrays, and ranges and pointers of lists sorted by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


def frozen(values: NDArray[Any], dtype: type[np.generic] = np.int32) -> NDArray[Any]:
    """Return a contiguous read-only copy. Raises OverflowError where int32 is too small for the numbers."""
    if dtype is np.int32 and len(values) and int(np.abs(values).max()) >= 1 << 31:
        raise OverflowError("more than 2^31 tiles")
    result = np.array(values, dtype=dtype, order="C")
    result.setflags(write=False)
    return result


def pointers_of(row: NDArray[Any], rows: int) -> Int32:
    """Return where each row's entries begin in a list sorted by row, followed by the length of the list."""
    return frozen(np.searchsorted(row, np.arange(rows + 1)))


def spread(low: NDArray[Any], high: NDArray[Any]) -> Int64:
    """Return the integers of every range [low, high), one range after another."""
    length = np.asarray(high, dtype=np.int64) - low
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.asarray(np.repeat(np.asarray(low, dtype=np.int64), length) + within)
