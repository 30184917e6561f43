"""Few binaries: lengths make no new ones, and everything that is fixed when a kernel is compiled is in its digest."""

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
from attnc.runtime.gpu import device_targets, kernel_modules
from kernel_calls import Launch, operands, recorded
from plan_calls import from_library

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
    """A launch as Triton's launcher sees it: the types of arguments, and which are divisible by 16 or equal to 1."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[str, Any] = {}

    def key(self, launch: Launch) -> tuple[str, str]:
        """Launches of equal keys share a binary."""
        from triton.runtime.jit import create_function_from_signature

        source = launch.source
        if source.digest not in self._binders:
            function = kernel_modules._made(source)
            binder = create_function_from_signature(function.signature, function.params, self._backend)
            self._binders[source.digest] = binder
        _, types, _ = self._binders[source.digest](*launch.arguments)
        return source.digest, repr(types)


@pytest.fixture
def specialised(monkeypatch: pytest.MonkeyPatch) -> Specialised:
    importlib.import_module("triton.experimental.gluon")  # the launcher would, and it must fit how Triton was imported
    monkeypatch.delenv("TRITON_INTERPRET")  # these kernels are decorated for a GPU, and not run
    monkeypatch.setattr(device_targets, "_PRETENDED", ContextVar("target", default=TARGETS["sm_90"]))
    return Specialised()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "params"), PATTERNS, ids=[name for name, _ in PATTERNS])
def test_lengths_make_no_binaries(
    name: str, params: Mapping[str, Any], target: str, specialised: Specialised, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 lengths, batches and layouts: at most 2 binaries of a kernel."""
    monkeypatch.setattr(device_targets, "_PRETENDED", ContextVar("target", default=TARGETS[target]))
    attention = compile_attention(name, backend="triton", **params)
    chosen = random.Random(5)
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    lengths = [1, 16, 64, 128, *(chosen.randint(2, 700) for _ in range(46))]
    for n in lengths:
        tensors = operands(n, heads=(4, 4), batch=chosen.choice([1, 1, 2]), dtype=torch.float16)
        if chosen.random() < 0.5:
            tensors = {key: x.transpose(1, 2).contiguous().transpose(1, 2) for key, x in tensors.items()}
        for one in launches_of(attention, tensors, n):
            found[one.source.stage].add(specialised.key(one))
    assert found.keys() >= {"forward", "delta", "dq", "dkdv"}
    counts = {stage: len(keys) for stage, keys in found.items()}
    assert max(counts.values()) <= 2, counts


VIDEO = [
    ("neighborhood_2d", ("height", "width"), (7, 40), {"window": 7}),
    ("neighborhood_2d", ("height", "width"), (7, 40), {"window": [4, 6], "causal": [True, False], "stride": [1, 2]}),
    ("neighborhood_3d", ("frames", "height", "width"), (4, 12), {"window": [3, 4, 4]}),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "axes", "extents", "params"), VIDEO, ids=["picture", "causal", "video"])
