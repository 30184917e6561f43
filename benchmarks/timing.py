"""Interleaved timing: every contender in turn, round after round, medians and spread; and where and when it ran."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Each contender once a round, in turn, so that a machine whose speed drifts treats them alike.

    Every round begins with another one: what runs before leaves its traces in the caches.
    """
    for _ in range(warm_up):
        for run in contenders.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run = contenders[name]
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing(statistics.median(s), min(s), max(s), len(s)) for name, s in samples.items()}


def interleaved_on_gpu(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, l2_bytes: int
) -> dict[str, Timing]:
    """The same by CUDA events, each run with an L2 of at most so many bytes that holds nothing of it."""
    flush = torch.empty(l2_bytes, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(warm_up + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            contenders[name]()
            end.record()
            torch.cuda.synchronize()
            if i >= warm_up:
                samples[name].append(float(start.elapsed_time(end)))
    return {name: Timing(statistics.median(s), min(s), max(s), len(s)) for name, s in samples.items()}


def once(run: Callable[[], object]) -> float:
    """Milliseconds of one call, the first one."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def header() -> dict[str, object]:
    """Versions, machine, commit, date, command and load: what a figure needs to be believed."""
    return {
        "torch": _version("torch"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "device": f"cpu: {_cpu_name()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "load_before": os.getloadavg()[0],
    }


def save(name: str, rows: list[dict[str, object]], facts: dict[str, object]) -> Path:
    """Write `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path


def as_json(timing: Timing) -> dict[str, float]:
    """A timing with its numbers rounded for a file."""
    return {key: round(value, 4) for key, value in asdict(timing).items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
