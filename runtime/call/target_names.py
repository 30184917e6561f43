"""Targets by name, without torch; `device_targets` finds the targets of present devices."""

from __future__ import annotations

from attnc.compiler.kernels.targets import TARGETS, Target
from attnc.runtime.call.call_errors import ArgumentError
from attnc.spec.suggest import did_you_mean


def find_target(name: str) -> Target:
    """Return the target with a name. Raises ArgumentError."""
    if name not in TARGETS:
        expected = f"it must be one of {', '.join(TARGETS)}"
        raise ArgumentError(f"target is {name!r}: {did_you_mean(name, list(TARGETS), expected)}")
    return TARGETS[name]
