"""The simulator against attnc's kernels: predicted and measured times of patterns that its figures were not fitted to.

`over_ideal` is the speed over dense attention at the best rate of the calibration: no bound may be below it.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import gpu_calibrate
import gpu_masks
import masks
import torch
from baselines import published
from benchmark_part import Row, Setting
from gpu_parts import fits, gap, median, operands, rows, timed, word
from torch import Tensor

from attnc import Attention, compile_attention

LENGTHS, WIDTHS, HEADS, DRAWN = (4096, 8192, 16384), (64, 128), 16, 10


@dataclass(frozen=True)
class GpuPrediction:
    """A pattern and its parameters at a length; `documents`: whether it has documents."""

    name: str
    pattern: str
    params: Callable[[int], Mapping[str, Any]]
    documents: bool = False


def _fixed(**params: Any) -> Callable[[int], Mapping[str, Any]]:
    return lambda n: params


def _grid(window: int) -> Callable[[int], Mapping[str, Any]]:
    return lambda n: {"height": n // 64, "width": 64, "window": window}


def _drawn(number: int) -> GpuPrediction:
    """Draw a window with sinks of random sizes, which nothing here was tuned for."""
    draw = random.Random(number)
    window, sinks = draw.randint(100, 3000), draw.randint(0, 200)
    name = f"drawn {number}: {window} + {sinks} sinks"
    return GpuPrediction(name, "sliding_window", _fixed(window=window, sinks=sinks))


POINTS = (
    GpuPrediction("causal", "causal", _fixed()),
    GpuPrediction("window 512", "sliding_window", _fixed(window=512)),
    GpuPrediction("window 2048 + 5 sinks", "sliding_window", _fixed(window=2048, sinks=5)),
    GpuPrediction("strided 128", "strided", _fixed(stride=128, local=128)),
    GpuPrediction("power 256, 5", "power", _fixed(block=256, window=5)),
    GpuPrediction("blocked 512", "blocked", _fixed(block=512)),
    GpuPrediction("neighborhood_1d 1025", "neighborhood_1d", _fixed(window=1025)),
    GpuPrediction("neighborhood 13 × 13", "neighborhood_2d", _grid(13)),
    GpuPrediction("S2", "s2_attention", _fixed(block=64, local_blocks=8, vertical_stride=16)),
    GpuPrediction("document", "document", _fixed(), documents=True),
    *(_drawn(number) for number in range(DRAWN)),
)
TOY = (
    GpuPrediction("window 20", "sliding_window", _fixed(window=20)),
    GpuPrediction("document", "document", _fixed(), documents=True),
)


def forward(setting: Setting) -> Iterator[Row]:
    """Yield forward rows, after the figures are measured."""
    return _made(setting, "forward")


def backward(setting: Setting) -> Iterator[Row]:
    """Yield rows of gradients."""
    return _made(setting, "backward")


def _made(setting: Setting, stage: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        measured = gpu_calibrate.measure(setting)
        device = gpu_calibrate.fitted(setting, measured, Path(folder))
        points, lengths, widths = (TOY, (64,), (16,)) if setting.toy else (POINTS, LENGTHS, WIDTHS)
        todo: dict[str, Callable[[], Row]] = {f"figures {stage}": partial(_figures, measured, device)}
        for point, d, n in product(points, widths, lengths):
            todo[f"{point.name} n={n} d={d} {stage}"] = partial(_row, setting, point, n, d, stage, device, measured)
        yield from rows(setting, todo.items())


def _figures(measured: gpu_calibrate.Measured, device: str) -> Row:
    figures = json.loads(Path(device).read_text(encoding="utf-8"))["figures"]
    kept = {name: figures[name]["value"] for name in ("hbm_share", "launch_us", "prologue_clocks")}
    shares = {width: share["value"] for width, share in figures["kernel_share"].items()}
    return {
        "case": "figures",
        "microbenchmarks": measured.count,
        **kept,
        "kernel_share": shares,
        "ok": measured.count <= 10,
    }


def _row(
    setting: Setting, point: GpuPrediction, n: int, d: int, stage: str, device: str, measured: gpu_calibrate.Measured
) -> Row:
    torch.manual_seed(0)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    heads = (1, 1) if setting.toy else (HEADS, HEADS)
    attention = compile_attention(point.pattern, backend="triton", **point.params(n))
    inputs = {"doc": masks.document_ids(n).to(setting.device)} if point.documents else {}
    leaves = operands(setting, n, dtype, heads=heads, d=d)
    row: Row = {"case": point.name, "n": n, "d": d, "heads": heads[0], "dtype": word(dtype), "direction": stage}
    errors = _errors(attention, leaves, inputs)
    row |= {"errors": errors, "ok": fits(errors, dtype)}
    if not row["ok"]:
        return row
    call: dict[str, Any] = {"heads": heads[0], "head_dim": d, "dtype": dtype, "stage": stage, "device": device}
    call |= {name: x.cpu() for name, x in inputs.items()}
    simulated = attention.simulate(n, **call)
    run = partial(gpu_masks.called, attention, inputs)
    step = partial(gpu_masks.alone, run, leaves) if stage == "forward" else gpu_masks.gradient(run, leaves)
    row |= timed(setting, {"attnc": step}, graphs=stage == "forward")
    row |= {"predicted": {"attnc": simulated.predicted_ms}, "bound": simulated.rung("tile").speedup}
    row |= {"density": simulated.density}
    if stage == "forward":
        row["over_ideal"] = heads[0] * n * n * measured.best(d) / 1e6 / median(row)
    return row


ROWS = 32


def _errors(attention: Attention, leaves: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the errors of some rows of the last head against fp64, by attnc's own mask_mod (tested against papers)."""
    q, k, v = (x.detach() for x in leaves)
    n, head = q.shape[2], q.shape[1] - 1
    call: dict[str, Any] = {"heads": q.shape[1], "device": q.device, **inputs}
    mod = attention.mask_mod(n, **call)
    draw = torch.randperm(n, device=q.device)[:ROWS]
    entry, place = torch.tensor(0, device=q.device), torch.tensor(head, device=q.device)
    seen = mod(entry, place, draw[:, None], torch.arange(n, device=q.device)[None])
    scores = q[0, head, draw].double() @ k[0, head].double().T * q.shape[-1] ** -0.5
    true = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, head].double()
    out = gpu_masks.called(attention, inputs, q, k, v)
    return {"out": gap(out[0, head, draw], true)}


