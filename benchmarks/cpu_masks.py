"""Masks on a CPU against dense SDPA and compiled FlexAttention: forward, and forward with backward.

`dense` sees every pair, or with a causal mask every earlier key: the cost of ignoring the mask. FlexAttention's block
mask is made before timing; FlexAttention has no gradient on a CPU. A row within a quarter of a rival's time is timed
again with more rounds, and the second timing counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import exact
import masks
import torch
from baselines import flex, rival, sdpa
from benchmark_part import Row, Setting
from masks import HEADS, MaskCase
from timing import as_json, interleaved, once
from torch import Tensor

from attnc import Attention
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.tuning.timer import Timing

Run = Callable[[], Any]

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

AGAIN, CLOSE = 21, 1.25
"""Rounds of the second timing, and the ratio below which a rival is close enough for one."""

AGAIN_MS = 15_000
"""Maximum time of a second timing in ms; longer rows keep their first one, whose spread is small."""


@dataclass(frozen=True)
class MaskSize:
    """Tokens, head dimension and dtype."""

    n: int
    d: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"n={self.n} d={self.d} {str(self.dtype).removeprefix('torch.')}"


TOY = 1024
"""Tokens of a toy row: the least number for which every case has a shape."""


# --- parts -----------------------------------------------------------------------------------------------------------


def dense(setting: Setting) -> Iterator[Row]:
    """Yield rows of full and causal attention, which leave nothing out."""
    sizes = [MaskSize(n, d, dtype) for n, d in ((1024, 64), (4096, 64), (4096, 128)) for dtype in (FLOAT32, BFLOAT16)]
    return _rows(setting, [(case, size) for size in sizes for case in masks.DENSE], backward=False)


def block_sparse(setting: Setting) -> Iterator[Row]:
    """Yield rows of masks of whole blocks."""
    sizes = [MaskSize(4096, d, dtype) for d in (64, 128) for dtype in (FLOAT32, BFLOAT16)]
    points = [(case, size) for size in sizes for case in masks.BLOCKS]
    long = [MaskSize(16384, 64, dtype) for dtype in (FLOAT32, BFLOAT16)]
    points += [(case, size) for size in long for case in masks.BLOCKS if case.name in LONG]
    return _rows(setting, points, backward=False)


def windows_float32(setting: Setting) -> Iterator[Row]:
    """Yield rows of windows and similar masks in fp32."""
    return _rows(setting, _windows(FLOAT32), backward=False)


def windows_bfloat16(setting: Setting) -> Iterator[Row]:
    """Yield rows of windows and similar masks in bf16."""
    return _rows(setting, _windows(BFLOAT16), backward=False)


def backward(setting: Setting) -> Iterator[Row]:
    """Yield rows of forward with backward, the longest rows last."""
    points = [
        (case, MaskSize(n, 64, dtype))
        for n in (1024, 4096)
        for dtype in (FLOAT32, BFLOAT16)
        for case in (*masks.WINDOWS, *masks.BLOCKS)
        if n > 1024 or case in masks.WINDOWS
    ]
    cases = {case.name: case for case in masks.WINDOWS}
    points += [(cases[name], MaskSize(16384, 64, FLOAT32)) for name in ("window 512", "document")]
    return _rows(setting, points, backward=True)


LONG = ("window 512", "power 256, 5", "neighborhood 13 x 13", "document", "s2 64, 8, 16")
"""Cases that are also measured at 16,384 tokens."""


def _windows(dtype: torch.dtype) -> list[tuple[MaskCase, MaskSize]]:
    sizes = [MaskSize(1024, 64, dtype), MaskSize(4096, 64, dtype), MaskSize(4096, 128, dtype)]
    points = [(case, size) for size in sizes for case in masks.WINDOWS]
    return points + [(case, MaskSize(16384, 64, dtype)) for case in masks.WINDOWS if case.name in LONG]


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(setting: Setting, points: Sequence[tuple[MaskCase, MaskSize]], *, backward: bool) -> Iterator[Row]:
    """Yield a row for each point; toy rows use only the first size."""
    if setting.toy:
        first = points[0][1]
        points = [(case, MaskSize(TOY, first.d, first.dtype)) for case in dict.fromkeys(case for case, _ in points)]
    for case, size in points:
        key = f"{case.name} {size} {'forward+backward' if backward else 'forward'}"
        if key not in setting.done:
            yield {"key": key} | _row(case, size, 1 if setting.toy else _rounds(size.n), backward=backward)


def _rounds(n: int) -> int:
    return 7 if n <= 4096 else 3


def _row(case: MaskCase, size: MaskSize, rounds: int, *, backward: bool) -> Row:
    """Return a row: its results are checked, then timed."""
    torch.manual_seed(0)
    flex.forget()
    attention, inputs = case.attention(size.n), case.inputs(size.n)
    q, k, v = (torch.randn(1, HEADS, size.n, size.d, dtype=size.dtype, requires_grad=backward) for _ in range(3))
    grad = torch.randn_like(q) if backward else None
    runs: dict[str, Run] = {"attnc": partial(attention, q, k, v, **inputs)}
    facts: Row = {"pattern": case.name, "n": size.n, "d": size.d, "dtype": str(size.dtype).removeprefix("torch.")}
    facts |= {"heads": HEADS, "direction": "forward+backward" if backward else "forward"}
    facts["first_ms"] = {"attnc": round(once(runs["attnc"]), 2)}
    plain = sdpa.attend("flash", "cpu", causal=case.causal)
    assert not isinstance(plain, rival.Absent)
    runs["dense"] = partial(plain, q, k, v)
    if not backward:
        runs["flex"], facts["first_ms"]["flex"] = _flex(case, size.n, q, k, v)
    error_by_name = _errors(case, size, {name: run for name, run in runs.items() if name != "dense"}, (q, k, v), grad)
    ok = max(error_by_name.values()) <= exact.TOLERANCE[size.dtype]
    facts |= {"errors": {name: float(f"{error:.3g}") for name, error in error_by_name.items()}, "ok": ok}
    if not ok:
        return facts
    if grad is not None:
        runs = {name: partial(_gradients, run, (q, k, v), grad) for name, run in runs.items()}
    with torch.set_grad_enabled(backward):
        times = _timed(runs, rounds)
    plan = attention.plan(size.n, heads=HEADS, head_dim=size.d, dtype=size.dtype, **inputs)
    return facts | {"ms": {name: as_json(timing) for name, timing in times.items()}} | _plan(case, attention, plan)


def _timed(runs: dict[str, Run], rounds: int) -> dict[str, Timing]:
    """Time every run in turn; close results are timed twice."""
    times = interleaved(runs, rounds, 1)
    ours = times["attnc"].median
    close = any(1 / CLOSE < time.median / ours < CLOSE for name, time in times.items() if name != "attnc")
    takes = AGAIN * sum(time.median for time in times.values())
    return times | interleaved(runs, AGAIN, 0) if close and rounds > 1 and takes < AGAIN_MS else times


def _flex(case: MaskCase, n: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, float]:
    """Return compiled FlexAttention, and the milliseconds of its first call including the block mask."""
    compiled_runs: list[rival.Attend] = []

    def first() -> None:
        block_mask = flex.block_mask(rival.Mask(n, case.mask_mod(n), case.heads), "cpu", compiled=False)
        compiled_runs.append(flex.attend(block_mask, "cpu", tuned=False))
        compiled_runs[0](q, k, v)

    took = once(first)
    return partial(compiled_runs[0], q, k, v), round(took, 2)


def _errors(
    case: MaskCase, size: MaskSize, runs: dict[str, Run], leaves: tuple[Tensor, Tensor, Tensor], grad: Tensor | None
) -> dict[str, float]:
    """Return errors of one head in fp64 for every contender with the mask; the last head, whose index is not 0."""
    head = HEADS - 1
    head_operands = [x[0, head] for x in leaves]
    true = exact.results(
        case.mask_mod(size.n),
        head_operands[0],
        head_operands[1],
        head_operands[2],
        None if grad is None else grad[0, head],
        head,
    )
    errors_by_name: dict[str, float] = {}
    for name, run in runs.items():
        out = run()
        ours = {"out": out.detach()[0, head]}
        if grad is not None:
            gradients = torch.autograd.grad(out, leaves, grad)
            ours |= {f"d{letter}": x[0, head] for letter, x in zip("qkv", gradients, strict=True)}
        errors_by_name |= {f"{name} {what}": error for what, error in exact.errors(ours, true).items()}
    return errors_by_name


def _gradients(run: Run, leaves: tuple[Tensor, ...], grad: Tensor) -> object:
    return torch.autograd.grad(run(), leaves, grad)


def _plan(case: MaskCase, attention: Attention, plan: Plan) -> Row:
    """Return the schedule, and the speedups over dense attention that live tiles and visible pairs allow."""
    pairs = case.pairs(plan.n_q)
    tiles = plan.tiles.live / HEADS * plan.q_tile * plan.k_tile
    return {
        "schedule": plan.schedule,
        "pieces": sum(len(group.pieces) for group in plan.groups),
        "tile": [plan.q_tile, plan.k_tile],
        "density": None if plan.visible is None else round(plan.visible / HEADS / pairs, 6),
        "bound": round(pairs / tiles, 4),
    }
