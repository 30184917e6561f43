"""The gate cases of the library: kernels that its recurrences and its branches with a state launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import torch

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.triton.recurrent.recurrence_texts import recurrent_kernels
from attnc.runtime.texts.library import hybrid_names, recurrence_names
from attnc.runtime.toolchain.kernel_gate import GateCase
from attnc.runtime.toolchain.selection import same_text

PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "lingen_ma": {"frames": 4, "height": 4, "width": 4},
    "log_linear": {"levels": 6},
    "mhs_vm": {"height": 8, "width": 8},
    "spatial_mamba": {"height": 8, "width": 8},
}
"""Parameters that the gate uses for patterns without defaults, or with parameters that bound the number of tokens."""


def whole_library() -> list[str]:
    """Return the names of recurrences and of patterns whose branches have a state."""
    return [*recurrence_names(), *hybrid_names()]


def cases(
    names: Sequence[str], targets: Sequence[str], head_dims: Sequence[int], dtype: str = "bfloat16"
) -> Iterator[GateCase]:
    """Yield the kernels of each pattern on each target, equal kernels once; skip patterns that have no kernels."""
    seen = set()
    for name in names:
        attention = compile_attention(name, **PARAMETERS.get(name, {}))
        for target, head_dim in product(targets, head_dims):
            for source in _sources(attention, target, head_dim, dtype):
                case = GateCase(name, source, target, head_dim, dtype)
                if same_text(case) not in seen:
                    seen.add(same_text(case))
                    yield case


def _sources(attention: Attention, target: str, head_dim: int, dtype: str) -> Iterator[KernelSource]:
    for recurrent in attention._recurrents():
        with suppress(UnsupportedError):
            kernels = recurrent_kernels(
                attention.bound, recurrent, TARGETS[target], head_dim, getattr(torch, dtype), {}
            )
            yield from kernels.values()
