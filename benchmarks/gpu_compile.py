"""First calls on a GPU: a new pattern on empty caches, the next process on the caches left behind, and new shapes.

Each call has its own process, which imports and initialises the device first; the timing covers the full cost of a
pattern up to its result. FlexAttention compiles in its default mode, without tuning, and makes block masks eagerly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import masks
import timing
import torch
from baselines import flex, published
from baselines.rival import Mask
from benchmark_part import Row, Setting
from gpu_parts import operands, rows
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from attnc import compile_attention
from attnc.runtime.tuning.timer import Timing

CACHES = ("ATTNC_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
RIVALS = ("attnc", "flex")
TIMES = 3
WINDOW = 777
"""A window that no other benchmark compiles."""
SPEC = """pattern new_window(window: int)
    visible k <= q and q - k < window
"""

N, SHAPES = 4096, ((1, 4224), (1, 5120), (1, 8192), (2, 4096))
"""Tokens of the first call, and the batch and tokens of the calls after it."""


def first_calls(setting: Setting) -> Iterator[Row]:
    """Yield forward, then forward with backward; on cold and on warm caches."""
    directions = ("forward", "forward+backward")
    return rows(
        setting, [(f"first call {direction}", partial(_first_call, setting, direction)) for direction in directions]
    )


def _first_call(setting: Setting, direction: str) -> Row:
    runs_by_rival = {
        name: [_cold_and_warm(setting, name, direction) for _ in range(_times(setting))] for name in RIVALS
    }
    ms = {}
    for name, runs in runs_by_rival.items():
        for which, kind in enumerate(("cold", "warm")):
            ms[f"{name}_{kind}"] = timing.as_json(Timing.of([run[which]["first_ms"] for run in runs]))
        ms[f"{name}_next"] = timing.as_json(Timing.of([run[1]["next_ms"] for run in runs]))
    shown = [one.row() for one in published.figures("first call", "forward", N)]
    ok = all(one["ok"] for runs in runs_by_rival.values() for run in runs for one in run)
    return {"case": "first call", "direction": direction, "n": N, "ms": ms, "published": shown, "ok": ok}


def new_shapes(setting: Setting) -> Iterator[Row]:
    """Measure recompilation for other lengths and batches, after the first call."""
    return rows(setting, [("new shapes", partial(_new_shapes, setting))])


def _new_shapes(setting: Setting) -> Row:
    runs_by_rival = {name: _cold_and_warm(setting, name, "forward")[0] for name in RIVALS}
    row: Row = {"case": "new shapes", "shapes": SHAPES, "direction": "forward"}
    row["recompiled"] = {name: sum(timings["compiled"]) for name, timings in runs_by_rival.items()}
    row["ms_of_shapes"] = {name: timings["shapes_ms"] for name, timings in runs_by_rival.items()}
    return row | {"ok": all(timings["ok"] for timings in runs_by_rival.values())}


def _times(setting: Setting) -> int:
    return 1 if setting.toy else TIMES


def _cold_and_warm(setting: Setting, name: str, direction: str) -> tuple[Row, Row]:
    """Return the row of a process on empty caches, and of the next one on the caches that it left.

    At toy sizes, which compile nothing, most of it runs in the current process.
    """
    if setting.toy and (name, direction) != ("attnc", "forward"):
        return child(name, direction, setting), child(name, direction, setting)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **{cache: f"{folder}/{cache}" for cache in CACHES}}
        command = [sys.executable, __file__, name, direction, setting.device, "toy" if setting.toy else "real"]
        processes = []
        for _ in range(1 if setting.toy else 2):
            done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            processes.append(json.loads(done.stdout.splitlines()[-1]))
    return processes[0], processes[-1]


# --- in the process --------------------------------------------------------------------------------------------------


def child(name: str, direction: str, setting: Setting) -> Row:
    """Time the first call and the next one, then other shapes: milliseconds, and the number of compilations."""
    n = 48 if setting.toy else N
    shapes = [(1, 64), (2, 48)] if setting.toy else list(SHAPES)
    dtype, d = (torch.float32, 16) if setting.toy else (torch.bfloat16, 128)
    heads = (1, 1) if setting.toy else (16, 16)
    window = 20 if setting.toy else WINDOW

    def drawn(batch: int, tokens: int) -> tuple[Tensor, ...]:
        return operands(setting, tokens, dtype, batch=batch, heads=heads, d=d)

    leaves = drawn(1, n)
    torch.matmul(leaves[0].detach(), leaves[1].detach().mT)  # initialises the device and loads its library
    make = {"attnc": _ours, "flex": _theirs}[name]
    begun = time.perf_counter()
    attend = make(setting, window)
    out = _run(setting, attend, leaves, direction)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    _run(setting, attend, leaves, direction)
    following = time.perf_counter() - begun
    timings: Row = {"first_ms": first * 1e3, "next_ms": following * 1e3, "compiled": [], "shapes_ms": []}
    count = {"attnc": _files, "flex": _graphs}[name]
    for batch, tokens in shapes:
        before, begun, other = count(), time.perf_counter(), drawn(batch, tokens)
        _run(setting, attend, other, "forward")
        timings["shapes_ms"].append((time.perf_counter() - begun) * 1e3)
        timings["compiled"].append(count() - before)
    return timings | {"ok": bool(out.isfinite().all())}


Attend = Callable[..., Tensor]


def _ours(setting: Setting, window: int) -> Attend:
    return compile_attention(SPEC, backend="triton", window=window)


def _theirs(setting: Setting, window: int) -> Attend:
    """Return FlexAttention with a block mask for each length, as its users do."""
    attend: Any = torch.compile(flex_attention) if setting.cuda else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not setting.cuda:
            q, k, v = q.detach(), k.detach(), v.detach()
        n = q.shape[2]
        blocks = flex.block_mask(Mask(n, masks.window(window, 0)(n)), setting.device, compiled=False)
        out: Tensor = attend(q, k, v, block_mask=blocks)
        return out

    return run


def _run(setting: Setting, attend: Attend, leaves: tuple[Tensor, ...], direction: str) -> Tensor:
    if direction == "forward":
        with torch.no_grad():
            out = attend(*leaves)
    else:
        out = attend(*leaves)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), leaves)
    if setting.cuda:
        torch.cuda.synchronize()
    return out


def _files() -> int:
    """Return the number of binaries that Triton has written."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return 0 if folder is None else sum(1 for _ in Path(folder).rglob("*.cubin"))


def _graphs() -> int:
    """Return the number of graphs that dynamo has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def main() -> None:
    """Run `gpu_compile.py NAME DIRECTION DEVICE SIZE`, the timed process; print its result as JSON."""
    name, direction, device, size = sys.argv[1:]
    print(json.dumps(child(name, direction, Setting(device, size == "toy"))))


if __name__ == "__main__":
    main()
