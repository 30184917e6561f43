"""Checks of the runtime that need a GPU: whether tuning pays off, and whether calls take the planned memory.

Toy sizes do not measure memory, and their rows say so.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
from benchmark_part import Row, Setting
from gpu_check import CHECKED, Checked
from gpu_parts import fits, gap, operands, rows, word

from attnc import compile_attention
from attnc.runtime.choices.records import MODEL, Record

TUNED = {False: ("causal", "sliding_window", "document", "power", "neighborhood_2d"), True: ("causal",)}
SECONDS = {False: 45.0, True: 8.0}
"""Seconds for each tuned case at real and at toy sizes, including compilation."""

T = TypeVar("T")


def tune(setting: Setting) -> Iterator[Row]:
    """Yield tile choices of every kernel, predicted and measured; then tune again, which must measure nothing."""
    chosen = [case for case in CHECKED if case.name in TUNED[setting.toy]]
    return rows(setting, [(case.name, partial(_alone, setting, case)) for case in chosen])


def _alone(setting: Setting, case: Checked) -> Row:
    """Return a row that starts with an empty cache."""
    before = os.environ.get("ATTNC_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATTNC_CACHE_DIR"] = folder
        try:
            return _tuned(setting, case)
        finally:
            del os.environ["ATTNC_CACHE_DIR"]
            if before is not None:
                os.environ["ATTNC_CACHE_DIR"] = before


def _tuned(setting: Setting, case: Checked) -> Row:
    n, d, dtype = (48, 16, torch.float32) if setting.toy else (16384, 128, torch.bfloat16)
    params = dict(case.toy if setting.toy else case.params)
    if case.name == "neighborhood_2d" and not setting.toy:
        params, n = {"height": 128, "width": 128, "window": 13}, 128 * 128
    attention = compile_attention(case.name, backend="triton", tune=SECONDS[setting.toy], **params)
    q, k, v = operands(setting, n, dtype, heads=(1, 1) if setting.toy else (16, 16), d=d)
    inputs: dict[str, Any] = {name: x.to(setting.device) for name, x in case.inputs(1, 1, n).items()}
    begun = time.perf_counter()
    record = attention.tune(q, k, v, **inputs)
    first = time.perf_counter() - begun
    again = compile_attention(case.name, backend="triton", tune=SECONDS[setting.toy], **params)
    begun = time.perf_counter()
    second_record = again.tune(q, k, v, **inputs)
    row: Row = {"pattern": case.name, "n": n, "d": d, "dtype": word(dtype), "seconds": round(first, 2)}
    row["seconds_of_the_second"] = round(time.perf_counter() - begun, 3)
    if not (isinstance(record, Record) and isinstance(second_record, Record)):
        return {**row, "untuned": str(record), "ok": setting.toy}
    true = compile_attention(case.name, backend="triton", **params)(q, k, v, **inputs)
    off = {"out": gap(attention(q, k, v, **inputs), true.detach().double())}
    gains = {knob: _gain(record, knob) for knob in record.choices}
    ok = second_record.choices == record.choices and fits(off, dtype)
    trials = [asdict(trial) for trial in record.trials]
    return {**row, "choices": dict(record.choices), "gain": gains, "errors": off, "trials": trials, "ok": ok}


def _gain(record: Record, knob: str) -> float:
    """Return how much longer the model's choice takes than the tuned choice."""
    times = {trial.option: trial.median for trial in record.trials if trial.knob == knob}
    return round(times[MODEL] / times[record.choices[knob]], 3)


def memory(setting: Setting) -> Iterator[Row]:
    """Yield the peak memory of forward and backward against the plan's, in a call after the first one."""
    todo: dict[str, Callable[[], Row]] = {}
    for name, params in MEASURED:
        for d in (16, 20) if setting.toy else (64, 128, 100):
            todo[f"{name} d={d}"] = partial(_memory, setting, name, params, d)
    return rows(setting, todo.items())


MEASURED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("causal", {}),
    ("sliding_window", {"window": 512}),
    ("blocked", {"block": 200}),
)


def _memory(setting: Setting, name: str, params: dict[str, Any], d: int) -> Row:
    n, heads, dtype = (48, 1, torch.float32) if setting.toy else (8192, 16, torch.bfloat16)
    attention = compile_attention(name, backend="triton", **params)
    q, k, v = operands(setting, n, dtype, heads=(heads, heads), d=d)
    plan = attention.plan(n, heads=heads, head_dim=d, dtype=dtype, device="cuda")
    planned = plan.memory
    assert planned is not None
    row: Row = {"pattern": name, "n": n, "d": d, "planned": asdict(planned)}
    grad = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))  # allocations of the first use
    del grad
    if not setting.cuda:
        return {**row, "measured": "not here: there is no GPU", "ok": True}
    out, forward = _peak(lambda: attention(q, k, v))
    output_bytes = out.numel() * out.element_size() + 4 * q.shape[0] * q.shape[1] * q.shape[2]
    ones = torch.ones_like(out)
    grads, backward = _peak(lambda: torch.autograd.grad(out, (q, k, v), ones))
    gradient_bytes = sum(x.numel() * x.element_size() for x in grads)
    peaks = {"forward": forward - output_bytes, "backward": backward - gradient_bytes}
    slack = 8 << 20  # the granularity of the allocator
    ok = peaks["forward"] <= planned.forward + slack and peaks["backward"] <= planned.backward + slack
    return {**row, "measured": peaks, "ok": ok}


def _peak(run: Callable[[], T]) -> tuple[T, int]:
    """Return a call's result, and the peak of bytes allocated during the call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before
