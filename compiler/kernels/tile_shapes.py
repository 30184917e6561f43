"""The tiles and warps of kernels, which were chosen by reading machine code (`attnc doctor --targets`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attnc.compiler.kernels.kernel_source import Stage
from attnc.compiler.kernels.kernel_source import TileShape as T
from attnc.compiler.kernels.targets import Target

Load = Literal["plain", "terms", "pairs"]
"""The numbers that a score loads: none, numbers of queries and keys, or also numbers of pairs."""

_Shapes = dict[Stage, tuple[tuple[int, T], ...]]
"""The tile shape for heads up to each width: queries, keys, warps, stages."""

_SQUARES: _Shapes = {"pairs": ((128, T(64, 64, 8, 1)), (256, T(32, 32, 4, 1)))}
"""Tile shapes of gradients that are summed pair by pair; these tiles are square."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tile shapes of a target; `plain` are the shapes for plain scores, which the others replace.

    `terms`, `pairs`: the score loads numbers of queries and keys, or also of pairs. `nested`: tiles are walked head by
    head. `inner`: loops over tiles are nested in others (bricks, several ranges). `content`: a plain kernel reads
    content masks; `gathered`: at a separate address for each pair.
    """

    plain: _Shapes
    terms: _Shapes = field(default_factory=dict)
    pairs: _Shapes = field(default_factory=dict)
    nested: _Shapes = field(default_factory=dict)
    inner: _Shapes = field(default_factory=dict)
    content: _Shapes = field(default_factory=dict)
    gathered: _Shapes = field(default_factory=dict)


_TILES = {
    "sm_80": _Tiles(
        plain={
            "forward": ((64, T(128, 64, 8, 3)), (128, T(128, 32, 8, 3)), (256, T(64, 32, 8, 2))),
            "dq": ((64, T(128, 64, 8, 2)), (96, T(64, 32, 4, 2)), (128, T(64, 64, 4, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((64, T(32, 128, 8, 2)), (96, T(32, 64, 8, 2)), (128, T(64, 64, 8, 2)), (256, T(32, 64, 8, 1))),
        },
        terms={
            "dq": ((64, T(128, 64, 8, 2)), (128, T(64, 32, 4, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((64, T(32, 128, 8, 2)), (96, T(32, 64, 8, 2)), (128, T(64, 64, 8, 2)), (256, T(32, 64, 8, 1))),
        },
        pairs={
            "dq": ((64, T(128, 32, 8, 2)), (128, T(64, 32, 4, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((64, T(16, 128, 8, 2)), (128, T(16, 64, 8, 2)), (256, T(32, 64, 8, 1))),
            "pairs": ((64, T(64, 64, 8, 1)), (256, T(32, 32, 4, 1))),
        },
        nested={"dkdv": ((64, T(16, 64, 8, 2)), (128, T(16, 32, 8, 2)), (256, T(32, 64, 8, 1)))},
        inner={
            "dq": ((64, T(128, 64, 8, 2)), (96, T(64, 32, 4, 2)), (128, T(64, 64, 8, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((64, T(32, 128, 8, 2)), (128, T(32, 64, 8, 2)), (256, T(32, 64, 8, 1))),
        },
        content={"dq": ((64, T(128, 64, 8, 2)), (96, T(64, 32, 4, 2)), (128, T(64, 64, 8, 2)), (256, T(64, 32, 8, 2)))},
        gathered={
            "forward": ((64, T(128, 32, 8, 2)), (256, T(64, 32, 8, 2))),
            "dq": ((64, T(128, 32, 8, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 1))),
        },
    ),
    "sm_90": _Tiles(
        plain={
            "forward": ((64, T(128, 64, 4, 3)), (128, T(128, 128, 8, 2)), (256, T(128, 64, 8, 2))),
            "dq": ((64, T(128, 64, 8, 2)), (128, T(64, 64, 4, 2)), (256, T(64, 32, 4, 2))),
            "dkdv": ((64, T(64, 64, 4, 2)), (128, T(64, 64, 8, 2)), (256, T(16, 64, 8, 2))),
        },
        terms={
            "forward": ((64, T(128, 64, 8, 3)), (256, T(128, 64, 8, 2))),
            "dq": ((64, T(128, 64, 8, 2)), (128, T(64, 64, 4, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((64, T(64, 128, 8, 2)), (128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 2))),
        },
        pairs={"forward": ((64, T(128, 64, 8, 3)), (128, T(128, 64, 8, 2)), (256, T(128, 32, 8, 2)))},
        nested={"dkdv": ((128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 2)))},
        inner={
            "forward": ((64, T(128, 64, 8, 3)), (256, T(128, 64, 8, 2))),
            "dkdv": ((64, T(64, 64, 8, 2)), (128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 2))),
        },
        content={"forward": ((256, T(128, 64, 8, 2)),)},
        gathered={
            "forward": ((128, T(128, 32, 8, 2)), (256, T(64, 32, 8, 2))),
            "dq": ((128, T(128, 32, 8, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 2))),
        },
    ),
    "sm_100": _Tiles(
        plain={
            "forward": ((64, T(128, 64, 4, 3)), (128, T(128, 128, 8, 2)), (256, T(128, 64, 8, 2))),
            "dq": ((64, T(128, 64, 8, 2)), (128, T(64, 64, 4, 2)), (256, T(64, 32, 4, 2))),
            "dkdv": ((64, T(64, 128, 8, 2)), (128, T(64, 64, 8, 2)), (256, T(32, 64, 8, 2))),
        },
        terms={
            "forward": ((64, T(128, 64, 4, 3)), (256, T(128, 64, 8, 2))),
            "dq": ((128, T(128, 64, 8, 2)), (256, T(64, 32, 4, 2))),
            "dkdv": ((64, T(64, 64, 4, 2)), (128, T(32, 64, 4, 2)), (256, T(32, 64, 8, 2))),
        },
        pairs={
            "forward": ((64, T(128, 64, 8, 3)), (256, T(128, 64, 8, 2))),
            "dkdv": ((64, T(64, 64, 4, 2)), (128, T(64, 64, 8, 2)), (256, T(32, 64, 8, 2))),
        },
        nested={"dkdv": ((128, T(16, 64, 8, 2)), (256, T(32, 64, 8, 2)))},
        inner={"forward": ((64, T(128, 64, 4, 3)), (128, T(128, 32, 4, 2)), (256, T(128, 64, 8, 2)))},
        content={"forward": ((64, T(128, 64, 8, 2)), (128, T(128, 32, 8, 2)), (256, T(128, 64, 8, 2)))},
        gathered={
            "forward": ((128, T(128, 32, 8, 2)), (256, T(64, 32, 8, 2))),
            "dq": ((128, T(128, 32, 8, 2)), (256, T(64, 32, 8, 2))),
            "dkdv": ((128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 2))),
        },
    ),
    "gfx942": _Tiles(
        plain={
            "forward": ((64, T(128, 64, 4, 1)), (128, T(64, 64, 4, 1)), (256, T(64, 32, 4, 1))),
            "dq": ((64, T(64, 64, 4, 1)), (128, T(64, 32, 4, 1)), (256, T(32, 32, 4, 1))),
            "dkdv": ((64, T(64, 64, 4, 1)), (128, T(32, 64, 4, 1)), (256, T(32, 32, 4, 1))),
        },
        terms={"forward": ((64, T(128, 64, 4, 1)), (256, T(64, 32, 4, 1)))},
        inner={"dkdv": ((64, T(64, 64, 4, 1)), (256, T(32, 32, 4, 1)))},
        gathered={
            "forward": ((64, T(128, 32, 4, 1)), (256, T(64, 32, 4, 1))),
            "dq": ((128, T(64, 32, 4, 1)), (256, T(32, 32, 4, 1))),
            "dkdv": ((64, T(32, 64, 4, 1)), (256, T(32, 32, 4, 1))),
        },
    ),
}
_IN_FP32 = _Tiles(
    plain={
        "forward": ((64, T(64, 32, 4, 2)), (128, T(64, 32, 8, 2)), (256, T(64, 16, 8, 2))),
        "dq": ((64, T(32, 32, 4, 2)), (128, T(64, 32, 8, 2)), (256, T(64, 16, 8, 2))),
        "dkdv": ((64, T(32, 32, 4, 2)), (128, T(32, 64, 8, 2)), (256, T(16, 64, 8, 2))),
    },
)
_WIDEST: dict[Stage, T] = {
    "forward": T(64, 32, 8, 2),
    "dq": T(64, 16, 8, 2),
    "dkdv": T(16, 64, 8, 2),
    "pairs": T(32, 32, 4, 1),
}
"""Tile shapes of heads that are wider than all widths of the tables."""


def tile_shape(
    target: Target,
    stage: Stage,
    dk: int,
    dv: int,
    dtype: str,
    load: Load = "plain",
    *,
    nested: bool = False,
    inner: bool = False,
    content: bool = False,
    gathered: bool = False,
) -> T:
    """Return the tiles and warps of a kernel.

    `load`: the numbers that its score loads. `nested`: tiles are walked head by head. `inner`: the loop over tiles is
    nested in others. `content`: the masks of tiles are computed from content masks; `gathered`: these are read at a
    separate address for each pair.
    """
    tiles = _IN_FP32 if dtype == "float32" else _TILES[target.name]
    table = _SQUARES | tiles.plain
    if load != "plain":
        table = table | tiles.terms
    if load == "pairs":
        table = table | tiles.pairs
    if inner:
        table = table | tiles.inner
    if content and load == "plain":
        table = table | tiles.content | (tiles.gathered if gathered else {})
    if nested:
        table = table | tiles.nested
    return next((shape for width, shape in table[stage] if max(dk, dv) <= width), _WIDEST[stage])
