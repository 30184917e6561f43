"""The number of compiled binaries: lengths add none, and a kernel's digest covers everything fixed at compile time."""

from __future__ import annotations

import importlib
import math
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.kernels.attention_kernels import AttentionKernels, HeadShape, find_kernels
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.call import device_targets
from attnc.runtime.executors.triton import launch as launching
from kernel_calls import Launch, operands, recorded
from plan_calls import from_library
from tiers import examples

PATTERNS: list[tuple[str, Mapping[str, Any]]] = [
    ("causal", {}),
    ("sliding_window", {"window": 100, "sinks": 4}),
    ("neighborhood_1d", {}),
    ("document", {}),
    ("power", {"block": 64}),
    ("alibi", {}),
    ("fox", {}),
]


class Specialised:
    """Triton's launcher's view of a launch: argument types, and which integers are divisible by 16 or equal to 1."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[str, Any] = {}

    def key(self, launch: Launch) -> tuple[str, str]:
        """Return the key of a launch; launches with equal keys share a binary."""
        from triton.runtime.jit import create_function_from_signature

        source = launch.source
        if source.digest not in self._binders:
            function = launching._made(source)
            binder = create_function_from_signature(function.signature, function.params, self._backend)
            self._binders[source.digest] = binder
        _, types, _ = self._binders[source.digest](*launch.arguments)
        return source.digest, repr(types)


@pytest.fixture
def specialised(monkeypatch: pytest.MonkeyPatch) -> Specialised:
    # the launcher imports gluon, which must happen under the settings with which Triton was imported
    importlib.import_module("triton.experimental.gluon")
    monkeypatch.delenv("TRITON_INTERPRET")  # these kernels are decorated for a GPU and never run
    monkeypatch.setattr(device_targets, "_PRETENDED", ContextVar("target", default=TARGETS["sm_90"]))
    return Specialised()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "params"), PATTERNS, ids=[name for name, _ in PATTERNS])
def test_lengths_add_no_binaries(
    name: str, params: Mapping[str, Any], target: str, specialised: Specialised, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 lengths, batch sizes and layouts need at most 2 binaries per kernel."""
    monkeypatch.setattr(device_targets, "_PRETENDED", ContextVar("target", default=TARGETS[target]))
    attention = compile_attention(name, backend="triton", **params)
    random_sizes = random.Random(5)
    digests_of_specs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    lengths = [1, 16, 64, 128, *(random_sizes.randint(2, 700) for _ in range(46))]
    for n in lengths:
        tensors = operands(n, heads=(4, 4), batch=random_sizes.choice([1, 1, 2]), dtype=torch.float16)
        if random_sizes.random() < 0.5:
            tensors = {key: x.transpose(1, 2).contiguous().transpose(1, 2) for key, x in tensors.items()}
        for launch in launches_of(attention, tensors, n):
            digests_of_specs[launch.source.stage].add(specialised.key(launch))
    assert digests_of_specs.keys() >= {"forward", "delta", "dq", "dkdv"}
    counts = {stage: len(keys) for stage, keys in digests_of_specs.items()}
    assert max(counts.values()) <= 2, counts


VIDEO = [
    ("neighborhood_2d", ("height", "width"), (7, 40), {"window": 7}),
    ("neighborhood_2d", ("height", "width"), (7, 40), {"window": [4, 6], "causal": [True, False], "stride": [1, 2]}),
    ("neighborhood_3d", ("frames", "height", "width"), (4, 12), {"window": [3, 4, 4]}),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "axes", "extents", "params"), VIDEO, ids=["picture", "causal", "video"])
