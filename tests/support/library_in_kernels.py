"""Library patterns by kernels in Triton's interpreter, forward and every gradient, with the kernels that ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.executors.triton import planner, selected_on_gpu
from attnc.runtime.texts.library import pattern_names, routing_names
from cases.case import Case, Tensors, distance, leaf, results
from kernel_calls import Launch, check, operands, poisoned, recorded
from library_calls import SMALL, made_inputs

LOOSE = {"local_linear": 1e-2}
"""Tolerances of patterns whose tiles in fp32 are far from fp64, as their sums are ill conditioned."""

TOLERANCE = 1e-5
"""Tolerance of the other patterns, relative to the largest true entry of a result or to 1."""


def use(patch: pytest.MonkeyPatch, name: str) -> None:
    """Use the kernels for a target."""
    patch.setattr(planner, "target_of", lambda device: TARGETS[name])


def check_pattern(name: str, dtype: torch.dtype, tolerance: float | None = None) -> list[Launch]:
    """Check a pattern without inputs, on 96 tokens, against the reference executor in fp64."""
    attention = compile_attention(name, backend="triton", **SMALL.get(name, {}))
    n, heads, d = 96, head_count(attention.bound) or 2, 64
    drawn_inputs = made_inputs(name, n, heads)
    if name == "bigbird":
        drawn_inputs["random"] = torch.randint(n // 16, (heads, n // 16, 2))
    made = example_inputs(attention.bound, n, n, drawn_inputs, heads=heads, sizes={"dk": d, "dv": d})
    inputs = drawn_inputs | {key: example.tensor for key, example in made.items()}
    by_head = any("head" in tensor.dims for tensor in attention._pattern.tensors)
    tensors = operands(n, heads=(heads, heads if by_head else heads // 2 or 1), widths=(d, d), dtype=dtype)
    return check(attention, tensors, inputs, with_lse=attention.has_lse, tolerance=tolerance)


def target_for(name: str, *, other: bool = False) -> str:
    """Return a target that uses pointers for every second pattern, boxes for the rest; `other` swaps the two."""
    return ("sm_90", "sm_80")[(pattern_names().index(name) + other) % 2]


def check_case(case: Case) -> list[Launch]:
    """Check any pattern in fp32 against its own reference in fp64."""
    assert case.output is not None
    wide = case.operands()
    narrow = {name: _in_32_bits(x) for name, x in wide.items()}
    wanted = results(case.output(wide), _leaves(wide))
    with recorded() as launches, poisoned():
        actual = results(
            case.call(case.compiled(backend="triton", strict=case.name in LINEAR), narrow), _leaves(narrow)
        )
    for name, x in wanted.items():
        size = float(x.detach().abs().max()) if x.numel() else 0.0
        assert distance(actual[name], x) <= TOLERANCE * max(size, 1), name
    return launches


def _in_32_bits(x: Any) -> Any:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    return leaf(x, torch.float32) if x.requires_grad else x.float()


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if isinstance(x, Tensor) and x.requires_grad}


LINEAR = (
    "comba",
    "delta_net",
    "gated_delta_net",
    "gated_delta_product",
    "gla",
    "gsa",
    "hgrn2",
    "kimi_delta",
    "lightning",
    "linear_attention",
    "mamba2_ssd",
    "retention",
    "rwkv6",
    "rwkv7",
)
"""Recurrences that run completely as kernels."""
OF_CHUNKS = {"prepare", "states", "outputs", "adjoints", "keys"}
"""Kernels that these recurrences start."""

CHOSEN_KEYS = {
    *{"anchor", "deepseek_sparse", "dynamic_mask", "minference_vertical_slash", "recycled", "routing_transformer"},
    *{"token_sparse", "flux", "mminference_boundary", "sparsifiner", "superlinear", "temp_cache"},
    *{"dhsa", "hip", "mminference_grid"},
}
"""Routing patterns that select keys instead of blocks of keys: their tiles are listed."""
BY_HEAD = {"hyper_attention", "svg2"}
"""Patterns whose blocks differ by head, which take a call per head."""
BY_BATCH = {"ssa_random"}
"""Patterns whose order differs by batch entry, which take a call per entry."""


def chosen_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which calls of the kernels of selected blocks are added from now on."""
    calls: list[str] = []

    def counted(method: Callable[..., Any], way: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls.append(way)
            return method(*arguments)

        return run

    for way in ("forward", "backward"):
        patch.setattr(selected_on_gpu.SelectedOnGpu, way, counted(getattr(selected_on_gpu.SelectedOnGpu, way), way))
    return calls


def expected_calls(case: Case) -> list[str]:
    """Return the calls of the kernels of selected blocks that a case should make."""
    if case.name not in routing_names() or case.name in CHOSEN_KEYS:
        return []
    times = case.shape.batch * case.shape.heads if case.name in BY_HEAD else 1
    times = case.shape.batch if case.name in BY_BATCH else times
    return ["forward"] * times + ["backward"] * times
