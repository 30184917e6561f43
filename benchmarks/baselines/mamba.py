"""Mamba-2's chunked scan (state-spaces/mamba): the SSD layer's inner kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from baselines.fla import Run, Tensors
from baselines.rival import Absent, imported, version

NAME = "Mamba-2 SSD"
MODULE = "mamba_ssm.ops.triton.ssd_combined"
CHUNK = 256
"""The chunk of the published models."""


def available() -> str | None:
    """Return the version."""
    return version(MODULE, "mamba_ssm", "mamba-ssm")


def recurrence(decay: Tensor) -> Run | Absent:
    """Return S ← exp(dt · decay) S + dt · k ⊗ v, read by q; `decay` (heads,), below 0, and `dt` among the tensors."""
    module: Any = imported(MODULE)
    if module is None:
        return Absent("mamba_ssm is not installed")

    def run(tensors: Tensors) -> Tensor:
        x, dt, b, c = (tensors[name] for name in ("v", "dt", "k", "q"))
        out: Tensor = module.mamba_chunk_scan_combined(x, dt, decay, b, c, chunk_size=CHUNK)
        return out

    return run
