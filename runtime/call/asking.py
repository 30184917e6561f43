"""Checks of a tensor's values that never make the host wait: on other devices they return the safe answer."""

from __future__ import annotations

from torch import Tensor


def surely_all(truth: Tensor) -> bool:
    """Check that all entries are known to be true; False on a device, without waiting for it."""
    return truth.device.type == "cpu" and bool(truth.all())


def perhaps_any(truth: Tensor) -> bool:
    """Check whether an entry may be true; True on a device, without waiting for it."""
    return truth.device.type != "cpu" or bool(truth.any())
