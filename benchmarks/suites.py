"""The suites and their parts: each part is a process that keeps its rows in `results/<part>.json`."""

from __future__ import annotations

from collections.abc import Mapping

import gpu_suites
from benchmark_part import Part

SUITES = (
    "correct",
    "dense",
    "block_sparse",
    "windows",
    "backward",
    "decode",
    "recurrence",
    "routing",
    "plan",
    "compile",
    "simulator",
)

CPU = (
    Part("cpu-dense", "dense", "full and causal attention against SDPA and FlexAttention", "cpu_masks:dense", 3),
    Part("cpu-block_sparse", "block_sparse", "masks of whole blocks against both", "cpu_masks:block_sparse", 6),
    Part("cpu-windows-float32", "windows", "windows in fp32, forward, against both", "cpu_masks:windows_float32", 8),
    Part("cpu-windows-bfloat16", "windows", "windows in bf16, forward, against both", "cpu_masks:windows_bfloat16", 8),
    Part("cpu-backward", "backward", "masks with their gradients against SDPA", "cpu_masks:backward", 8.5),
    Part("cpu-weights", "backward", "special scores, keys and branches against torch", "weights:rows", 5),
    Part("cpu-decode", "decode", "a token with a cache against SDPA", "decode:rows", 3),
    Part("cpu-recurrence", "recurrence", "against a loop over tokens and fla's chunks in torch", "recurrence:rows", 8),
    Part("cpu-routing", "routing", "keys selected by scores against dense causal attention", "routing:rows", 5),
    Part("cpu-plan", "plan", "time and memory of plans of a million tokens", "plan:rows", 2),
    Part("cpu-block_masks", "plan", "BlockMask against create_block_mask", "block_masks:rows", 5),
    Part("cpu-compile", "compile", "imports, checks, first calls, new lengths", "compiling:rows", 5),
    Part("cpu-simulator", "simulator", "predicted and measured times", "simulator:rows", 8),
)

PARTS: Mapping[str, tuple[Part, ...]] = {"cpu": CPU, "gpu": gpu_suites.PARTS}
"""The parts by place, in order of value."""


def find(name: str) -> tuple[str, Part]:
    """Return the place and the part of a name. Raise KeyError if there is no such part."""
    for where, parts in PARTS.items():
        for part in parts:
            if part.name == name:
                return where, part
    raise KeyError(f"there is no part {name}; the names: run.py --list")


def chosen(where: str, suite: str) -> tuple[Part, ...]:
    """Return the parts of a suite, or of all suites."""
    return tuple(part for part in PARTS[where] if suite in ("all", part.suite))
