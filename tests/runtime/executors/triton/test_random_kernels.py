"""Random programs through the kernels in Triton's interpreter, against the reference, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from attnc import compile_attention
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.executors.triton import planner
from attnc.spec.errors import EvaluationError
from kernel_calls import check, operands
from programs import Program, programs
from tiers import examples

RANGED = """
pattern drawn(window: int, block: int, sinks: int, shift: int)
    align   {align}
    input   level: int[token]
    visible {relation}
"""

RELATIONS = (
    "0 <= q - k < window or k <= q and k < sinks",
    "abs(q - k) < window and q // block == k // block",
    "k < max(q - shift, sinks)",
    "abs((q // block) * block - k) <= window",
    "k <= (q if q % block < sinks else q // 2)",
    "clamp(q - shift, 0, keys - 1) - window <= k <= q + shift",
    "k <= level[q] or k == q",
    "not (0 <= q - k < window)",
    "k // block <= (q + shift) // block and (head % 2 == 0 or q - k < window)",
    "k == q - shift or k < sinks",
)

ADDED = (
    "",
    "    score   scale * dot(q, k) - 0.1 * abs(q - k)\n",
    "    score   2 * tanh(scale * dot(q, k))\n",
    "    weights sigmoid(score - 1)\n",
    "    weights softplus(score) / sum(softplus(score) for k)\n",
)


def check_program(program: Program, seed: int, target: str) -> None:
    attention = compile_attention(program.source, backend="triton", **_inputs(program))
    s = program.shape
    inputs = {name: torch.from_numpy(array) for name, array in program.inputs.items()}
    torch.manual_seed(seed)
    tensors = operands(s.n_q, s.n_k, heads=(s.heads, s.kv_heads), batch=s.batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "target_of", lambda device: TARGETS[target])
        try:
            check(attention, tensors, inputs)
        except EvaluationError:
            assume(False)


def _inputs(program: Program) -> dict[str, Any]:
    return dict(program.parameters)


@settings(max_examples=examples(10), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(programs(longest=36, elements=2600), st.integers(0, 999), st.sampled_from(["sm_80", "sm_90"]))
def test_programs(program: Program, seed: int, target: str) -> None:
    check_program(program, seed, target)


@settings(max_examples=examples(10))
@given(st.data())
def test_programs_of_ranges(data: st.DataObject) -> None:
    """Relations that are ranges of keys, over more tokens than a tile, with various scores."""
    draw = data.draw
    align = draw(st.sampled_from(["start", "end"]))
    parts = draw(st.lists(st.sampled_from(RELATIONS), min_size=1, max_size=2))
    relation = draw(st.sampled_from([" or ", " and "])).join(f"({part})" for part in parts)
    source = RANGED.format(align=align, relation=relation) + draw(st.sampled_from(ADDED))
    params: dict[str, Any] = {
        "window": draw(st.integers(1, 70)),
        "block": draw(st.integers(1, 40)),
        "sinks": draw(st.integers(0, 20)),
        "shift": draw(st.integers(0, 70)),
    }
    n_k = draw(st.integers(1, 80))
    n_q = draw(st.integers(1, n_k)) if draw(st.booleans()) else n_k
    torch.manual_seed(draw(st.integers(0, 999)))
    attention = compile_attention(source, backend="triton", **params)
    with pytest.MonkeyPatch.context() as patch:
        name = draw(st.sampled_from(["sm_80", "sm_90"]))
        patch.setattr(planner, "target_of", lambda device: TARGETS[name])
        level = torch.randint(-1, n_k + 1, (n_k,))
        tensors = operands(n_q, n_k, heads=draw(st.sampled_from([(1, 1), (2, 1)])))
        check(attention, tensors, {"level": level}, with_lse=attention.has_lse)
