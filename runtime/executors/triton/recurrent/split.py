"""Splits of a call's heads into segments, and the number of segments."""

from __future__ import annotations

import torch

from attnc.compiler.recurrences.segment_count import fitting_segments
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import RecurrenceTensors


def check_segments(segments: int | None) -> None:
    """Check that the number of segments is at least 1; raises ArgumentError."""
    if segments is not None and segments < 1:
        raise ArgumentError(f"segments is {segments}: it must be 1 or more, or None for as many as fit the device")


def split(call: RecurrenceTensors, stage: str, segments: int | None) -> None:
    """Split a call for a pass whose walk is the kernel `stage`, into at most `segments`; None: as many as fit."""
    if segments is None:
        programs = call.programs(stage) * call.parts(stage)
        segments = fitting_segments(programs, call.chunks, multiprocessors(call.device))
    call.split(segments)


def is_filled(call: RecurrenceTensors, stage: str) -> bool:
    """Check whether a walk of a call, as it is split, has programs for half of the device."""
    return 2 * call.programs(stage) * call.parts(stage) >= multiprocessors(call.device)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 on the CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
