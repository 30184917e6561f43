"""Lists of tiles on a GPU: the cost of a new call shape besides attention, against create_block_mask.

A pattern whose tiles follow from arithmetic needs no list: `list_bytes` counts what its kernels read besides
operands and inputs, `other_kernels` the other kernels that ran on the device. `list_ms` is how much longer the first
call of a shape takes than the second, with compiled kernels; it includes the host's work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gpu_cases
import torch
from baselines import flex, published
from benchmark_part import Row, Setting
from gpu_cases import GpuCase, Shape
from gpu_parts import Run, operands, refusal, rows, timed, word
from torch import Tensor

from attnc import Attention
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.runtime.executors.triton.launch import function_of, started_by

OPERANDS = frozenset({"q", "k", "v", "out", "lse", "dout", "lse2", "delta", "dq", "dk", "dv", "part", "part_lse"})
"""Arguments of kernels that are not lists; `part` are partial results."""

EAGER_UP_TO = 65536
"""Maximum number of tokens for uncompiled create_block_mask; for more it needs more memory than the device has."""

LENGTHS = (8192, 32768, 131072, 1 << 20)
LEAST_MS = 1e-3
"""The smallest time in ms that can be distinguished from zero."""

HEADS = (2, 2)
"""Heads of calls whose lists are inspected; lists belong to a head."""


@dataclass(frozen=True)
class Listed:
    """A case, at its own length or at others; `affine`: its tiles follow from arithmetic."""

    case: GpuCase
    affine: bool
    lengths: tuple[int, ...] = ()


LINES = (
    Listed(gpu_cases.dense_cases(128, (8192,))[1], True, LENGTHS),
    Listed(gpu_cases.WINDOWS[3], True, LENGTHS),
    Listed(gpu_cases.WINDOWS[5], False, LENGTHS),
    Listed(gpu_cases.WINDOWS[6], False, LENGTHS),
    Listed(gpu_cases.BLOCK_SPARSE[5], False, LENGTHS),
)
GRIDS = (
    *(Listed(case, True) for case in (*gpu_cases.WINDOWS[:3], *gpu_cases.BLOCK_SPARSE[:5])),
    *(Listed(case, False) for case in gpu_cases.BLOCK_SPARSE[6:]),
)


def lines(setting: Setting) -> Iterator[Row]:
    """Yield rows of text: causal, windows, powers, documents and columns, up to a million tokens."""
    return _made(setting, LINES)


def grids(setting: Setting) -> Iterator[Row]:
    """Yield rows of images, videos and random blocks, at their sizes."""
    return _made(setting, GRIDS)


def _made(setting: Setting, listed: Sequence[Listed]) -> Iterator[Row]:
    todo = {}
    for one in listed:
        shape = one.case.shape(setting)
        for n in (shape.n,) if setting.toy else one.lengths or (shape.n,):
            todo[f"{one.case.name} n={n}"] = partial(_row, setting, one, replace(shape, n=n))
    return rows(setting, todo.items())


def _row(setting: Setting, figure: Listed, shape: Shape) -> Row:
    torch.manual_seed(0)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    case = replace(figure.case, toy=shape) if setting.toy else replace(figure.case, real=shape)
    attention, inputs = case.attention(setting), case.given(setting)
    row: Row = {"case": case.name, "n": shape.n, "d": shape.d, "dtype": word(dtype), "affine": figure.affine}
    call: dict[str, Any] = {"heads": shape.heads[0], "head_dim": shape.d, "dtype": dtype, "device": "cuda"}
    call |= {name: x.cpu() for name, x in inputs.items()}
    row |= {"live_tiles": attention.plan(shape.n, **call).tiles.live / shape.heads[0]}
    row |= {"direction": "list", **_new_shape(setting, attention, shape, inputs, dtype)}
    makers, absent = _masks(setting, case, shape, inputs)
    leaves = tuple(x.detach() for x in operands(setting, shape.n, dtype, heads=shape.heads, d=shape.d))
    runs: dict[str, Run] = {"attnc_forward": partial(_called, attention, leaves, inputs)}
    timings = timed(setting, {**runs, **makers})
    timings["ms"]["attnc"] = {"median": row["list_ms"], "low": row["list_ms"], "high": row["list_ms"], "rounds": 1}
    row |= {**timings, "absent": absent, "published": []}
    if shape.n in {figure.n for figure in published.PUBLISHED if figure.case == "block mask"}:
        row["published"] = [figure.row() for figure in published.figures("block mask", "list", shape.n)]
    return row


def _called(attention: Any, leaves: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = attention(*leaves, **inputs)
    return out


# --- a new call shape ------------------------------------------------------------------------------------------------


def _new_shape(
    setting: Setting, attention: Attention, shape: Shape, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> Row:
    """Measure the first call of two batch entries, after a call of one has compiled the kernels, and the next call.

    The first call of three is profiled, since profiling takes time.
    """
    heads = shape.heads if setting.toy else _few(shape)
    calls = []
    for batch in (1, 2, 3):
        leaves = tuple(x.detach() for x in operands(setting, shape.n, dtype, batch=batch, heads=heads, d=shape.d))
        batch_inputs = {name: x.expand(batch, -1).contiguous() if name == "doc" else x for name, x in inputs.items()}
        calls.append(partial(_called, attention, leaves, batch_inputs))
    calls[0]()
    first = _wall(setting, calls[1])
    again = min(_wall(setting, calls[1]) for _ in range(3))
    with watched(setting) as watch:
        calls[2]()
    row: Row = {"list_ms": max(first - again, LEAST_MS), "first_ms": first, "again_ms": again}
    row |= {"list_bytes": watch.list_bytes(batch_inputs), "kernels": len(watch.launches), "profiled": watch.profiled}
    return row | {"other_kernels": watch.others}


def _few(shape: Shape) -> tuple[int, int]:
    """Return a few heads, or all if heads differ."""
    return shape.heads if "vertical_stride" in shape.params else HEADS


def _wall(setting: Setting, run: Run) -> float:
    """Return the milliseconds from the call to the end of its work on the device."""
    begun = time.perf_counter()
    run()
    if setting.cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


class watched:  # noqa: N801  a context manager, named as such
    """Record launches of attnc's kernels and, on a GPU, count everything that runs there."""

    def __init__(self, setting: Setting) -> None:
        self.launches: list[dict[str, Tensor]] = []
        self.profiled = setting.cuda
        self.others = 0
        self._start = started_by(self._noted)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        self._profile = torch.profiler.profile(activities=activities) if setting.cuda else None

    def __enter__(self) -> watched:
        """Begin to record."""
        if self._profile is not None:
            self._profile.__enter__()  # type: ignore[no-untyped-call]  # torch has no type for it
        self._start.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, and count."""
        self._start.__exit__(None, None, None)
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # nor for this
            events: Any = self._profile.events()  # type: ignore[no-untyped-call]  # nor for this
            self.others = sum(str(event.device_type).endswith("CUDA") for event in events) - len(self.launches)

    def list_bytes(self, call_inputs: Mapping[str, Tensor]) -> int:
        """Return the bytes that kernels were given besides operands and the call's inputs, each counted once."""
        inputs = {x.data_ptr() for x in call_inputs.values()}
        lists = {
            x.data_ptr(): x.numel() * x.element_size()
            for launch in self.launches
            for name, x in launch.items()
            if name not in OPERANDS and x.data_ptr() not in inputs
        }
        return sum(lists.values())

    def _noted(self, source: KernelSource, grid: tuple[int, int], arguments: Sequence[object]) -> None:
        named = zip(source.arguments, arguments, strict=True)
        self.launches.append({argument.name: x for argument, x in named if isinstance(x, Tensor)})
        function_of(source)[grid](*arguments, **source.options)


# --- create_block_mask -----------------------------------------------------------------------------------------------


def _masks(
    setting: Setting, case: GpuCase, shape: Shape, inputs: dict[str, Tensor]
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return functions that make the block mask, compiled and eagerly; and the reasons why some are not run."""
    mask = case.words(shape, inputs)
    if mask.mod is None:
        return {}, {"flex": "the mask is empty"}
    flex.forget()
    makers: dict[str, Run] = {}
    absent: dict[str, str] = {}
    if shape.n <= EAGER_UP_TO:
        makers["flex_mask_eager"] = flex.maker(mask, setting.device, compiled=False)
    else:
        absent["flex_mask_eager"] = f"past {EAGER_UP_TO} tokens it holds n × n booleans"
    if setting.cuda:
        makers["flex_mask"] = flex.maker(mask, setting.device, compiled=True)
    else:
        absent["flex_mask"] = "left out at toy sizes: what torch compiles for a CPU is no rival"
    reasons = {name: refusal(run) for name, run in makers.items()}
    absent |= {name: reason for name, reason in reasons.items() if reason is not None}
    makers = {name: run for name, run in makers.items() if name not in absent}
    return makers, absent
