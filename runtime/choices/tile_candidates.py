"""The tiles of kernels that tuning may try: those that fit a target's machine."""

from __future__ import annotations

from functools import lru_cache

import torch

from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.kernel_source import Stage, TileShape
from attnc.compiler.kernels.targets import Target
from attnc.compiler.simulation.gpu_clocks import HeadSizes as SimulatedHeads
from attnc.compiler.simulation.gpu_clocks import Kernel, tile_shapes
from attnc.compiler.simulation.machine import Machine, MachineError, find_machine, machine_names

STAGES: tuple[Kernel, ...] = ("forward", "dq", "dkdv")
"""The kernels whose tiles are a choice."""

_MACHINES = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}
"""A machine of each target, whose limits per program are those of the target."""


def knob_of(attention: str, stage: Stage) -> str:
    """Return the knob name for the tiles of a kernel."""
    return f"{attention} {stage}".strip()


def machine_of(target: Target, device: torch.device | None = None) -> Machine | None:
    """Return the simulator's machine for a device, or one of its target; None where the simulator has none."""
    if device is not None and device.type == "cuda":
        title = torch.cuda.get_device_name(device).lower()
        named = [name for name in machine_names() if name.partition("-")[0] in title]
        if named:
            return find_machine(named[0])
    name = _MACHINES.get(target.name)
    return None if name is None else find_machine(name)


@lru_cache(64)
def allowed_shapes(target: Target, stage: Stage, heads: HeadShape) -> dict[str, TileShape]:
    """Return the tiles that fit a program of the target, by their text: no other tiles are accepted from anywhere."""
    machine = machine_of(target)
    assert stage in STAGES
    if machine is None:
        return {}
    try:
        shapes = tile_shapes(machine, stage, SimulatedHeads(heads.dk, heads.dv, heads.dtype))
    except (MachineError, KeyError):
        return {}
    return {str(shape): shape for shape in shapes}