def test_extents_make_no_binaries(
    name: str,
    axes: tuple[str, ...],
    extents: tuple[int, int],
    params: Mapping[str, Any],
    target: str,
    specialised: Specialised,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """50 sizes of a picture or video: at most 2 binaries of a kernel."""
    monkeypatch.setattr(device_targets, "_PRETENDED", ContextVar("target", default=TARGETS[target]))
    chosen = random.Random(7)
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for _ in range(50):
        sizes: dict[str, Any] = {axis: chosen.randint(*extents) for axis in axes}
        attention = compile_attention(name, backend="triton", **params, **sizes)
        tensors = operands(math.prod(sizes.values()), heads=(2, 2), dtype=torch.float16)
        for one in launches_of(attention, tensors, len(tensors["q"][0, 0])):
            found[one.source.stage].add(specialised.key(one))
    assert found.keys() >= {"forward", "delta", "dq", "dkdv"}
    counts = {stage: len(keys) for stage, keys in found.items()}
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
        keys.append({specialised.key(one) for one in launches_of(attention, tensors, 40)})
    assert keys[0] == keys[1]


# --- digests ---------------------------------------------------------------------------------------------------------


def sources(kernels: AttentionKernels) -> list[KernelSource]:
    return [kernels.forward, kernels.dq, kernels.dkdv]


def digests(name: str, heads: HeadShape, target: str, **params: Any) -> list[str]:
    return [one.digest for one in sources(find_kernels(from_library(name, **params), heads, TARGETS[target]))]


HEADS = HeadShape(64, 64, "bfloat16")
GRID: dict[str, Any] = {"height": 40, "width": 40}

WIDTHS = st.sampled_from([16, 32, 40, 64, 72, 96, 128, 192, 256])


@st.composite
def kinds(draw: st.DrawFn) -> tuple[HeadShape, str, tuple[tuple[str, int], ...]]:
    """All that is fixed when kernels are made."""
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    heads = HeadShape(draw(WIDTHS), draw(WIDTHS), dtype, dtype == "float32" and draw(st.booleans()))
    params = {"window": draw(st.integers(1, 600)), "sinks": draw(st.integers(0, 9))}
    return heads, draw(st.sampled_from(sorted(TARGETS))), tuple(params.items())


@settings(max_examples=20)
@given(kinds(), kinds())
def test_what_is_compiled_in_is_in_the_digest(
    a: tuple[HeadShape, str, tuple[tuple[str, int], ...]], b: tuple[HeadShape, str, tuple[tuple[str, int], ...]]
) -> None:
    """One thing after another is changed from a to b; where texts stay as they are, so do tiles."""
    (heads, target, params), (other, other_target, other_params) = a, b
    steps = [
        (heads, target, params),
        (HeadShape(other.dk, heads.dv, heads.dtype, heads.tf32), target, params),
        (HeadShape(heads.dk, other.dv, heads.dtype, heads.tf32), target, params),
        (HeadShape(heads.dk, heads.dv, other.dtype, other.tf32), target, params),
        (heads, target, other_params),
    ]
    found = [digests("sliding_window", one, where, **dict(values)) for one, where, values in steps]
    for step, own in zip(steps[1:], found[1:], strict=True):
        same = step == steps[0]
        assert all((x == y) == same for x, y in zip(found[0], own, strict=True)), step
    elsewhere = find_kernels(from_library("sliding_window", **dict(params)), heads, TARGETS[other_target])
    here = find_kernels(from_library("sliding_window", **dict(params)), heads, TARGETS[target])
    for x, y in zip(sources(here), sources(elsewhere), strict=True):
        assert (x.digest == y.digest) == ((x.text, x.options) == (y.text, y.options))
    forward, dq, dkdv = digests("sliding_window", replace(heads, grouped=not heads.grouped), target, **dict(params))
    assert [forward, dq] == found[0][:2]
    assert dkdv != found[0][2]


def test_what_triton_is_told_is_in_the_digest() -> None:
    source = find_kernels(from_library("causal"), HEADS, TARGETS["sm_90"]).forward
    others = [replace(source, tiles=replace(source.tiles, **{name: 7})) for name in ("warps", "stages")]
    others.append(replace(source, registers=200))
    assert len({source.digest, *(one.digest for one in others)}) == 4


@pytest.mark.parametrize(
    ("name", "base", "others"),
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
def test_specs_that_differ_share_no_kernel(name: str, base: dict[str, Any], others: list[dict[str, Any]]) -> None:
    found = [digests(name, HEADS, "sm_90", **{**base, **other}) for other in [{}, *others]]
    every = [digest for one in found for digest in one]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("name", "base", "others"),
    [
        ("power", {}, [{"window": 6}, {"sink": 2}, {"block": 128}]),
        ("radial", {"frames": 4, "per_frame": 300}, [{"frames": 9}, {"per_frame": 40}, {"block": 64}]),
    ],
)
def test_specs_that_differ_in_what_is_listed_share_kernels(
    name: str, base: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    """Lists are data: nothing that they hold is in a text."""
    found = [digests(name, HEADS, "sm_90", **{**base, **other}) for other in [{}, *others]]
    assert found == found[:1] * len(found)


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


def test_same_text_in_every_process() -> None:
    names = ["sliding_window", "neighborhood_1d", "alibi", "fox", "softcap", "t5", "graphormer", "power", "prefix_lm"]
    told = []
    for seed in ("1", "77"):
        path = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", TEXTS, *names], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0]
    assert told[0] == told[1]
