"""Changes of shape for quantities: tensors, or pairs of mantissa and shift, over pair dimensions."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import Tensor

from attnc.runtime.values.pair_blocks import Int64
from attnc.runtime.values.scaled import Quantity, ScaledTensor


def map_tensors(value: Quantity, change: object) -> Quantity:
    """Apply a function to the tensor, or to the mantissa and the shift."""
    assert callable(change)
    if isinstance(value, ScaledTensor):
        return ScaledTensor(change(value.mantissa), change(value.shift))
    return cast("Tensor", change(value))


def append_dims(value: Quantity, dims: int) -> Quantity:
    """Append `dims` trailing dimensions of size one."""
    return map_tensors(value, lambda x: x.reshape(x.shape + (1,) * dims)) if dims > 0 else value


def append_tensor_dims(value: Tensor, dims: int) -> Tensor:
    """Append `dims` trailing dimensions of size one to a tensor."""
    return value.reshape(value.shape + (1,) * dims)


def prepend_dims(value: Quantity, dims: int) -> Quantity:
    """Prepend `dims` leading dimensions of size one."""
    return map_tensors(value, lambda x: x[(None,) * dims])


def drop_leading_dim(value: Quantity) -> Quantity:
    """Drop the leading dimension, of size one."""
    return map_tensors(value, lambda x: x.squeeze(0))


def select_positions(value: Quantity, axis: int, index: Tensor) -> Quantity:
    """Select rows (axis -2 of the pair dimensions, without loops) or keys (axis -1) by index."""
    return map_tensors(value, lambda x: x.index_select(3 + axis, index) if x.shape[3 + axis] > 1 else x)


def columns(array: Int64, axis: int) -> Int64:
    """Return a matrix whose column `i` holds all entries at position `i` of an axis."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
