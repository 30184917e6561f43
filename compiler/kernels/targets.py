"""What kernels are compiled for, and the tiles that they have there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler.kernels.source import Stage
from attnc.compiler.simulation.gpu_clocks import TileShape

Maker = Literal["nvidia", "amd"]


@dataclass(frozen=True, slots=True)
class Target:
    """A family of GPUs. `shared_kib`: shared memory of a program at most. `boxes`: the hardware copies tiles (TMA).

    `delayed`: products with values overlap the next tile's softmax if they come one tile late.
    """

    name: str
    maker: Maker
    shared_kib: int
    warp: int = 32
    boxes: bool = False
    delayed: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "nvidia", 163),
        Target("sm_90", "nvidia", 227, boxes=True, delayed=True),
        Target("sm_100", "nvidia", 227, boxes=True),
        Target("gfx942", "amd", 64, warp=64),
    )
}

_Shapes = dict[Stage, tuple[tuple[int, TileShape], ...]]
"""For heads up to each width, the tile that is taken."""

_PAIRS = ((128, TileShape(64, 64, 8, 1)), (256, TileShape(32, 32, 4, 1)))
"""Of gradients pair by pair, whose tiles are square."""

_WITH_BOXES: _Shapes = {
    "forward": ((64, TileShape(128, 64, 4, 3)), (128, TileShape(128, 128, 8, 2)), (256, TileShape(128, 64, 8, 2))),
    "dq": ((64, TileShape(128, 64, 8, 2)), (128, TileShape(64, 64, 4, 2)), (256, TileShape(64, 32, 4, 2))),
    "dkdv": ((64, TileShape(64, 64, 4, 2)), (128, TileShape(32, 64, 8, 2)), (256, TileShape(32, 64, 8, 2))),
    "pairs": _PAIRS,
}
_WITH_POINTERS: _Shapes = {
    "forward": ((64, TileShape(128, 64, 8, 3)), (128, TileShape(128, 32, 8, 3)), (256, TileShape(64, 32, 8, 2))),
    "dq": ((64, TileShape(128, 64, 8, 2)), (128, TileShape(64, 64, 4, 2)), (256, TileShape(64, 32, 8, 2))),
    "dkdv": ((64, TileShape(16, 128, 8, 2)), (128, TileShape(16, 64, 8, 2)), (256, TileShape(32, 64, 8, 1))),
    "pairs": _PAIRS,
}
_SCORED_WITH_BOXES: _Shapes = _WITH_BOXES | {
    "forward": ((64, TileShape(128, 64, 8, 3)), (256, TileShape(128, 64, 8, 2))),
    "dkdv": ((64, TileShape(32, 64, 4, 2)), (256, TileShape(32, 64, 8, 2))),
}
"""Scores of their own need registers."""
_SCORED_WITH_POINTERS: _Shapes = _WITH_POINTERS | {
    "dq": ((64, TileShape(128, 64, 8, 2)), (128, TileShape(64, 32, 4, 2)), (256, TileShape(64, 32, 8, 2))),
}
_ON_AMD: _Shapes = {
    "forward": ((64, TileShape(128, 64, 4, 1)), (128, TileShape(64, 64, 4, 1)), (256, TileShape(64, 32, 4, 1))),
    "dq": ((64, TileShape(64, 64, 4, 1)), (128, TileShape(64, 32, 4, 1)), (256, TileShape(32, 32, 4, 1))),
    "dkdv": ((64, TileShape(64, 64, 4, 1)), (128, TileShape(32, 64, 4, 1)), (256, TileShape(32, 32, 4, 1))),
    "pairs": _PAIRS,
}
_IN_FP32: _Shapes = {
    "forward": ((64, TileShape(64, 32, 4, 2)), (128, TileShape(64, 32, 8, 2)), (256, TileShape(64, 16, 8, 2))),
    "dq": ((64, TileShape(32, 32, 4, 2)), (128, TileShape(64, 32, 8, 2)), (256, TileShape(64, 16, 8, 2))),
    "dkdv": ((64, TileShape(32, 32, 4, 2)), (128, TileShape(32, 64, 8, 2)), (256, TileShape(16, 64, 8, 2))),
    "pairs": _PAIRS,
}
_WIDEST: dict[Stage, TileShape] = {
    "forward": TileShape(64, 32, 8, 2),
    "dq": TileShape(64, 16, 8, 2),
    "dkdv": TileShape(16, 64, 8, 2),
    "pairs": TileShape(32, 32, 4, 1),
}
"""Of heads past all of these."""


def tile_shape(target: Target, stage: Stage, dk: int, dv: int, dtype: str, scored: bool = False) -> TileShape:
    """The tiles and warps of a kernel: those that the machine code of its loops was read for (`attnc doctor`).

    `scored`: its score is one of its own.
    """
    table = _SCORED_WITH_POINTERS if scored else _WITH_POINTERS
    if dtype == "float32":
        table = _IN_FP32
    elif target.maker == "amd":
        table = _ON_AMD
    elif target.boxes:
        table = _SCORED_WITH_BOXES if scored else _WITH_BOXES
    return next((shape for most, shape in table[stage] if max(dk, dv) <= most), _WIDEST[stage])
