"""Measurement of this machine's rates, in seconds."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece, TileCounts, stretch
from attnc.compiler.planning.rates import PLAIN, ROWS, WIDTHS, Rates, Table, doubled
from attnc.runtime.executors.cpu import cpu_executor, flash_kernel, work_items
from attnc.runtime.measuring.choice_calibration import measured_choices
from attnc.runtime.measuring.steady import Steady, too_busy
from attnc.runtime.planning.plausible import implausible

_log = logging.getLogger(__name__)

HEADS, KEYS, ELEMENTS = 2, 512, 1 << 19
"""Heads, keys per stretch and score elements of one measurement."""
LONG = 1024
"""Number of tokens of a long dense call."""
DRIFT = 1.5
"""Maximum ratio of the first measurement and its repetition at the end; beyond it the load has changed."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure() -> Rates:
    """Measure rates with torch's current number of threads. Takes three seconds, and longer on a busy machine.

    Raises MeasurementError if the machine is too busy: minima disagree or drift, or rates are implausible for the
    processor.
    """
    time, threads = Steady(), torch.get_num_threads()
    first = _peak(time, torch.float32, WIDTHS[0])
    rates = _measured(time)
    last = _peak(time, torch.float32, WIDTHS[0])
    if not first / DRIFT <= last <= DRIFT * first:
        raise too_busy(f"a score element took {first:.3g} ns at the start and {last:.3g} ns at the end")
    spread = f"minima within {time.spread - 1:.0%}"
    source = f"measured with {threads} threads, torch {torch.__version__}, {spread}"
    rates = replace(rates, source=source, spread=time.spread)
    reason = implausible(rates, threads)
    if reason is not None:
        raise too_busy(reason)
    return rates


def _measured(time: Steady) -> Rates:
    elements = {name: _table(time, dtype) for name, dtype in _DTYPES.items()}
    elements["float16"] = elements["bfloat16"]
    elements["float64"] = doubled(elements["float32"])
    masked = {name: _masked(time, dtype) for name, dtype in _DTYPES.items()}
    backward = {name: _backward(time, dtype) for name, dtype in _DTYPES.items()}
    row = {name: _row(time, dtype) for name, dtype in _DTYPES.items()}
    return Rates(
        elements=elements,
        masked={**masked, "float16": masked["bfloat16"], "float64": masked["float32"]},
        call=_call(time),
        merge=_merge(time),
        copy=_copy(time),
        mask=PLAIN.mask,
        evaluate=PLAIN.evaluate,
        row={**row, "float16": row["bfloat16"], "float64": 2 * row["float32"]},
        peak={name: (_peak(time, dtype, WIDTHS[0]), _peak(time, dtype, WIDTHS[1])) for name, dtype in _DTYPES.items()},
        backward={**backward, "float16": backward["bfloat16"], "float64": backward["float32"]},
        alone={name: _alone(time, dtype) for name, dtype in _DTYPES.items()},
        choices=measured_choices(time),
        source="measured",
    )


# --- measurements ----------------------------------------------------------------------------------------------------


def _table(time: Steady, dtype: torch.dtype) -> Table:
    narrow, wide = (tuple(_element(time, dtype, rows, width, masked=False) for rows in ROWS) for width in WIDTHS)
    return narrow, wide


def _masked(time: Steady, dtype: torch.dtype) -> float:
    with_mask, without = (_element(time, dtype, ROWS[2], WIDTHS[0], masked=masked) for masked in (True, False))
    return max(with_mask / without, 1.0)


