"""The gather kernels of a problem, and their tiles, which were chosen by reading machine code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.delta import emit_delta
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.kernel_source import TileShape as T
from attnc.compiler.kernels.selected.gather_frame import GatherFrame
from attnc.compiler.kernels.selected.gather_key_gradients import GatherKeyGradients
from attnc.compiler.kernels.selected.gather_queries import GatherForward, GatherQueryGradient
from attnc.compiler.kernels.selected.merge_partials import MergeForward, MergeQueryGradient
from attnc.compiler.kernels.selected.selected_problem import WIDEST, SelectedProblem
from attnc.compiler.kernels.walks import ListedWalk

ChosenStage = Literal["forward", "merge", "dq", "sum", "dkdv"]
STAGES: tuple[ChosenStage, ...] = ("forward", "merge", "dq", "sum", "dkdv")
_Shapes = Mapping[ChosenStage, tuple[tuple[int, T], ...]]
_WRITERS: dict[ChosenStage, type[GatherFrame]] = {
    "forward": GatherForward,
    "merge": MergeForward,
    "dq": GatherQueryGradient,
    "sum": MergeQueryGradient,
    "dkdv": GatherKeyGradients,
}


@lru_cache(maxsize=256)
def emit_chosen(problem: SelectedProblem, stage: ChosenStage) -> KernelSource:
    """Return the kernel of a stage."""
    return _WRITERS[stage](problem, tiles_of(problem, stage)).source()


@lru_cache(maxsize=64)
def emit_delta_of(problem: SelectedProblem, lse_gradient: bool) -> KernelSource:
    """Return the kernel that prepares the backward (`emit_delta`)."""
    header = ("Attention to chosen places: made by attnc.",)
    registers = problem.target.registers
    walk = ListedWalk(runs=False)
    plain = AttentionProblem("chosen", header, walk, walk, problem.dk, problem.dv, problem.dtype, registers=registers)
    return emit_delta(plain, lse_gradient)


def tiles_of(problem: SelectedProblem, stage: ChosenStage) -> T:
    """Return the tile shape of a stage: gathered queries, and keys."""
    if stage in ("merge", "sum"):
        return _MERGE_TILES
    table = _IN_FP32 if problem.dtype == "float32" else _TILES[problem.target.name]
    tiles = next(shape for width, shape in table[stage] if max(problem.dk, problem.dv) <= width)
    if problem.dtype == "float32" and problem.target.maker == "amd":  # AMD's warps are twice as wide
        tiles = replace(tiles, warps=4, stages=1)
    if tiles.k_tile <= problem.columns:
        return tiles
    warps = 4 if stage == "dkdv" else tiles.warps
    return replace(tiles, k_tile=problem.columns, warps=warps)


_MERGE_TILES = T(16, 16, 4, 1)

_TILES: dict[str, _Shapes] = {
    "sm_80": {
        "forward": ((64, T(128, 64, 8, 3)), (128, T(128, 64, 8, 3)), (WIDEST, T(64, 32, 8, 2))),
        "dq": ((64, T(128, 64, 8, 2)), (128, T(128, 32, 8, 2)), (WIDEST, T(64, 32, 8, 2))),
        "dkdv": ((96, T(32, 64, 4, 2)), (128, T(64, 64, 8, 2)), (WIDEST, T(32, 32, 8, 2))),
    },
    "sm_90": {
        "forward": ((64, T(128, 64, 8, 3)), (128, T(128, 64, 8, 2)), (WIDEST, T(64, 32, 8, 2))),
        "dq": ((128, T(128, 64, 8, 2)), (WIDEST, T(64, 32, 8, 2))),
        "dkdv": ((64, T(64, 64, 4, 2)), (128, T(64, 64, 8, 2)), (WIDEST, T(16, 64, 8, 2))),
    },
    "sm_100": {
        "forward": ((64, T(128, 64, 4, 3)), (128, T(128, 64, 8, 2)), (WIDEST, T(64, 32, 4, 2))),
        "dq": ((128, T(128, 64, 8, 2)), (WIDEST, T(64, 32, 8, 2))),
        "dkdv": ((64, T(64, 64, 4, 2)), (128, T(64, 64, 8, 2)), (WIDEST, T(32, 64, 8, 2))),
    },
    "gfx942": {
        "forward": ((64, T(128, 64, 4, 1)), (128, T(64, 64, 4, 1)), (WIDEST, T(64, 32, 4, 1))),
        "dq": ((64, T(64, 64, 4, 1)), (128, T(64, 32, 4, 1)), (WIDEST, T(32, 32, 4, 1))),
        "dkdv": ((64, T(64, 64, 4, 1)), (128, T(32, 64, 4, 1)), (WIDEST, T(32, 32, 4, 1))),
    },
}
"""Tile shapes of a target and a stage, for heads up to each width."""

_IN_FP32: _Shapes = {
    "forward": ((64, T(64, 32, 8, 2)), (WIDEST, T(32, 16, 8, 2))),
    "dq": ((64, T(64, 32, 8, 2)), (WIDEST, T(32, 16, 8, 2))),
    "dkdv": ((64, T(32, 32, 8, 2)), (WIDEST, T(32, 16, 8, 2))),
}
