"""The kernels that a call of a recurrence launches, without and with its gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.targets import Target
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.call.tensor_checks import input_tensors
from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence
from attnc.runtime.executors.triton.launch import started
from attnc.runtime.executors.triton.recurrent.linear_on_gpu import without_kernels
from attnc.spec.program import BoundProgram

TOKENS = 64
"""Approximate number of tokens of the example call: a whole chunk."""


def recurrent_sources(
    bound: BoundProgram,
    recurrent: PatternRecurrence,
    target: Target,
    head_dim: int,
    dtype: torch.dtype,
    inputs: Mapping[str, object],
) -> dict[str, str]:
    """Return the kernel texts by name; inputs that are missing from `inputs` are generated.

    Raises ArgumentError, and UnsupportedError if nothing runs as kernels.
    """
    kernels = recurrent_kernels(bound, recurrent, target, head_dim, dtype, inputs)
    return {name: kernel.text for name, kernel in kernels.items()}


def recurrent_kernels(
    bound: BoundProgram,
    recurrent: PatternRecurrence,
    target: Target,
    head_dim: int,
    dtype: torch.dtype,
    inputs: Mapping[str, object],
) -> Mapping[str, KernelSource]:
    """Return the kernel sources by name; inputs that are missing from `inputs` are generated."""
    name = recurrent.pattern.name
    heads = head_count(bound) or 1
    tokens = natural_length(bound, TOKENS) or TOKENS
    q, k, v = (torch.zeros(1, heads, tokens, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
    sizes = {"dk": head_dim, "dv": head_dim}
    examples = example_inputs(bound, tokens, tokens, inputs, heads=heads, sizes=sizes)
    all_inputs = {**{input_name: example.tensor for input_name, example in examples.items()}, **inputs}
    tensors = [x.requires_grad_() if x.is_floating_point() else x for x in input_tensors(recurrent.pattern, all_inputs)]

    def call() -> Tensor:
        with torch.no_grad():
            recurrent.attend(q, k, v, all_inputs, tensors, None, by_kernels=True)
        return recurrent.attend(q, k, v, all_inputs, tensors, None, by_kernels=True)[0]

    kernels = started(call, target)
    if not kernels:
        reason = recurrent.derived and without_kernels(recurrent.derived, recurrent.recur, dtype)
        reason = reason or "float64 has no kernels"
        raise UnsupportedError(f"`{name}`: {reason}; on a GPU it runs as operations of torch")
    return kernels
