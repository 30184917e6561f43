"""A recurrence whose passes run as kernels: which do, and their texts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.ir import Recur
from attnc.compiler.recurrences.derived import ElementwiseScan, Pass, RecurrenceForm, RunningReduction
from attnc.runtime.gpu.recurrent.linear_on_gpu import LONGEST, linear_recurrence
from attnc.runtime.recurrent import linear as in_torch
from attnc.runtime.recurrent.linear import Delta, RankOne
from attnc.runtime.recurrent.passes import Linear


def without_kernels(derived: RecurrenceForm, recur: Recur, dtype: torch.dtype) -> str:
    """What of a recurrence runs as operations of torch in calls of a dtype, and why; empty: all states have kernels."""
    if dtype == torch.float64:
        return "float64 has no kernels"
    if any(not isinstance(stage, Pass | ElementwiseScan | RunningReduction) for stage in derived.stages):
        return f"states of `{recur.name}` are of a kind that has no kernels"
    return ""


def linear_of(dtype: torch.dtype) -> Linear:
    """How linear passes of calls in a dtype are computed; their rows are of that dtype, as products of tiles are."""
    return in_torch.linear_recurrence if dtype == torch.float64 else partial(_linear, dtype)


def _linear(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    correction: Delta | RankOne | None = None,
    bonus: Tensor | None = None,
    chunk: int = LONGEST,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """`chunk`: that of a CPU, of which kernels take none but what a token's steps need more."""
    if isinstance(correction, Delta) and correction.read is not None:
        correction = replace(correction, read=correction.read.to(dtype))
    elif isinstance(correction, RankOne):
        correction = replace(correction, left=correction.left.to(dtype), read=correction.read.to(dtype))
    out, final = linear_recurrence(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        correction=correction,
        bonus=None if bonus is None else bonus.to(dtype),
        chunk=max(chunk, LONGEST),
        **more,
    )
    return out.to(q.dtype), final
