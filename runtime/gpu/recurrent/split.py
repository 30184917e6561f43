"""Whether the lanes of a call are split into segments, and into how many."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnc.compiler.recurrences.segments import fitting_segments
from attnc.runtime.errors import ArgumentError
from attnc.runtime.gpu.recurrent.call import Call


@dataclass(frozen=True)
class Splitting:
    """What a call asks for: `segments` at most, None: what fits the device.

    Raises ArgumentError on a number below 1.
    """

    segments: int | None = None

    def __post_init__(self) -> None:
        if self.segments is not None and self.segments < 1:
            raise ArgumentError(f"segments is {self.segments}: it must be 1 or more, or None for what fits the device")

    def split(self, call: Call, stage: str) -> None:
        """Split the call for a pass whose walk is the kernel `stage`."""
        call.split(self._fitting(call, stage) if self.segments is None else self.segments)

    def _fitting(self, call: Call, stage: str) -> int:
        return fitting_segments(call.programs(stage) * call.parts(stage), call.chunks, multiprocessors(call.device))


def is_filled(call: Call, stage: str) -> bool:
    """Whether a walk of a call, as it is split, has programs for half of the device."""
    return 2 * call.programs(stage) * call.parts(stage) >= multiprocessors(call.device)


def multiprocessors(device: torch.device) -> int:
    """Those of a device; 1 on the CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
