"""The call whose schedules are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.choices.records import Stage


@dataclass(frozen=True)
class TuneRequest:
    """A call to tune: its sizes, the pattern's inputs by name, the measured stage, and where it runs."""

    sizes: TensorSizes
    inputs: Mapping[str, object]
    stage: Stage
    device: torch.device
    by_kernels: bool
