"""The passes of a recurrence that run as kernels, and their kernel texts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.ir import Recur
from attnc.compiler.recurrences.derived import (
    ElementwiseScan,
    Pass,
    RunningReduction,
)
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.runtime.executors.recurrent import linear as in_torch
from attnc.runtime.executors.recurrent.linear import Delta, RankOne
from attnc.runtime.executors.recurrent.passes import Linear
from attnc.runtime.executors.triton.recurrent.linear_on_gpu import LONGEST, linear_recurrence


def without_kernels(derived: RecurrenceForm, recur: Recur, dtype: torch.dtype) -> str:
    """Return why a recurrence runs as operations of torch in calls of a dtype; empty if all its states have kernels."""
    if dtype == torch.float64:
        return "float64 has no kernels"
    if any(not isinstance(stage, Pass | ElementwiseScan | RunningReduction) for stage in derived.stages):
        return f"the coupled states of `{recur.name}` have no kernels"
    return ""


def linear_of(dtype: torch.dtype) -> Linear:
    """Return the function for linear passes in a dtype; it casts rows to the dtype, as tile products require."""
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
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run a linear pass by kernels in `dtype`.

    `chunk`: the chunk length chosen for a CPU; kernels use it only where the steps of a token need more than their own.
    """
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
        **options,
    )
    return out.to(q.dtype), final
