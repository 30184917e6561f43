"""The masks that are timed on a GPU: as attnc's pattern, as FlexAttention's mask, and in NATTEN's form.

Shapes are from the systems' own benchmarks (`published.py` has the figures): NATTEN's sequences, FLUX and
HunyuanVideo, STA, DKernel's benchmark of S2, Radial Attention's HunyuanVideo, flex-block-attn's random blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import masks
import torch
from baselines.rival import Mask, MaskMod, Neighborhood, causal, full
from benchmark_part import Setting
from torch import Tensor

from attnc import Attention, compile_attention

Kind = Literal["dense", "block_sparse", "windows"]
Params = Mapping[str, Any]
Inputs = Callable[[Params, int], dict[str, Tensor]]

RANDOM = """pattern random_blocks(block: int = 384)
    input keep: bool[rows, cols]
    visible keep[q // block, k // block]
"""


@dataclass(frozen=True)
class Shape:
    """Parameters of the pattern, tokens, query and kv heads, head dimension, batch."""

    params: Params
    n: int
    heads: tuple[int, int] = (1, 1)
    d: int = 128
    batch: int = 1


Words = Callable[[Shape, dict[str, Tensor]], Mask]


@dataclass(frozen=True)
class GpuCase:
    """A pattern at its size and at a toy size; `words` makes its mask for rivals from its shape and inputs."""

    name: str
    kind: Kind
    pattern: str
    real: Shape
    toy: Shape
    words: Words
    inputs: Inputs = field(default=lambda params, n: {})
    is_causal: bool = False

    def shape(self, setting: Setting) -> Shape:
        """Return the shape at the setting's size."""
        return self.toy if setting.toy else self.real

    def attention(self, setting: Setting, **options: Any) -> Attention:
        """Return the pattern compiled for kernels only."""
        return compile_attention(self.pattern, backend="triton", **options, **self.shape(setting).params)

    def dense(self) -> Attention:
        """Return dense attention to compare with: causal if the pattern is causal, else full."""
        return compile_attention("causal" if self.is_causal else "full", backend="triton")

    def given(self, setting: Setting) -> dict[str, Tensor]:
        """Return the inputs on the device."""
        shape = self.shape(setting)
        return {name: x.to(setting.device) for name, x in self.inputs(shape.params, shape.n).items()}

    def mask(self, setting: Setting, inputs: dict[str, Tensor]) -> Mask:
        """Return the mask for rivals."""
        return self.words(self.shape(setting), inputs)

    def label(self, setting: Setting, dtype: str, direction: str) -> str:
        """Return the key of the case's row."""
        shape = self.shape(setting)
        return f"{self.name} n={shape.n} d={shape.d} {dtype} {direction}"


# --- masks for rivals ------------------------------------------------------------------------------------------------


def shifted(extent: int, window: int, stride: int) -> MaskMod:
    """Return NATTEN's rule on one axis: the window of a stride's leader, moved inward at an edge."""

    def near(q: Tensor, k: Tensor) -> Tensor:
        leader = torch.clamp(q // stride * stride + stride // 2, max=extent - 1)
        first = torch.clamp(leader - window // 2, 0, extent - window)
        return (k >= first) & (k < first + window)

    return near


def neighborhood(grid: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> Mask:
    """Return the mask of a neighbourhood on a sequence, an image or a video, in row order."""
    axes = [shifted(*axis) for axis in zip(grid, window, stride, strict=True)]
    steps = [prod(grid[i + 1 :]) for i in range(len(grid))]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near_pairs = axes[0](q // steps[0], k // steps[0])
        for near, step, extent in zip(axes[1:], steps[1:], grid[1:], strict=True):
            near_pairs = near_pairs & near(q // step % extent, k // step % extent)
        return near_pairs

    return Mask(prod(grid), visible, neighborhood=Neighborhood.of(grid, window, stride))


def _line(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    params, n = shape.params, shape.n
    return neighborhood((n,), (params["window"],), (params.get("stride", 1),))


def _picture(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    params = shape.params
    side, step = params["window"], params.get("stride", 1)
    return neighborhood((params["height"], params["width"]), (side, side), (step, step))


def _video(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    params = shape.params
    grid = params["frames"], params["height"], params["width"]
    return neighborhood(grid, tuple(params["window"]), tuple(params.get("stride", (1, 1, 1))))


def _tiles(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    """Return the mask of sliding tiles: a neighbourhood on the grid of tiles."""
    params, n = shape.params, shape.n
    grid = params["frames"], params["height"], params["width"]
    tile, wide = params["tile"], [a // b for a, b in zip(params["kernel"], params["tile"], strict=True)]
    axes = [shifted(extent // t, w, 1) for extent, t, w in zip(grid, tile, wide, strict=True)]
    height, width = grid[1:]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        time = axes[0](q // (height * width) // tile[0], k // (height * width) // tile[0])
        rows = axes[1](q // width % height // tile[1], k // width % height // tile[1])
        return time & rows & axes[2](q % width // tile[2], k % width // tile[2])

    return Mask(n, visible)


def _columns(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    """Return S2's mask: near blocks, and columns of blocks that differ from head to head."""
    params, n = shape.params, shape.n
    block, near, step = (params[name] for name in ("block", "local_blocks", "vertical_stride"))
    heads = shape.heads[1]
    shift = max(1, step // heads)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        column = (k // block + h * shift) % step == 0
        pairs: Tensor = (k <= q) & ((q // block - k // block < near) | column)
        return pairs

    return Mask(n, visible, heads=heads)


def _random(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    params, n = shape.params, shape.n
    keep, block = inputs["keep"], params["block"]
    return Mask(n, lambda b, h, q, k: keep[q // block, k // block])


def _kept(params: Params, n: int) -> dict[str, Tensor]:
    """Draw six of ten blocks, and every diagonal block, so that no row is empty."""
    blocks = -(-n // params["block"])
    drawn = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.6
    return {"keep": drawn | torch.eye(blocks, dtype=torch.bool)}


def _radial(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    """Return attnc's own mask, which its tests compare with the authors' loop over pairs of frames."""
    params, n = shape.params, shape.n
    attend = compile_attention("radial", **params)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Mask(n, attend.mask_mod(n, device=device, relation_only=True))


def _window(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    params, n = shape.params, shape.n
    width, sinks = params["window"], params.get("sinks", 0)
    return Mask(n, masks.window(width, sinks)(n), window=None if sinks else (width - 1, 0))


def _power(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    params, n = shape.params, shape.n
    return Mask(n, masks.power(params["block"], params["window"])(n))


def _document(shape: Shape, inputs: dict[str, Tensor]) -> Mask:
    doc = inputs["doc"][0]
    return Mask(shape.n, lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k))


def _documents(params: Params, n: int) -> dict[str, Tensor]:
    return {"doc": masks.document_ids(n)}


# --- cases -----------------------------------------------------------------------------------------------------------

FLUX = {"height": 256, "width": 256, "window": 80}
HUNYUAN = {"frames": 30, "height": 48, "width": 80, "window": [18, 24, 24]}
SMALL_PICTURE = {"height": 8, "width": 8, "window": 4}
SMALL_VIDEO = {"frames": 4, "height": 4, "width": 4, "window": [2, 2, 2]}
LINE, PICTURE, VIDEO = 32768, 256 * 256, 30 * 48 * 80
TWENTY_FOUR, SIXTEEN = (24, 24), (16, 16)


def _natten(name: str, kind: Kind, pattern: str, real: Shape, toy: Params, words: Words) -> GpuCase:
    return GpuCase(name, kind, pattern, real, Shape(toy, 64, d=16), words)


BLOCK_SPARSE = (
    _natten(
        "1D window 2048 stride 256",
        "block_sparse",
        "neighborhood_1d",
        Shape({"window": 2048, "stride": 256}, LINE),
        {"window": 16, "stride": 8},
        _line,
    ),
    _natten(
        "1D window 2048 stride 2048",
        "block_sparse",
        "neighborhood_1d",
        Shape({"window": 2048, "stride": 2048}, LINE),
        {"window": 16, "stride": 16},
        _line,
    ),
    _natten(
        "FLUX 80×80 stride 16",
        "block_sparse",
        "neighborhood_2d",
        Shape({**FLUX, "stride": 16}, PICTURE, TWENTY_FOUR),
        {**SMALL_PICTURE, "stride": 2},
        _picture,
    ),
    _natten(
        "Hunyuan 18×24×24 stride 16×8×8",
        "block_sparse",
        "neighborhood_3d",
        Shape({**HUNYUAN, "stride": [16, 8, 8]}, VIDEO, TWENTY_FOUR),
        {**SMALL_VIDEO, "stride": [2, 2, 2]},
        _video,
    ),
    GpuCase(
        "STA 18×24×24",
        "block_sparse",
        "sliding_tile",
        Shape({"frames": 30, "height": 48, "width": 80, "tile": [6, 8, 8], "kernel": [18, 24, 24]}, VIDEO, TWENTY_FOUR),
        Shape({"frames": 6, "height": 4, "width": 4, "tile": [2, 2, 2], "kernel": [2, 2, 4]}, 96, d=16),
        _tiles,
    ),
    GpuCase(
        "S2 stride 16",
        "block_sparse",
        "s2_attention",
        Shape({"block": 64, "local_blocks": 8, "vertical_stride": 16}, LINE, SIXTEEN, batch=4),
        Shape({"block": 8, "local_blocks": 2, "vertical_stride": 4}, 64, (2, 2), d=16),
        _columns,
        is_causal=True,
    ),
    GpuCase(
        "random 384-blocks, 60 %",
        "block_sparse",
        RANDOM,
        Shape({"block": 384}, 46080),
        Shape({"block": 16}, 64, d=16),
        _random,
        _kept,
    ),
    GpuCase(
        "radial Hunyuan",
        "block_sparse",
        "radial",
        Shape({"frames": 30, "per_frame": 3600, "decay": 0.95, "first_frame_sink": False}, 108_000, TWENTY_FOUR),
        Shape({"frames": 4, "per_frame": 16, "block": 16, "first_frame_sink": False}, 64, d=16),
        _radial,
    ),
)
WINDOWS = (
    _natten(
        "1D window 2048",
        "windows",
        "neighborhood_1d",
        Shape({"window": 2048}, LINE),
        {"window": 9},
        _line,
    ),
    _natten("FLUX 80×80", "windows", "neighborhood_2d", Shape(FLUX, PICTURE, TWENTY_FOUR), SMALL_PICTURE, _picture),
    _natten("Hunyuan 18×24×24", "windows", "neighborhood_3d", Shape(HUNYUAN, VIDEO, TWENTY_FOUR), SMALL_VIDEO, _video),
    GpuCase(
        "window 4096 + 4 sinks",
        "windows",
        "sliding_window",
        Shape({"window": 4096, "sinks": 4}, 16384, SIXTEEN),
        Shape({"window": 20, "sinks": 4}, 64, d=16),
        _window,
        is_causal=True,
    ),
    GpuCase(
        "window 512",
        "windows",
        "sliding_window",
        Shape({"window": 512}, 16384, SIXTEEN),
        Shape({"window": 20}, 64, d=16),
        _window,
        is_causal=True,
    ),
    GpuCase(
        "power 256, 5",
        "windows",
        "power",
        Shape({"block": 256, "window": 5}, 32768, SIXTEEN),
        Shape({"block": 8, "window": 2}, 64, d=16),
        _power,
        is_causal=True,
    ),
    GpuCase(
        "document",
        "windows",
        "document",
        Shape({}, 32768, SIXTEEN),
        Shape({}, 64, d=16),
        _document,
        _documents,
        is_causal=True,
    ),
    GpuCase(
        "window 512, width 64",
        "windows",
        "sliding_window",
        Shape({"window": 512}, 16384, SIXTEEN, d=64),
        Shape({"window": 20}, 64, (2, 1), d=16),
        _window,
        is_causal=True,
    ),
)


def dense_cases(d: int, lengths: tuple[int, ...]) -> tuple[GpuCase, ...]:
    """Return full and causal attention of 4 × 48 heads, by length."""
    words: dict[str, Words] = {
        "full": lambda shape, inputs: full(shape.n),
        "causal": lambda shape, inputs: causal(shape.n),
    }
    return tuple(
        GpuCase(
            name,
            "dense",
            name,
            Shape({}, n, (48, 48), d, 4),
            Shape({}, 24 + n // 128, (2, 1), 16),
            words[name],
            is_causal=name == "causal",
        )
        for n in lengths
        for name in words
    )
