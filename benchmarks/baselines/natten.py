"""NATTEN: neighbourhoods on sequences, images and videos, by its fused kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from baselines.rival import Absent, Attend, Mask, imported, version

NAME = "NATTEN"
FUNCTIONS = {1: "na1d", 2: "na2d", 3: "na3d"}


def available() -> str | None:
    """Return the version."""
    return version("natten", "natten", "NATTEN")


def attend(mask: Mask, device: str) -> Attend | Absent:
    """Return a neighbourhood's attention on a GPU; tokens are in row order of the grid."""
    module: Any = imported("natten")
    if module is None:
        return Absent("NATTEN is not installed")
    if device != "cuda":
        return Absent("NATTEN has no fused kernel on a CPU")
    if mask.neighborhood is None:
        return Absent("NATTEN cannot express the mask")
    near = mask.neighborhood
    function = getattr(module, FUNCTIONS[len(near.grid)])
    words = {
        "kernel_size": near.window,
        "stride": near.stride,
        "dilation": near.dilation,
        "is_causal": near.causal,
    }

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).reshape(x.shape[0], *near.grid, *x.shape[1::2]) for x in (q, k, v))
        out: Tensor = function(q, k, v, **words)
        return out.flatten(1, len(near.grid)).transpose(1, 2)

    return run
