"""Measure a GPU's figures for the simulator with nine dense microbenchmarks; none of them is a sparse pattern.

Full attention by attnc's kernel at three widths and two lengths gives `kernel_share`, a long copy `hbm_share`, an
empty kernel in a graph `launch_us`, and calls with one tile of keys and with many `prologue_clocks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_part import Setting
from gpu_parts import L2_BYTES, captured, operands, simulated_device
from torch import Tensor

from attnc import Attention, compile_attention
from attnc.compiler import simulation
from attnc.runtime.tuning.timer import Clock, Run

WIDTHS, LENGTHS, HEADS = (64, 128, 256), (4096, 16384), 16
ROUNDS = 15
SHORT, LAUNCHES = 128, 200
FILES = {"h100": "h100-sxm.json", "h200": "h200.json", "b200": "b200.json", "a100": "a100-80.json"}


@dataclass(frozen=True)
class Measured:
    """Milliseconds of full attention by width and tokens, of a copy by bytes each way, and of short kernels."""

    dense: Mapping[tuple[int, int], float]
    copy_ms: float
    copy_bytes: int
    launch_ms: float
    short_ms: float

    @property
    def count(self) -> int:
        """The number of microbenchmarks."""
        return len(self.dense) + 3

    def best(self, d: int) -> float:
        """Return the least nanoseconds of a query-key pair, at the next width that was measured."""
        width = next((w for w in sorted({w for w, _ in self.dense}) if w >= d), max(w for w, _ in self.dense))
        return min(ms * 1e6 / (HEADS * n * n) for (w, n), ms in self.dense.items() if w == width)


def described(device: str) -> dict[str, Any]:
    """Return a machine of the simulator as its file describes it."""
    text = (Path(simulation.__file__).parent / "machines" / FILES[device]).read_text(encoding="utf-8")
    machine: dict[str, Any] = json.loads(text)
    return machine


def measure(setting: Setting) -> Measured:
    """Run the nine microbenchmarks; toy sizes only exercise the code."""
    full = compile_attention("full", backend="triton")
    widths, lengths = ((16,), (32,)) if setting.toy else (WIDTHS, LENGTHS)
    dense = {(d, n): _least(setting, _call(setting, full, n, d)) for d in widths for n in lengths}
    copied = torch.empty(1 << (12 if setting.toy else 30), dtype=torch.int8, device=setting.device)
    tiny = torch.zeros(1, device=setting.device)
    launches: Run = partial(_many, tiny, 2 if setting.toy else LAUNCHES)
    if setting.cuda:
        launches, _ = captured(launches)
    return Measured(
        dense,
        _least(setting, copied.clone),
        2 * copied.numel(),
        _least(setting, launches) / (2 if setting.toy else LAUNCHES),
        _least(setting, _graphed(setting, _call(setting, full, 32 if setting.toy else SHORT, widths[0]))),
    )


def _many(x: Tensor, count: int) -> None:
    for _ in range(count):
        x.add_(1)


def _graphed(setting: Setting, run: Run) -> Run:
    return captured(run)[0] if setting.cuda else run


def _call(setting: Setting, full: Attention, n: int, d: int) -> Run:
    dtype = torch.float32 if setting.toy else torch.bfloat16
    heads = (1, 1) if setting.toy else (HEADS, HEADS)
    leaves = tuple(x.detach() for x in operands(setting, n, dtype, heads=heads, d=d))
    return lambda: full(*leaves)


def _least(setting: Setting, run: Run) -> float:
    """Return the least milliseconds of some rounds."""
    clock = Clock(torch.device(setting.device), L2_BYTES if setting.cuda else 0)
    return min(clock.milliseconds(run) for _ in range(ROUNDS if setting.cuda else 1))


def fitted(setting: Setting, measured: Measured, folder: Path) -> str:
    """Write a machine file with the measured figures in place of published or guessed ones; return its path."""
    device = simulated_device(setting)
    if device is None:
        raise ValueError(
            f"the simulator has no machine for {torch.cuda.get_device_name()}: it knows {', '.join(FILES)}"
        )
    data = described(device)
    peak = data["figures"]["hbm_tb_per_s"]["value"] * 1e9
    values: dict[str, float] = {
        "hbm_share": min(measured.copy_bytes / measured.copy_ms / peak, 1.0),
        "launch_us": measured.launch_ms * 1e3,
        "prologue_clocks": _prologue(data, measured),
    }
    for name, value in values.items():
        data["figures"][name] = _measured_here(value)
    path = folder / f"{device}-measured.json"
    for width in sorted({d for d, _ in measured.dense}):
        share = data["figures"]["kernel_share"].get(str(width), data["figures"]["kernel_share"]["128"])["value"]
        for _ in range(STEPS):
            data["figures"]["kernel_share"][str(width)] = _measured_here(share)
            path.write_text(json.dumps(data), encoding="utf-8")
            share *= _predicted_over_measured(setting, measured, width, str(path))
            share = min(max(share, LEAST_SHARE), 1.0)
    return str(path)


STEPS, LEAST_SHARE = 4, 1e-3
"""Number of times that the share is fitted, since time is not quite proportional to it; and its minimum."""


def _predicted_over_measured(setting: Setting, measured: Measured, width: int, device: str) -> float:
    """Compare prediction and measurement at the longest length, where the share decides."""
    n = max(n for d, n in measured.dense if d == width)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    heads = 1 if setting.toy else HEADS
    simulated = compile_attention("full").simulate(n, heads=heads, head_dim=width, dtype=dtype, device=device)
    return simulated.predicted_ms / measured.dense[width, n]


def _prologue(data: Mapping[str, Any], measured: Measured) -> float:
    """Return the clocks of a program of one tile: the time of a short call beyond a launch."""
    clocks_a_ms = data["figures"]["clock_ghz"]["value"] * 1e6
    return float(max(measured.short_ms - measured.launch_ms, 0.0) * clocks_a_ms)


def _measured_here(value: float) -> dict[str, Any]:
    return {"value": value, "source": "measured by benchmarks/gpu_calibrate.py: dense attention in bf16, and copies"}