def _element(time: Steady, dtype: torch.dtype, rows: int, width: int, *, masked: bool, keys: int = KEYS) -> float:
    """Measure nanoseconds per score element in stretches of `rows` rows and `keys` keys."""
    count = max(ELEMENTS // (rows * keys * HEADS), 1)
    q = torch.randn(count, HEADS, rows, width).to(dtype)
    k, v = (torch.randn(count, HEADS, keys, width).to(dtype) for _ in range(2))
    mask = torch.zeros(rows, keys, dtype=dtype) if masked else None
    return time(lambda: flash_kernel.attend(q, k, v, mask, False, 0.1)) / (count * HEADS * rows * keys)


def _peak(time: Steady, dtype: torch.dtype, width: int) -> float:
    """Measure nanoseconds per score element of a long dense call."""
    q, k, v = (torch.randn(1, HEADS, LONG, width).to(dtype) for _ in range(3))
    return time(lambda: flash_kernel.attend(q, k, v, None, False, 0.1)) / (HEADS * LONG**2)


def _backward(time: Steady, dtype: torch.dtype) -> float:
    """Measure how many times longer the backward of dense attention takes than its forward."""
    q, k, v = (torch.randn(1, HEADS, KEYS, WIDTHS[0]).to(dtype) for _ in range(3))
    out, lse = flash_kernel.attend(q, k, v, None, False, 0.1)
    backward_ns = time(lambda: flash_kernel.attend_backward(out, q, k, v, out, lse, None, False, 0.1))
    return backward_ns / time(lambda: flash_kernel.attend(q, k, v, None, False, 0.1))


def _alone(time: Steady, dtype: torch.dtype) -> float:
    """Measure the backward's slowdown if all heads read one kv head."""
    q, k, v = (torch.randn(1, 2 * HEADS, KEYS, WIDTHS[0]).to(dtype) for _ in range(3))
    out, lse = flash_kernel.attend(q, k, v, None, False, 0.1)

    def backward(heads: int) -> float:
        return time(lambda: flash_kernel.shared_backward(out, q, k[:, :heads], v[:, :heads], out, lse, 0.1))

    return max(backward(1) / backward(2 * HEADS), 1.0)


def _row(time: Steady, dtype: torch.dtype) -> float:
    """Measure nanoseconds per query row beyond its elements, from rows of few keys and of `KEYS` keys."""
    few = 32
    short, long = (_element(time, dtype, ROWS[2], WIDTHS[0], masked=False, keys=keys) for keys in (few, KEYS))
    return max((short - long) / (1 / few - 1 / KEYS), 1.0)


def _call(time: Steady) -> float:
    """Measure nanoseconds per nearly empty piece, as the executor runs it among others."""
    pieces, side, width = 8, 4, 16
    q, k, v = (torch.randn(1, 1, pieces * side, width) for _ in range(3))
    single_ns, total_ns = (
        time(partial(cpu_executor.forward, q, k, v, _diagonal(count, side), 0.1, "out"), inner=10)
        for count in (1, pieces)
    )
    return max((total_ns - single_ns) / (pieces - 1), 1000.0)


def _diagonal(count: int, side: int) -> Plan:
    """Return a plan of blocks on the diagonal, one piece each."""
    stretches = [stretch(i * side, (i + 1) * side) for i in range(count)]
    group = Group((0,), (0,), tuple(PlanPiece(tokens, tokens, "full") for tokens in stretches))
    return Plan(
        n_q=8 * side,
        n_k=8 * side,
        batch=1,
        heads=1,
        kv_heads=1,
        q_tile=side,
        k_tile=side,
        tiles=TileCounts(64, count, count, 0),
        visible=count * side * side,
        groups=(group,),
        masks=(),
        executor="cpu",
        schedule="pieces",
        reasons=(),
        fallback=None,
        exact_mask=lambda *_: np.ones((side, side), dtype=np.bool_),
    )


def _merge(time: Steady) -> float:
    """Measure nanoseconds per output element of a narrow merged piece, beyond its scores."""
    side = WIDTHS[0]
    count = ELEMENTS // (HEADS * side * side)
    shape, strides = (count, HEADS, side, side), (side * side, count * side * side, side, 1)
    q, k, v, out = (torch.randn(HEADS, count * side, side).as_strided(shape, strides) for _ in range(4))
    lse = torch.randn(HEADS, count * side).as_strided(shape[:3], (side, count * side, 1))

    def piece() -> None:
        o, part = flash_kernel.attend(q, k, v, None, False, 0.1)
        work_items.merge(o, part, out, lse)

    scores = _element(time, torch.float32, side, side, masked=False) * q.numel()
    return max(time(piece) - scores, 0.1 * scores) / out.numel()


def _copy(time: Steady) -> float:
    grid = torch.randn(HEADS, 32, 32, 64)
    bricks = grid.as_strided((HEADS, 3, 3, 16, 16, 64), (32 * 32 * 64, 8 * 32 * 64, 8 * 64, 32 * 64, 64, 1))
    return time(lambda: bricks.reshape(HEADS, 9, 256, 64)) / bricks.numel()
