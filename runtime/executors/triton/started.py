"""The kernels that a call launches, collected without running any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.targets import Target
from attnc.runtime.call.device_targets import pretending
from attnc.runtime.executors.triton.launch import started_by


def started(call: Callable[[], Tensor], target: Target) -> Mapping[str, KernelSource]:
    """Return the kernels that a call and its gradient launch on a target, by name; nothing runs."""
    kernels: dict[str, KernelSource] = {}

    def keep(source: KernelSource, *_: object) -> None:
        if source.text not in [kernel.text for kernel in kernels.values()]:
            others = sum(name.partition(".")[0] == source.function for name in kernels)
            kernels[f"{source.function}.{others + 1}" if others else source.function] = source

    with pretending(target), started_by(keep):
        out = call()
        if out.requires_grad:
            torch.autograd.backward(out.sum())
    return kernels
