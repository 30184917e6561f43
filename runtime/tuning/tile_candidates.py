"""The tiles of kernels that may be tried: those that fit the machine of a target."""

from __future__ import annotations

from functools import lru_cache

import torch

from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.kernel_source import Stage
from attnc.compiler.kernels.targets import Target
from attnc.compiler.simulation.gpu_clocks import HeadSizes as SimulatedHeads
from attnc.compiler.simulation.gpu_clocks import Kernel, TileShape, tile_shapes
from attnc.compiler.simulation.machine import Machine, MachineError, find_machine, machine_names

STAGES: tuple[Kernel, ...] = ("forward", "dq", "dkdv")
"""The kernels whose tiles are a choice."""

_MACHINES = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}
"""A machine of each target, whose limits of a program are those of the target."""


def knob_of(attention: str, stage: Stage) -> str:
    """The name by which the tiles of a kernel are decided."""
    return f"{attention} {stage}".strip()


def machine_of(target: Target, device: torch.device | None = None) -> Machine | None:
    """The machine that a device is, as the simulator knows it; one of its target else, None where there is none."""
    if device is not None and device.type == "cuda":
        title = torch.cuda.get_device_name(device).lower()
        named = [name for name in machine_names() if name.partition("-")[0] in title]
        if named:
            return find_machine(named[0])
    name = _MACHINES.get(target.name)
    return None if name is None else find_machine(name)


@lru_cache(64)
def allowed_shapes(target: Target, stage: Stage, heads: HeadShape) -> dict[str, TileShape]:
    """The tiles that fit a program of the target, by their text: no other is taken from anywhere."""
    machine = machine_of(target)
    assert stage in STAGES
    if machine is None:
        return {}
    try:
        found = tile_shapes(machine, stage, SimulatedHeads(heads.dk, heads.dv, heads.dtype))
    except (MachineError, KeyError):
        return {}
    return {str(shape): shape for shape in found}
