"""The kernels of the library's routing patterns, for the gate: those that calls of them start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.kernels.selected.gather_frame import PREFIX
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tiled_kernel import CAREFUL
from attnc.runtime.attention import Attention, compile_attention
from attnc.runtime.example_inputs import example_inputs, head_count
from attnc.runtime.gpu import kernel_gate, selected_gate
from attnc.runtime.gpu.compiling import Outcome
from attnc.runtime.gpu.kernel_gate import GateCase
from attnc.runtime.gpu.started import started
from attnc.runtime.lengths import natural_length

PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "biformer": {"height": 14, "width": 28},
    "mminference_grid": {"strides": [64, 96]},
    "vmoba": {"frames": 2, "height": 16, "width": 16},
    "vmoba_threshold": {"frames": 2, "height": 16, "width": 16},
    "vsa": {"frames": 4, "height": 8, "width": 16},
}
"""Of patterns whose parameters have no defaults. Lengths and grids make no kernels."""

TOKENS = 512
"""Of the calls, where a pattern leaves them open."""

LISTED = frozenset({"mminference_boundary", "recycled", "superlinear", "temp_cache"})
"""Whose tiles are listed as numbers or as runs, whichever is shorter: few tokens as the one, more as the other."""


def _shown(n: int, heads: int, kv_heads: int) -> Mapping[str, Mapping[str, Tensor]]:
    """Inputs that no example is made of, by pattern; what stands in them makes no kernels."""
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
    """The kernels of each on each target: of heads with keys of their own, and of groups that share them.

    One that is the same for two of them comes once; of what runs as tiles in torch there is none. Careful kernels are
    left out: they return at once in finite calls, so that their speed is of no account.
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
    """A call on zeros that wants gradients; `shared`: heads of queries for each of keys."""
    bound = attention.bound
    n = natural_length(bound, tokens) or tokens
    heads = head_count(bound) or 2 * shared
    kv_heads = heads // shared
    q, k, v = (torch.zeros(1, h, n, width, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    own = _shown(n, heads, kv_heads).get(attention.name, {})
    sizes = {"dk": width, "dv": width, "kv_head": kv_heads}
    made = {name: one.tensor for name, one in example_inputs(bound, n, n, own, heads=heads, sizes=sizes).items()}
    inputs: dict[str, Any] = {name: x.float() if x.is_floating_point() else x for name, x in {**own, **made}.items()}

    def call() -> Tensor:
        out: Tensor = attention(q, k, v, **inputs)
        return out

    return call


def judge(case: GateCase, outcome: Outcome) -> list[str]:
    """The reasons why a kernel may not go out; none: it may."""
    of_places = case.source.function.startswith(PREFIX)
    return selected_gate.judge(case, outcome) if of_places else kernel_gate.judge(case, outcome)
