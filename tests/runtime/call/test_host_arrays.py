"""NumPy arrays of the host, copied once to the device of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnc.runtime.process.device_constants import on_device

CPU, META = torch.device("cpu"), torch.device("meta")


def test_on_a_cpu_a_tensor_shares_the_arrays_memory() -> None:
    array = np.arange(6).reshape(2, 3)
    assert torch.equal(on_device(array, CPU), torch.arange(6).reshape(2, 3))
    assert torch.equal(on_device(array.T, CPU, torch.float64), torch.arange(6.0).double().reshape(2, 3).T)
    assert on_device(array, CPU).data_ptr() == array.ctypes.data


def test_equal_arrays_are_copied_once() -> None:
    first = on_device(np.arange(7), META)
    assert on_device(np.arange(7), META) is first
    others: list[NDArray[Any]] = [
        np.arange(8),
        np.arange(7).astype(np.int32),
        np.arange(7)[::-1],
        np.arange(7).reshape(7, 1),
    ]
    assert all(on_device(other, META) is not first for other in others)
    assert on_device(np.arange(7), META, torch.float32) is not first
    assert on_device(np.arange(7), META, torch.float32).dtype == torch.float32
