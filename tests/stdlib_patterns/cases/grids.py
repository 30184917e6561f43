"""Cases of the library's grid patterns in `grids/`, and the reference masks they are compared with."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch

from cases.masks import Masked, simple
from reference import grids, masks
from reference.masks import Mask

# --- grids ------------------------------------------------------------------------------------------------------------

AXES = ("frames", "height", "width")


def neighborhood(
    extents: tuple[int, ...],
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Masked:
    """Return a case in two or three axes; a number stands for a value on every axis, in the pattern too."""

    def by_axis(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(extents)

    settings = list(zip(extents, *map(by_axis, (window, stride, dilation, causal)), strict=True))
    params = dict(zip(AXES[-len(extents) :], extents, strict=True))
    case_params = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    return Masked(
        f"neighborhood_{len(extents)}d",
        (int(np.prod(extents)),),
        lambda n, b, h: grids.grid(extents, lambda axis, x: grids.neighbours(x, *settings[axis])),
        params | {name: list(value) if isinstance(value, tuple) else value for name, value in case_params.items()},
    )


def line(**params: Any) -> list[Masked]:
    return simple(
        "neighborhood_1d",
        (16, 31, 65),
        lambda n, **s: masks.square(n, lambda q: grids.neighbours(q, n, **s)),
        params,
    )


def sliding_tile(extents: tuple[int, int, int], tile: tuple[int, ...], kernel: tuple[int, ...]) -> Masked:
    def mask(n: int, b: int, h: int) -> Mask:
        def sees(axis: int, x: int) -> list[int]:
            return grids.tile_coordinates(x, extents[axis], tile[axis], kernel[axis])

        return grids.with_text(grids.grid(extents, sees), n - int(np.prod(extents)))

    params = dict(zip(AXES, extents, strict=True)) | {"tile": list(tile), "kernel": list(kernel)}
    return Masked("sliding_tile", tuple(int(np.prod(extents)) + words for words in (0, 1, 9)), mask, params)


def freeswim(extents: tuple[int, int, int], reach: tuple[int, int]) -> Masked:
    def sees(axis: int, x: int) -> range:
        return grids.inward(x, extents[axis], reach[axis - 1]) if axis else range(extents[0])

    params = dict(zip(AXES, extents, strict=True)) | {"reach": list(reach)}
    return Masked("freeswim", (int(np.prod(extents)),), lambda n, b, h: grids.grid(extents, sees), params)


TEMPORAL = [[True, False], [False, True]]


def svg(frames: int, per_frame: int, window: float, block: int, band: int, first_frame: bool = True) -> Masked:
    """Return a case of SVG; `band` is computed by hand."""

    def mask(n: int, b: int, h: int) -> Mask:
        video = grids.svg(frames, per_frame, band, TEMPORAL[b][h], first_frame)
        return grids.with_text(video, n - frames * per_frame)

    params = {"frames": frames, "per_frame": per_frame, "window": window, "block": block, "first_frame": first_frame}
    lengths = tuple(frames * per_frame + words for words in (0, 1, 8))
    return Masked("svg", lengths, mask, params, lambda n: {"temporal": torch.tensor(TEMPORAL)}, heads=2, batch=2)


def radial(frames: int, per_frame: int, decay: str, block: int, sink: bool) -> Masked:
    def mask(n: int, b: int, h: int) -> Mask:
        return grids.radial(frames, per_frame, Fraction(decay), block, sink, n - frames * per_frame)

    params = {"frames": frames, "per_frame": per_frame, "decay": Fraction(decay), "block": block}
    lengths = tuple(frames * per_frame + words for words in (0, 1, 8))
    return Masked("radial", lengths, mask, params | {"first_frame_sink": sink})


MASKED = [
    *line(window=7),
    *line(window=4, stride=3),
    *line(window=5, stride=5),
    *line(window=3, stride=2, dilation=5),
    *line(window=4, stride=3, dilation=3, causal=True),
    *line(window=2, causal=True),
    *line(window=16),
    neighborhood((9, 11), (3, 5)),
    neighborhood((8, 13), 4, 3),
    neighborhood((7, 12), (3, 4), (2, 4), (2, 3), (True, False)),
    neighborhood((11, 5), 2, 2, 2, True),
    neighborhood((7, 7), 7),
    neighborhood((3, 5, 7), (2, 3, 5)),
    neighborhood((4, 6, 5), (4, 3, 2), (1, 2, 2), (1, 2, 1), (False, True, False)),
    neighborhood((6, 4, 6), 2, 1, 2, (True, False, False)),
    sliding_tile((4, 6, 5), (2, 3, 1), (2, 6, 3)),
    sliding_tile((3, 4, 8), (1, 2, 2), (3, 2, 6)),
    sliding_tile((2, 4, 9), (1, 2, 3), (2, 4, 6)),
    freeswim((3, 7, 9), (1, 2)),
    freeswim((1, 5, 8), (2, 0)),
    freeswim((4, 6, 6), (2, 1)),
    svg(5, 12, 1.5, 4, 16),
    svg(3, 20, 0.7, 8, 8, first_frame=False),
    svg(7, 9, 2, 1, 18),
    svg(1, 33, 1, 33, 33),
    radial(3, 192, "0.2", 16, True),
    radial(5, 130, "1/3", 16, False),
    radial(4, 67, "0.95", 10, True),
    radial(18, 8, "1", 4, False),
    radial(2, 33, "0", 33, False),
]


CASES = [case for masked in MASKED for case in masked.cases()]