def test_extents_add_no_binaries(
    name: str,
    axes: tuple[str, ...],
    extents: tuple[int, int],
    params: Mapping[str, Any],
    target: str,
    specialised: Specialised,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """50 sizes of an image or a video need at most 2 binaries per kernel."""
    monkeypatch.setattr(device_targets, "_PRETENDED", ContextVar("target", default=TARGETS[target]))
    random_sizes = random.Random(7)
    digests_of_specs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for _ in range(50):
        sizes: dict[str, Any] = {axis: random_sizes.randint(*extents) for axis in axes}
        attention = compile_attention(name, backend="triton", **params, **sizes)
        tensors = operands(math.prod(sizes.values()), heads=(2, 2), dtype=torch.float16)
        for launch in launches_of(attention, tensors, len(tensors["q"][0, 0])):
            digests_of_specs[launch.source.stage].add(specialised.key(launch))
    assert digests_of_specs.keys() >= {"forward", "delta", "dq", "dkdv"}
    counts = {stage: len(keys) for stage, keys in digests_of_specs.items()}
    assert max(counts.values()) <= 2, counts


def launches_of(attention: Any, tensors: Mapping[str, Tensor], n: int) -> list[Launch]:
    batch = len(tensors["q"])
    inputs: dict[str, Tensor] = {}
    if attention.name == "document":
        inputs = {"doc": (torch.arange(n) * 3 // n).expand(batch, n).contiguous()}
    if attention.name == "fox":
        inputs = {"f": -torch.rand(batch, n, 4)}
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    with recorded(run=False) as launches:
        out = attention(*leaves, **inputs)
        torch.autograd.grad(out, leaves, torch.zeros_like(out))
    return launches


def test_unaligned_memory_is_copied(specialised: Specialised) -> None:
    attention = compile_attention("causal", backend="triton")
    keys = []
    for start in (0, 1):
        tensors = {n: torch.zeros(x.numel() + 1)[start:][: x.numel()].view(x.shape) for n, x in operands(40).items()}
        keys.append({specialised.key(launch) for launch in launches_of(attention, tensors, 40)})
    assert keys[0] == keys[1]


# --- digests ---------------------------------------------------------------------------------------------------------


def sources(kernels: AttentionKernels) -> list[KernelSource]:
    return [kernels.forward, kernels.dq, kernels.dkdv]


def digests(name: str, heads: HeadShape, target: str, **params: Any) -> list[str]:
    return [source.digest for source in sources(find_kernels(from_library(name, **params), heads, TARGETS[target]))]


HEADS = HeadShape(64, 64, "bfloat16")
GRID: dict[str, Any] = {"height": 40, "width": 40}

WIDTHS = st.sampled_from([16, 32, 40, 64, 72, 96, 128, 192, 256])


@st.composite
def compile_settings(draw: st.DrawFn) -> tuple[HeadShape, str, tuple[tuple[str, int], ...]]:
    """Draw everything that is fixed when kernels are compiled: head shape, target and parameters."""
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    heads = HeadShape(draw(WIDTHS), draw(WIDTHS), dtype, dtype == "float32" and draw(st.booleans()))
    params = {"window": draw(st.integers(1, 600)), "sinks": draw(st.integers(0, 9))}
    return heads, draw(st.sampled_from(sorted(TARGETS))), tuple(params.items())


@settings(max_examples=examples(20))
@given(compile_settings(), compile_settings())
def test_digests_cover_everything_compiled_in(
    a: tuple[HeadShape, str, tuple[tuple[str, int], ...]], b: tuple[HeadShape, str, tuple[tuple[str, int], ...]]
) -> None:
    """Change one setting after another from a to b; kernels with equal texts have equal tiles and digests."""
    (heads, target, params), (other, other_target, other_params) = a, b
    steps = [
        (heads, target, params),
        (HeadShape(other.dk, heads.dv, heads.dtype, heads.tf32), target, params),
        (HeadShape(heads.dk, other.dv, heads.dtype, heads.tf32), target, params),
        (HeadShape(heads.dk, heads.dv, other.dtype, other.tf32), target, params),
        (heads, target, other_params),
    ]
    digests_of_steps = [
        digests("sliding_window", head_shape, step_target, **dict(values)) for head_shape, step_target, values in steps
    ]
    for step, step_digests in zip(steps[1:], digests_of_steps[1:], strict=True):
        is_unchanged = step == steps[0]
        assert all((x == y) == is_unchanged for x, y in zip(digests_of_steps[0], step_digests, strict=True)), step
    elsewhere = find_kernels(from_library("sliding_window", **dict(params)), heads, TARGETS[other_target])
    kernels = find_kernels(from_library("sliding_window", **dict(params)), heads, TARGETS[target])
    for x, y in zip(sources(kernels), sources(elsewhere), strict=True):
        assert (x.digest == y.digest) == ((x.text, x.options) == (y.text, y.options))
    forward, dq, dkdv = digests("sliding_window", replace(heads, grouped=not heads.grouped), target, **dict(params))
    assert [forward, dq] == digests_of_steps[0][:2]
    assert dkdv != digests_of_steps[0][2]


def test_digests_cover_options_passed_to_triton() -> None:
    source = find_kernels(from_library("causal"), HEADS, TARGETS["sm_90"]).forward
    variants = [replace(source, tiles=replace(source.tiles, **{name: 7})) for name in ("warps", "stages")]
    variants.append(replace(source, registers=200))
    assert len({source.digest, *(variant.digest for variant in variants)}) == 4


@pytest.mark.parametrize(
    ("name", "base", "variants"),
    [
        ("sliding_window", {"window": 100, "sinks": 4}, [{"window": 101}, {"sinks": 3}]),
        ("blocked", {"block": 64}, [{"block": 65}]),
        ("streaming", {}, [{"sinks": 5}, {"window": 1999}, {"last": 1}]),
        ("moa", {"alpha": [64, 32], "beta": [0.25, 0.5], "block": 16}, [{"alpha": [32, 64]}, {"block": 32}]),
        ("softcap", {}, [{"cap": 49}, {"window": 4095}]),
        ("neighborhood_1d", {}, [{"window": 9}, {"stride": 2}, {"causal": True}]),
        ("neighborhood_2d", GRID, [{"window": 9}, {"stride": 2}, {"causal": True}, {"dilation": 2}]),
    ],
)  # fmt: skip
def test_different_parameters_share_no_kernel(name: str, base: dict[str, Any], variants: list[dict[str, Any]]) -> None:
    digests_of_specs = [digests(name, HEADS, "sm_90", **{**base, **other}) for other in [{}, *variants]]
    every = [digest for spec_digests in digests_of_specs for digest in spec_digests]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("name", "base", "variants"),
    [
        ("power", {}, [{"window": 6}, {"sink": 2}, {"block": 128}]),
        ("radial", {"frames": 4, "per_frame": 300}, [{"frames": 9}, {"per_frame": 40}, {"block": 64}]),
    ],
)
def test_parameters_of_tile_lists_share_kernels(
    name: str, base: dict[str, Any], variants: list[dict[str, Any]]
) -> None:
    """Tile lists are data: no entry of a list appears in a kernel text."""
    digests_of_specs = [digests(name, HEADS, "sm_90", **{**base, **other}) for other in [{}, *variants]]
    assert digests_of_specs == digests_of_specs[:1] * len(digests_of_specs)


TEXTS = """
import sys
from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.targets import TARGETS
from plan_calls import from_library
for name in sys.argv[1:]:
    kernels = find_kernels(from_library(name), HeadShape(64, 64, "bfloat16"), TARGETS["sm_90"])
    for name, text in sorted(kernels.sources.items()):
        print(name, text)
"""


def test_every_process_emits_the_same_text() -> None:
    names = ["sliding_window", "neighborhood_1d", "alibi", "fox", "softcap", "t5", "graphormer", "power", "prefix_lm"]
    outputs = []
    for seed in ("1", "77"):
        path = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", TEXTS, *names], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0]
    assert outputs[0] == outputs[1]
