"""Arrays that cannot be written to, and ranges and pointers of lists sorted by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


def frozen(values: NDArray[Any], dtype: type[np.generic] = np.int32) -> NDArray[Any]:
    """A contiguous copy that cannot be written to; raises OverflowError where the numbers do not fit."""
    if dtype is np.int32 and len(values) and int(np.abs(values).max()) >= 1 << 31:
        raise OverflowError("more than 2^31 tiles")
    result = np.array(values, dtype=dtype, order="C")
    result.setflags(write=False)
    return result


def pointers_of(row: NDArray[Any], rows: int) -> Int32:
    """Where each row's entries begin in a list sorted by row, and where the last ends."""
    return frozen(np.searchsorted(row, np.arange(rows + 1)))


def spread(low: NDArray[Any], high: NDArray[Any]) -> Int64:
    """The numbers of every range [low, high), one range after another."""
    length = np.asarray(high, dtype=np.int64) - low
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.asarray(np.repeat(np.asarray(low, dtype=np.int64), length) + within)
