"""The parts for a GPU, in order of value: what is right first, then what is fast."""

from __future__ import annotations

from collections.abc import Iterator

import gpu_check
import gpu_recurrence
import gpu_routing
import gpu_trust
from part import Part, Row, Setting

NINE = 8.5
"""Minutes that every part stays below."""


def _keyed(rows: Iterator[Row], setting: Setting) -> Iterator[Row]:
    """Rows named by their number; those that are there are made again and left out."""
    for number, row in enumerate(rows):
        if (key := f"row {number}") not in setting.done:
            yield {"key": key, **row}


def check_correct(setting: Setting) -> Iterator[Row]:
    """Kernels against the reference in 64 bits."""
    return _keyed(gpu_check.correct(setting), setting)


def check_forward(setting: Setting) -> Iterator[Row]:
    """Beside FlexAttention and SDPA, forward."""
    return _keyed(gpu_check.forward(setting), setting)


def check_backward(setting: Setting) -> Iterator[Row]:
    """Beside FlexAttention and SDPA, with backward."""
    return _keyed(gpu_check.backward(setting), setting)


def check_decode(setting: Setting) -> Iterator[Row]:
    """A step against caches."""
    return _keyed(gpu_check.decode(setting), setting)


def recurrence_correct(setting: Setting) -> Iterator[Row]:
    """Recurrences against the token loop in 64 bits."""
    return _keyed((row for one in gpu_recurrence.SYSTEMS for row in gpu_recurrence.correct(setting, one)), setting)


def recurrence_forward(setting: Setting) -> Iterator[Row]:
    """Beside flash-linear-attention."""
    return _keyed((row for one in gpu_recurrence.SYSTEMS for row in gpu_recurrence.forward(setting, one)), setting)


def routing_correct(setting: Setting) -> Iterator[Row]:
    """Chosen places against the reference in 64 bits."""
    return _keyed(gpu_routing.correct(setting), setting)


def routing_speed(setting: Setting) -> Iterator[Row]:
    """Chosen places beside SDPA and published figures."""
    return _keyed(gpu_routing.speed(setting), setting)


def trust_tune(setting: Setting) -> Iterator[Row]:
    """Tiles measured beside predicted."""
    return _keyed(gpu_trust.tune(setting), setting)


PARTS: tuple[Part, ...] = (
    Part("gpu-correct", "correct", "kernels of masks and scores are right", "gpu_suites:check_correct", NINE),
    Part("gpu-recurrence-correct", "correct", "recurrences are right", "gpu_suites:recurrence_correct", NINE),
    Part("gpu-routing-correct", "correct", "chosen places are right", "gpu_suites:routing_correct", NINE),
    Part("gpu-forward", "windows", "masks beside FlexAttention, forward", "gpu_suites:check_forward", NINE),
    Part("gpu-backward", "backward", "masks beside FlexAttention, backward", "gpu_suites:check_backward", NINE),
    Part("gpu-recurrence-forward", "recurrence", "beside fla, forward", "gpu_suites:recurrence_forward", NINE),
    Part("gpu-routing-speed", "routing", "beside NSA-Triton and SDPA", "gpu_suites:routing_speed", NINE),
    Part("gpu-decode", "decode", "a step against caches", "gpu_suites:check_decode", NINE),
    Part("gpu-tune", "simulator", "tiles, predicted and measured", "gpu_suites:trust_tune", NINE),
)
