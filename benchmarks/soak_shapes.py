"""A soak test of thousands of calls of random shapes: the memory that stays allocated."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from soak_sizes import PATTERNS, CallSize, Row, inputs_of

SETTLED = 0.4
"""The share of the calls after which memory must no longer grow."""

ALLOWED_MIB = 48.0
"""Allowed growth in MiB: the allocator's own variation, a fraction of the kept memory."""

SHORTEST = 20


def shapes(size: CallSize) -> Row:
    """Call random patterns, lengths, heads and dtypes, forward and backward, and launch kernels for a GPU."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ["ATTNC_CACHE_DIR"] = folder
        stack.callback(os.environ.pop, "ATTNC_CACHE_DIR", None)
        attends = _attends(size.of_patterns)
        resident = list(_calls(attends, size))
        kernels, binaries = _launched(size)
        kept = _kept(attends)
    settled = [mib for call, mib in resident if call >= SETTLED * size.calls]
    growth = max(settled[-1], settled[len(settled) // 2]) - settled[0]
    failures = []
    if growth > ALLOWED_MIB:
        failures.append(f"memory grew by {growth:.0f} MiB after the first {SETTLED:.0%} of the calls")
    failures += [f"{name}: {count} are kept, {limit} may be" for name, (count, limit) in kept.items() if count > limit]
    if binaries > kernels:
        failures.append(f"{binaries} binaries for {kernels} kernels")
    return {
        "calls": size.calls,
        "resident_mib": [(call, round(mib, 1)) for call, mib in resident],
        "growth_mib_after_settling": round(growth, 1),
        "launches": size.launches,
        "kernels_launched": kernels,
        "variants_launched": binaries,
        "kept": {name: count for name, (count, _) in kept.items()},
        "failures": failures,
    }


def _attends(count: int) -> dict[str, Any]:
    from attnc import compile_attention

    return {name: compile_attention(name, **params) for name, params in list(PATTERNS.items())[:count]}


def _calls(attends: dict[str, Any], size: CallSize) -> Iterator[tuple[int, float]]:
    """Make calls; yield the number of calls and the resident memory in MiB from time to time.

    bf16 is left out: torch itself grows with every new shape, in its own attention as in attnc's (oneDNN keeps a kernel
    per shape).
    """
    import torch

    from attnc import compile_attention

    draw = random.Random(0)
    torch.manual_seed(0)
    count = size.calls
    for i in range(count):
        name = draw.choice(list(attends))
        if draw.random() < 0.05:  # patterns are dropped and compiled again
            attends[name] = compile_attention(name, **PATTERNS[name])
        attend, n = attends[name], draw.randrange(SHORTEST, size.longest)
        heads = 2 * draw.randrange(1, 4)
        dtype = draw.choice((torch.float32, torch.float32, torch.float64))
        recorded = draw.random() < 0.5
        batch, dk = draw.randrange(1, 3), draw.choice((8, 16, 24))
        q, k, v = (torch.randn(batch, heads, n, dk, dtype=dtype, requires_grad=recorded) for _ in range(3))
        made = inputs_of(attend, n, heads, batch, dk, dtype)
        out = attend(q, k, v, **made)
        if recorded:
            out.sum().backward()
        if i % max(count // 40, 1) == 0 or i == count - 1:
            gc.collect()
            yield i + 1, _resident_mib()


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _launched(size: CallSize) -> tuple[int, int]:
    """Launch kernels of random shapes for an absent GPU; return the number of texts, and of their variants.

    A variant is what Triton would recompile: another text, or another type or divisibility of an argument.
    """
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return 0, 0
    import torch

    from attnc import compile_attention
    from attnc.compiler.kernels.targets import TARGETS
    from attnc.runtime.call.device_targets import pretending
    from attnc.runtime.executors.triton.launch import started_by

    texts: set[str] = set()
    variants: set[tuple[object, ...]] = set()

    def keep(source: Any, grid: object, arguments: Sequence[Any]) -> None:
        texts.add(source.digest)
        variant = [_variant(argument, value) for argument, value in zip(source.arguments, arguments, strict=True)]
        variants.add((source.digest, *variant))

    draw = random.Random(1)
    names = ("causal", "sliding_window", "blocked", "power", "document", "alibi", "strided")
    attends = {name: compile_attention(name, backend="triton", **PATTERNS[name]) for name in names}
    with pretending(TARGETS["sm_90"]), started_by(keep):
        for _ in range(size.launches):
            attend, n = attends[draw.choice(names)], draw.randrange(SHORTEST, size.longest)
            heads, batch = 2 * draw.randrange(1, 9), draw.randrange(1, 5)
            q, k, v = (torch.zeros(batch, heads, n, 64, dtype=torch.float16, requires_grad=True) for _ in range(3))
            out = attend(q, k, v, **inputs_of(attend, n, heads, batch, 64, torch.float32))
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return len(texts), len(variants)


def _variant(argument: Any, value: Any) -> object:
    """Return what Triton specialises on: the type and alignment of a pointer, the type of a number."""
    if argument.is_number:
        return argument.type
    if hasattr(value, "data_ptr"):
        return str(value.dtype), value.data_ptr() % 16 == 0
    return type(value).__name__, str(getattr(value, "block_shape", ""))


def _kept(attends: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the sizes of this process's caches, and their limits."""
    from attnc.runtime.executors.cpu import bound_plan
    from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
    from attnc.runtime.executors.triton import launch
    from attnc.runtime.settings import SETTINGS

    plans = max(len(cpu_plans(attend._core.planner)._by_shape) for attend in attends.values())
    held: dict[str, Sized] = {
        "programs": bound_plan._PROGRAMS,
        "masks": bound_plan._MASKS,
        "layouts": bound_plan._LAYOUTS,
    }
    limits = {"programs": SETTINGS.plans, "masks": SETTINGS.masks, "layouts": SETTINGS.layouts}
    return {
        "plans of one pattern, at most": (plans, SETTINGS.plans),
        **{name: (len(kept), limits[name]) for name, kept in held.items()},
        "bytes of masks": (bound_plan._MASKS.weight, SETTINGS.mask_bytes),
        "kernel functions": (len(launch._FUNCTIONS), SETTINGS.kernels),
    }
