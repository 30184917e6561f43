"""Attention by kernels, and its gradient, as autograd wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from attnc.runtime.cpu.autograd import Pair, Triple
from attnc.runtime.gpu.executor import Executor
from attnc.runtime.plans import Planner


class OnGpu(NamedTuple):
    """The triton executor under one pattern."""

    planner: Planner
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """`Executor.forward`."""
        return Executor(self.planner.gpu.prepared(q, k, v, inputs), self.scale).forward(q, k, v)

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """`Executor.backward`."""
        q, k, v, _, _, *inputs = kept
        prepared = self.planner.gpu.prepared(q, k, v, inputs)
        return Executor(prepared, self.scale).backward(grad_out, grad_lse, kept)[0]
