"""Figures of the machine code of kernels with a plain score: registers, shared memory and instructions.

`python benchmarks/kernels.py --facts` compiles causal attention and writes `compiled_figures.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

Tiles = tuple[int, int, int, int]
"""(queries of a tile, keys of a tile, warps, stages)."""

Key = tuple[str, str, int, str, Tiles]
"""(architecture, kernel, head dimension, dtype, tiles)."""


@dataclass(frozen=True, slots=True)
class CompiledFigures:
    """The figures of a kernel.

    `registers`: registers of a thread. `shared_kib`: KiB of shared memory of a program. `issued`, `alu`, `fma`, `exps`:
    the instructions of a warp for a full tile: all, of integer and compare units, of fp32 units, and exponentials.
    """

    registers: int
    shared_kib: float
    issued: int
    alu: int
    fma: int
    exps: int


@cache
def compiled_figures_by_kernel() -> Mapping[Key, CompiledFigures]:
    """Return all recorded figures by kernel."""
    text = resources.files(__package__).joinpath("compiled_figures.json").read_text(encoding="utf-8")
    return {_key(row): CompiledFigures(**row["seen"]) for row in json.loads(text)["kernels"]}


def find_figures(architecture: str, kernel: str, head_dim: int, dtype: str, shape: Tiles) -> CompiledFigures | None:
    """Return the figures of a kernel, or None where it was not compiled. The 16-bit dtypes share figures."""
    named = "bfloat16" if dtype == "float16" else dtype
    return compiled_figures_by_kernel().get((architecture, kernel, head_dim, named, shape))


def _key(row: Mapping[str, Any]) -> Key:
    q_tile, k_tile, warps, stages = row["shape"]
    return row["architecture"], row["kernel"], row["head_dim"], row["dtype"], (q_tile, k_tile, warps, stages)
