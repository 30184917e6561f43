"""Interleaved timing: every contender in turn, round after round, with medians and spread; and result files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from provenance import refuse_uncommitted

from attnc.runtime.tuning.timer import Clock, Timing, turned

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time each contender once a round, in turn, so that a drift of the machine's speed affects all of them."""
    for _ in range(warm_up):
        for run in contenders.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in turned(names, i):
            run = contenders[name]
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing.of(s) for name, s in samples.items()}


def interleaved_on_gpu(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, l2_bytes: int
) -> dict[str, Timing]:
    """Time runs in turn by CUDA events, each with an L2 cache of at most this many bytes that lacks the run's data."""
    clock = Clock(torch.device("cuda"), l2_bytes)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(warm_up + rounds):
        for name in turned(names, i):
            took = clock.milliseconds(contenders[name])
            if i >= warm_up:
                samples[name].append(took)
    return {name: Timing.of(s) for name, s in samples.items()}


def once(run: Callable[[], object]) -> float:
    """Return the milliseconds of one call, the first one."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def save(name: str, rows: list[dict[str, object]], facts: dict[str, object]) -> Path:
    """Write `results/<name>.json`. Raise UncommittedError if sources have changes."""
    refuse_uncommitted()
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path


def as_json(timing: Timing) -> dict[str, float]:
    """Return a timing with its numbers rounded for a file."""
    return {key: round(value, 4) for key, value in asdict(timing).items()}