# --- NATTEN's figures ------------------------------------------------------------------------------------------------

COSMOS = {"frames": 16, "height": 44, "width": 80, "window": [16, 32, 48]}
HUNYUAN = {"frames": 30, "height": 48, "width": 80, "window": [18, 24, 24]}
FLUX = {"height": 256, "width": 256, "window": 80}
NATTEN: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "Hunyuan 18×24×24": ("neighborhood_3d", HUNYUAN, 115_200),
    "Hunyuan 18×24×24 stride 16×8×8": ("neighborhood_3d", {**HUNYUAN, "stride": [16, 8, 8]}, 115_200),
    "Cosmos 16×32×48": ("neighborhood_3d", COSMOS, 56_320),
    "Cosmos 16×32×48 stride 1×8×16": ("neighborhood_3d", {**COSMOS, "stride": [1, 8, 16]}, 56_320),
    "FLUX 80×80": ("neighborhood_2d", FLUX, 65_536),
    "FLUX 80×80 stride 16": ("neighborhood_2d", {**FLUX, "stride": 16}, 65_536),
}


def natten(setting: Setting) -> Iterator[Row]:
    """Compare predictions for NATTEN's six cases on an H100 with the published speedups."""
    names = list(NATTEN)[-1:] if setting.toy else list(NATTEN)
    return rows(setting, [(f"NATTEN's {name}", partial(_natten, name)) for name in names])


def _natten(name: str) -> Row:
    pattern, params, n = NATTEN[name]
    attention = compile_attention(pattern, **params)
    simulation = attention.simulate(n, heads=24, head_dim=128, dtype=torch.bfloat16, device="h100")
    prediction = {"predicted_speedup": simulation.speedup, "bound": simulation.rung("tile").speedup}
    return {"case": name, "n": n, "direction": "forward", **prediction, "published_speedup": published.SPEEDUPS[name]}
