"""Kernels compiled for GPUs that are not available here pass the rules for machine code; violations are reported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args

import pytest

from attnc.compiler.kernels.attention_kernels import AttentionKernels, HeadShape, find_kernels, load_of
from attnc.compiler.kernels.decode import CacheKind
from attnc.compiler.kernels.decode_kernels import find_decode
from attnc.compiler.kernels.forward import emit_forward
from attnc.compiler.kernels.kernel_source import KernelSource, TileShape
from attnc.compiler.kernels.parts import in_parts
from attnc.compiler.kernels.score_formula import Kind
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tile_shapes import Load
from attnc.compiler.passes.last_rows import last_rows
from attnc.runtime.toolchain.compiling import (
    CompiledBinary,
    Failure,
    Outcome,
    compile_all,
    products_of_loops,
)
from attnc.runtime.toolchain.kernel_gate import GateCase, judge
from attnc.runtime.toolchain.machine_code import Loop, MachineCode
from attnc.runtime.toolchain.selection import PARAMETERS
from compiled_kernels import Compiler
from plan_calls import from_library

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("compiling")

BF16 = "bfloat16"

NEIGHBORS = {"height": 64, "width": 64, "window": [13, 13]}
SINKS = {"window": 512, "sinks": 4}
BACKWARD = ("dq", "dkdv")

CASES: list[tuple[str, Mapping[str, object], int, str, tuple[str, ...]]] = [
    ("causal", {}, 128, "sm_90", ("forward", *BACKWARD, "delta")),
    ("causal", {}, 64, "sm_90", ("forward",)),
    ("causal", {}, 128, "sm_80", ("forward", *BACKWARD, "grouped")),
    ("causal", {}, 128, "sm_100", ("forward", *BACKWARD)),
    ("causal", {}, 64, "gfx942", ("forward", *BACKWARD)),
    ("sliding_window", SINKS, 64, "sm_90", ("dq", "grouped")),
    ("sliding_window", SINKS, 128, "sm_80", ("forward",)),
    ("document", {}, 64, "sm_90", ("forward", "dkdv")),
    ("moa", PARAMETERS["moa"], 64, "sm_90", ("grouped",)),
    ("power", {}, 64, "sm_90", ("forward", "dkdv")),
    ("anchor", {}, 64, "sm_90", ("forward", *BACKWARD, "grouped")),
    ("deepseek_sparse", {}, 128, "sm_90", ("forward",)),
    ("deepseek_sparse", {}, 64, "sm_80", ("dkdv",)),
    ("power", {}, 64, "sm_80", ("dq",)),
    ("softcap", {}, 64, "sm_90", ("dq",)),
    ("gpt_oss", {}, 64, "sm_90", ("forward",)),
    ("fox", {}, 64, "sm_90", ("forward", *BACKWARD)),
    ("fox", {}, 128, "sm_90", ("dq", "grouped")),
    ("alibi", {}, 64, "sm_90", ("dkdv",)),
    ("t5", {}, 64, "sm_90", ("forward", "pairs")),
    ("graphormer", {}, 64, "sm_90", ("forward", *BACKWARD)),
    ("graphormer", {}, 64, "sm_80", ("forward", "pairs")),
    ("softplus_lssa", {}, 128, "sm_90", ("forward", *BACKWARD, "delta")),
    ("affine_scaled", {}, 64, "sm_90", ("sum",)),
    ("neighborhood_2d", NEIGHBORS, 128, "sm_90", ("forward", *BACKWARD)),
    ("neighborhood_2d", NEIGHBORS, 64, "sm_80", ("forward",)),
    ("sliding_window", SINKS, 128, "sm_90", ("decode of rings",)),
    ("power", {}, 128, "sm_80", ("decode of pages",)),
    ("gpt_oss", {}, 64, "sm_100", ("decode of slots", "merge")),
    ("alibi", {}, 64, "gfx942", ("decode of pages",)),
]

SERVED: Mapping[str, CacheKind] = {
    "decode of slots": "slots",
    "decode of pages": "pages",
    "decode of rings": "ring",
    "merge": "slots",
}


def kernels_of(
    name: str, target: str, head_dim: int, /, *, grouped: bool = False, **values: object
) -> AttentionKernels:
    heads = HeadShape(head_dim, head_dim, BF16, grouped=grouped)
    return find_kernels(from_library(name, **values), heads, TARGETS[target])


def made_cases() -> Iterator[GateCase]:
    for name, values, head_dim, target, stages in CASES:
        for stage in stages:
            for source in sources(name, values, head_dim, target, stage):
                yield GateCase(name, source, target, head_dim, BF16, grouped=stage == "grouped")


def sources(name: str, values: Mapping[str, object], head_dim: int, target: str, stage: str) -> list[KernelSource]:
    if stage == "sum":
        parts = in_parts(from_library(name, **values))
        alone = replace(parts, nodes=parts.nodes[1:], combine=None)
        return [find_kernels(alone, HeadShape(head_dim, head_dim, BF16, grouped=False), TARGETS[target]).forward]
    if stage in SERVED:
        heads, kind = HeadShape(head_dim, head_dim, BF16), SERVED[stage]
        served = find_decode(last_rows(from_library(name, **values)), heads, TARGETS[target], kind)
        return [served.merge if stage == "merge" else served.decode(16)]
    kernels = kernels_of(name, target, head_dim, grouped=stage == "grouped", **values)
    if stage == "pairs":
        return [*kernels.of_distances.values(), *kernels.of_tables.values()]
    return [getattr(kernels, "dkdv" if stage == "grouped" else stage)]


def spilling() -> GateCase:
    problem = kernels_of("causal", "sm_90", 128).problem
    return GateCase("causal, too large", emit_forward(problem, TileShape(256, 128, 4, 3)), "sm_90", 128, BF16)


@pytest.fixture(scope="session")
def outcomes(compiler: Compiler) -> dict[int, tuple[GateCase, Outcome]]:
    """Compile all kernels once, and last the kernel that is too large."""
    cases = [*made_cases(), spilling()]
    compiled = compiler([(case.source, case.target) for case in cases])
    return dict(enumerate(zip(cases, compiled, strict=True)))


@pytest.mark.slow
def test_kernels_pass(outcomes: dict[int, tuple[GateCase, Outcome]]) -> None:
    judged = {i: judge(case, outcome) for i, (case, outcome) in sorted(outcomes.items())}
    last = max(judged)
    wrong = {
        f"{outcomes[i][0].pattern} {outcomes[i][0].title} {outcomes[i][0].target}": reasons
        for i, reasons in judged.items()
        if reasons and i != last
    }
    assert not wrong


def test_the_cases_cover_every_path_of_the_emitter() -> None:
    """Loop forms, loads of a score, kinds of weights, stages, loops over heads, and targets."""
    forms, loads, weight_kinds, ways = set(), set(), set(), set()
    for name, values, head_dim, target, stages in CASES:
        if stages == ("sum",):
            weight_kinds.add("sum")
            continue
        if set(stages) <= set(SERVED):
            continue
        kernels = kernels_of(name, target, head_dim, grouped="grouped" in stages, **values)
        forms.add((kernels.form, kernels.problem.boxes))
        loads.add(load_of(kernels.problem.score))
        weight_kinds.add(kernels.problem.kind)
        if {"dkdv", "grouped"} & set(stages):
            ways.add((kernels.problem.grouped, kernels.problem.is_nested))
    assert forms == {(form, boxes) for form in ("ranges", "bricks", "lists", "content") for boxes in (True, False)}
    assert loads == set(get_args(Load))
    assert weight_kinds == set(get_args(Kind))
    assert ways == {(False, False), (True, False), (True, True)}
    assert {target for *_, target, _ in CASES} == set(TARGETS)
    stages_seen = {stage for *_, stages in CASES for stage in stages}
    assert stages_seen >= {"forward", "delta", "dq", "dkdv", "pairs", *SERVED}
    assert sum(1 for _ in made_cases()) <= 60


@pytest.mark.slow
def test_values_one_tile_late_are_multiplied_under_the_softmax(outcomes: dict[int, tuple[GateCase, Outcome]]) -> None:
    case, outcome = outcomes[0]
    assert (case.pattern, case.stage, case.target, case.head_dim) == ("causal", "forward", "sm_90", 128)
    assert isinstance(outcome, CompiledBinary)
    assert any(loop.overlapped for loop in outcome.code.loops)


@pytest.mark.slow
def test_a_kernel_that_is_too_large_fails(outcomes: dict[int, tuple[GateCase, Outcome]]) -> None:
    reasons = judge(*outcomes[max(outcomes)])
    assert any(reason.startswith("stack of ") for reason in reasons)


# --- child processes -------------------------------------------------------------------------------------------------


def job() -> tuple[KernelSource, str]:
    return kernels_of("causal", "sm_90", 64).delta, "sm_90"


def outcomes_of(text: str, longest: float = 60.0, count: int = 1) -> list[Outcome]:
    jobs = [job()] * count
    return [outcome for _, outcome in compile_all(jobs, 1, text, longest)]


def test_an_aborted_child_is_reported_with_its_last_line() -> None:
    text = (
        "import os, sys, pickle; pickle.load(sys.stdin.buffer); "
        "print('a note', file=sys.stderr); print('LLVM ERROR: no such thing', file=sys.stderr); "
        "print(' #0 0x00007f', file=sys.stderr, flush=True); os.abort()"
    )
    expected = Failure("the compiler died (SIGABRT): LLVM ERROR: no such thing")
    assert outcomes_of(text, count=2) == [expected, expected]  # the next kernel gets a new child process


def test_a_child_that_exits_is_reported() -> None:
    assert outcomes_of("import sys; sys.exit('error: out of luck')") == [
        Failure("the compiler died (status 1): error: out of luck")
    ]


def test_a_hanging_child_is_killed() -> None:
    assert outcomes_of("import time; time.sleep(60)", longest=0.5) == [Failure("no result after 0.5 s")]


def test_compiler_errors_are_reported() -> None:
    source, target = job()
    broken = replace(source, text=source.text.replace("tl.load", "tl.lod"))
    ((_, outcome),) = compile_all([(broken, target)])
    assert isinstance(outcome, Failure)
    assert "lod" in outcome.reason


def test_children_do_not_inherit_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    ((_, outcome),) = compile_all([job()])
    assert isinstance(outcome, CompiledBinary)


# --- rules


def case_of(stage: str = "forward", target: str = "sm_90") -> GateCase:
    return GateCase("causal", getattr(kernels_of("causal", target, 64), stage), target, 64, BF16)


FINE = Loop(instructions=500, products={"HGMMA": 8}, copies=2, waits=2, barriers=3)


def compiled(loop: Loop = FINE, shared: int = 1000, columns: int = 0, **code: int) -> CompiledBinary:
    of_loop = dict(loop.products)
    return CompiledBinary(MachineCode(products=of_loop, loops=(loop,), **code), shared, columns, 1.0, products=2)


@pytest.mark.parametrize(
    ("outcome", "reasons"),
    [
        (compiled(), []),
        (compiled(registers=255, stack=8), ["stack of 8 bytes"]),
        (compiled(registers=32, stack=80), ["stack of 80 bytes and only 32 registers"]),
        (compiled(spilled=3), ["3 registers spilled"]),
        (compiled(shared=228 * 1024), ["228.0 KiB of shared memory, the limit is 227"]),
        (compiled(columns=1024), ["1024 columns of tensor memory, the limit is 512"]),
        (compiled(replace(FINE, local_loads=1)), ["1 local loads in the loop of 500 instructions"]),
        (compiled(replace(FINE, copies=0)), ["no asynchronous copy in the loop of 500 instructions"]),
        (
            compiled(replace(FINE, copied=64)),
            ["8192 bytes copied through registers in the loop of 500 instructions, a tile is 8192"],
        ),
        (compiled(replace(FINE, copied=8)), []),
        (compiled(replace(FINE, waits=3)), ["3 waits for 2 products in the loop of 500 instructions"]),
        (compiled(replace(FINE, barriers=9)), ["9 barriers in the loop of 500 instructions"]),
        (compiled(replace(FINE, products={"HMMA": 8})), ["no HGMMA instruction"]),
        (
            compiled(replace(FINE, products={"HGMMA": 4, "HMMA": 8})),
            ["HMMA in place of HGMMA in the loop of 500 instructions"],
        ),
        (CompiledBinary(MachineCode(products={"HGMMA": 4}), 0, 0, 1.0), ["no loop with HGMMA instructions"]),
        (Failure("the compiler died"), ["the compiler died"]),
    ],
)
def test_rules(outcome: Outcome, reasons: list[str]) -> None:
    assert judge(case_of(), outcome) == reasons


def test_delta_needs_no_products() -> None:
    assert judge(case_of("delta"), CompiledBinary(MachineCode(), 0, 0, 1.0)) == []


def test_products_on_amd() -> None:
    case = case_of(target="gfx942")
    assert judge(case, CompiledBinary(MachineCode(products={"MFMA": 4}), 0, 0, 1.0)) == []
    assert judge(case, CompiledBinary(MachineCode(), 0, 0, 1.0)) == ["no MFMA instruction"]


TRITONS = """\
  %a = scf.for %i = %lo to %hi step %one iter_args(%s = %zero) -> (tensor<64xf32>) : i32 {
    %b = ttng.warp_group_dot %x, %y, %s {isAsync = true} : tensor<64xf32>
    %c = ttng.warp_group_dot_wait %b {pendings = 1 : i32} : tensor<64xf32>
    %d = scf.if %t -> (i32) {
      %e = ttng.warp_group_dot %x, %y, %c {isAsync = true} : tensor<64xf32>
    } else {
    } loc(#loc)
    scf.yield %c : tensor<64xf32>
  } loc(#loc1)
  %f = ttng.warp_group_dot %x, %y, %a {isAsync = true} : tensor<64xf32>
  scf.for %i = %lo to %hi step %one : i32 {
    scf.for %j = %lo to %hi step %one : i32 {
      %g = ttng.warp_group_dot %x, %y, %s {isAsync = true} : tensor<64xf32>
    }
    %h = ttng.warp_group_dot %x, %y, %s {isAsync = true} : tensor<64xf32>
  }
"""


def test_products_of_a_loop() -> None:
    assert products_of_loops(TRITONS) == 2
    assert products_of_loops(TRITONS.partition("  %f")[2]) == 1
    assert products_of_loops("x = tl.dot(a, b)") == 0


def test_xdist_keeps_this_file_in_one_worker(request: pytest.FixtureRequest) -> None:
    """Otherwise every worker compiles all kernels; pytest 9.2 ignores the names that xdist 3.8 gives to groups."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@compiling")
