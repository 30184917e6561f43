"""Questions to a tensor, asked only where the answer is at hand: elsewhere the host would wait for the device."""

from __future__ import annotations

from torch import Tensor


def surely_all(truth: Tensor) -> bool:
    """Whether all of it is known to hold."""
    return truth.device.type == "cpu" and bool(truth.all())


def perhaps_any(truth: Tensor) -> bool:
    """Whether some of it may hold."""
    return truth.device.type != "cpu" or bool(truth.any())
