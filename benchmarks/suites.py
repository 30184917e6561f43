"""The suites and their parts: each a process of its own that keeps its rows in `results/<part>.json`."""

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
    Part("cpu-dense", "dense", "full and causal attention beside SDPA and FlexAttention", "cpu_masks:dense", 3),
    Part("cpu-block_sparse", "block_sparse", "masks of whole blocks beside both", "cpu_masks:block_sparse", 6),
    Part("cpu-windows-float32", "windows", "windows in fp32, forward, beside both", "cpu_masks:windows_float32", 8),
    Part("cpu-windows-bfloat16", "windows", "windows in bf16, forward, beside both", "cpu_masks:windows_bfloat16", 8),
    Part("cpu-backward", "backward", "masks with their gradients beside SDPA", "cpu_masks:backward", 8.5),
    Part("cpu-weights", "backward", "scores, keys and branches of their own beside torch", "weights:rows", 5),
    Part("cpu-decode", "decode", "a token against a cache beside SDPA", "decode:rows", 3),
    Part("cpu-recurrence", "recurrence", "beside a loop over tokens and fla's chunks in torch", "recurrence:rows", 8),
    Part("cpu-routing", "routing", "keys chosen by scores beside dense causal attention", "routing:rows", 5),
    Part("cpu-plan", "plan", "time and memory of plans of a million tokens", "plan:rows", 2),
    Part("cpu-block_masks", "plan", "BlockMask beside create_block_mask", "block_masks:rows", 5),
    Part("cpu-compile", "compile", "imports, checks, first calls, new lengths", "compiling:rows", 5),
    Part("cpu-simulator", "simulator", "predicted and measured times", "simulator:rows", 8),
)

PARTS: Mapping[str, tuple[Part, ...]] = {"cpu": CPU, "gpu": gpu_suites.PARTS}
"""By place, in order of value."""


def find(name: str) -> tuple[str, Part]:
    """The place and the part of a name. Raises KeyError where there is none."""
    for where, parts in PARTS.items():
        for part in parts:
            if part.name == name:
                return where, part
    raise KeyError(f"there is no part {name}; the names: run.py --list")


def chosen(where: str, suite: str) -> tuple[Part, ...]:
    """The parts of a suite, or of all."""
    return tuple(part for part in PARTS[where] if suite in ("all", part.suite))
