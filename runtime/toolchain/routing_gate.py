"""The kernels that calls of the library's routing patterns launch, for the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.kernels.selected.gather_frame import PREFIX
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tiled_kernel import CAREFUL
from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.executors.triton.launch import started
from attnc.runtime.toolchain import kernel_gate, selected_gate
from attnc.runtime.toolchain.compiling import Outcome
from attnc.runtime.toolchain.kernel_gate import GateCase

PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "biformer": {"height": 14, "width": 28},
    "mminference_grid": {"strides": [64, 96]},
    "vmoba": {"frames": 2, "height": 16, "width": 16},
    "vmoba_threshold": {"frames": 2, "height": 16, "width": 16},
    "vsa": {"frames": 4, "height": 8, "width": 16},
}
"""Parameters for patterns without defaults. Kernels do not depend on lengths and grids."""

TOKENS = 512
"""Number of tokens of the calls if the pattern does not fix it."""

LISTED = frozenset({"mminference_boundary", "recycled", "superlinear", "temp_cache"})
"""Patterns whose tiles are listed as numbers or as runs, whichever is shorter: few tokens as numbers, more as runs."""


def _shown(n: int, heads: int, kv_heads: int) -> Mapping[str, Mapping[str, Tensor]]:
    """Return inputs that have no generated example, by pattern; kernels do not depend on their values."""
    blocks = -(-n // 64)
    places = torch.zeros(1, kv_heads, 16, dtype=torch.int64)
    return {
        "dhsa": {"begin": torch.zeros(1, n, dtype=torch.int64), "stop": torch.full((1, n), n)},
        "hyper_attention": {"sample": places},
        "recycled": {"cached": places},
        "rectified": {"neighbour": torch.eye(-(-n // 128), dtype=torch.bool)},
        "seer": {name: torch.zeros(1, heads, blocks, 16) for name in ("gq", "gk")},
        "sparse_d": {"map": torch.ones(1, heads, -(-n // 128), -(-n // 128), dtype=torch.bool)},
    }


def cases(
    names: Sequence[str], targets: Sequence[str], head_dims: Sequence[int], dtype: str = "bfloat16"
) -> Iterator[GateCase]:
    """Yield the kernels of each pattern on each target: for heads with their own keys, and for head groups.

    Equal kernels are yielded once; patterns that run as tiles in torch yield none. Careful kernels are left out: they
    return at once in finite calls, so their speed does not matter.
    """
    seen = set()
    for name in names:
        attention = compile_attention(name, backend="triton", **PARAMETERS.get(name, {}))
        lengths = (TOKENS, 2 * TOKENS) if name in LISTED else (TOKENS,)
        for target, width, shared, n in product(targets, head_dims, (1, 2), lengths):
            call = _call(attention, n, width, getattr(torch, dtype), shared)
            for source in started(call, TARGETS[target]).values():
                case = GateCase(name, source, target, width, dtype, shared > 1 and source.stage == "dkdv")
                if source.function.endswith(CAREFUL):
                    continue
                if (target, source.digest) not in seen:
                    seen.add((target, source.digest))
                    yield case


def _call(attention: Attention, tokens: int, width: int, dtype: torch.dtype, shared: int) -> Callable[[], Tensor]:
    """Return a call on zeros with gradients; `shared`: query heads per kv head."""
    bound = attention.bound
    n = natural_length(bound, tokens) or tokens
    heads = head_count(bound) or 2 * shared
    kv_heads = heads // shared
    q, k, v = (torch.zeros(1, h, n, width, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    fixed_inputs = _shown(n, heads, kv_heads).get(attention.name, {})
    sizes = {"dk": width, "dv": width, "kv_head": kv_heads}
    examples = {
        name: example.tensor
        for name, example in example_inputs(bound, n, n, fixed_inputs, heads=heads, sizes=sizes).items()
    }
    inputs: dict[str, Any] = {
        name: x.float() if x.is_floating_point() else x for name, x in {**fixed_inputs, **examples}.items()
    }

    def call() -> Tensor:
        out: Tensor = attention(q, k, v, **inputs)
        return out

    return call


def judge(case: GateCase, outcome: Outcome) -> list[str]:
    """Return the reasons to reject a kernel; empty if it is accepted."""
    of_places = case.source.function.startswith(PREFIX)
    return selected_gate.judge(case, outcome) if of_places else kernel_gate.judge(case, outcome)
