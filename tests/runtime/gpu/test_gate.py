"""Kernels compiled for GPUs that are not here: their machine code passes the rules, and what is wrong is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from attnc.compiler.kernels.forward import emit_forward
from attnc.compiler.kernels.kernels import Heads, Kernels, find_kernels
from attnc.compiler.kernels.source import KernelSource
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.simulation.gpu_clocks import TileShape
from attnc.runtime.gpu.compiling import Compiled, Failure, Outcome, compile_all
from attnc.runtime.gpu.gate import Case, dots_of_loops, judge
from attnc.runtime.gpu.machine_code import Loop, MachineCode
from plan_calls import from_library

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("compiling")

BF16 = "bfloat16"

CASES: list[tuple[str, dict[str, Any], int, str, tuple[str, ...]]] = [
    ("causal", {}, 128, "sm_90", ("forward", "dq", "dkdv", "delta")),
    ("causal", {}, 64, "sm_90", ("forward",)),
    ("causal", {}, 128, "sm_80", ("forward", "dq", "dkdv")),
    ("sliding_window", {"window": 512, "sinks": 4}, 64, "sm_90", ("dq",)),
    ("sliding_window", {"window": 512, "sinks": 4}, 128, "sm_80", ("forward",)),
    ("document", {}, 64, "sm_90", ("forward", "dkdv")),
    ("power", {}, 64, "sm_90", ("forward", "dkdv")),
    ("power", {}, 64, "sm_80", ("dq",)),
    ("softcap", {}, 64, "sm_90", ("dq",)),
    ("gpt_oss", {}, 64, "sm_90", ("forward",)),
    ("fox", {}, 64, "sm_90", ("forward", "dq")),
    ("alibi", {}, 64, "sm_90", ("dkdv",)),
    ("t5", {}, 64, "sm_90", ("forward",)),
    ("graphormer", {}, 64, "sm_80", ("forward",)),
    ("neighborhood_2d", {"height": 64, "width": 64, "window": [13, 13]}, 128, "sm_90", ("forward", "dq", "dkdv")),
]

KNOWN = {"fox dq sm_90": "12 waits for 3 products"}
"""What fails today: the assembler waits for each product by itself. Whoever mends it takes it out."""


def kernels_of(name: str, target: str, head_dim: int, /, **values: object) -> Kernels:
    return find_kernels(from_library(name, **values), Heads(head_dim, head_dim, BF16), TARGETS[target])


def made() -> Iterator[Case]:
    for name, values, head_dim, target, stages in CASES:
        kernels = kernels_of(name, target, head_dim, **values)
        for stage in stages:
            yield Case(name, getattr(kernels, stage), target, head_dim, BF16)


def spilling() -> Case:
    problem = kernels_of("causal", "sm_90", 128).problem
    return Case("causal, too large", emit_forward(problem, TileShape(256, 128, 4, 3)), "sm_90", 128, BF16)


@pytest.fixture(scope="module")
def outcomes() -> dict[int, tuple[Case, Outcome]]:
    """All kernels, and last the one that is too large, compiled once."""
    cases = [*made(), spilling()]
    return {i: (cases[i], found) for i, found in compile_all([(c.source, c.target) for c in cases], processes=2)}


@pytest.mark.slow
def test_kernels_pass(outcomes: dict[int, tuple[Case, Outcome]]) -> None:
    judged = {i: judge(case, found) for i, (case, found) in sorted(outcomes.items())}
    last = max(judged)
    wrong = {
        f"{outcomes[i][0].pattern} {outcomes[i][0].stage} {outcomes[i][0].target}": reasons
        for i, reasons in judged.items()
        if reasons and i != last
    }
    assert wrong.keys() == KNOWN.keys(), wrong
    assert all(wrong[name][0].startswith(reason) for name, reason in KNOWN.items())


@pytest.mark.slow
def test_values_one_tile_late_are_multiplied_under_the_softmax(outcomes: dict[int, tuple[Case, Outcome]]) -> None:
    case, found = outcomes[0]
    assert (case.pattern, case.stage, case.target, case.head_dim) == ("causal", "forward", "sm_90", 128)
    assert isinstance(found, Compiled)
    assert any(loop.overlapped for loop in found.code.loops)


@pytest.mark.slow
def test_a_kernel_that_is_too_large_fails(outcomes: dict[int, tuple[Case, Outcome]]) -> None:
    reasons = judge(*outcomes[max(outcomes)])
    assert any(reason.startswith("stack of ") for reason in reasons)


# --- children


def job() -> tuple[KernelSource, str]:
    return kernels_of("causal", "sm_90", 64).delta, "sm_90"


def only(text: str, longest: float = 60.0, count: int = 1) -> list[Outcome]:
    jobs = [job()] * count
    return [found for _, found in compile_all(jobs, 1, text, longest)]


def test_a_child_that_aborts_is_told_with_its_last_line() -> None:
    text = (
        "import os, sys, pickle; pickle.load(sys.stdin.buffer); "
        "print('a note', file=sys.stderr); print('LLVM ERROR: no such thing', file=sys.stderr); "
        "print(' #0 0x00007f', file=sys.stderr, flush=True); os.abort()"
    )
    expected = Failure("the compiler died (SIGABRT): LLVM ERROR: no such thing")
    assert only(text, count=2) == [expected, expected]  # the next kernel gets a child of its own


def test_a_child_that_leaves_is_told() -> None:
    assert only("import sys; sys.exit('error: out of luck')") == [
        Failure("the compiler died (status 1): error: out of luck")
    ]


def test_a_child_that_hangs_is_ended() -> None:
    assert only("import time; time.sleep(60)", longest=0.5) == [Failure("no end after 0.5 s")]


def test_what_a_compiler_raises_is_told() -> None:
    source, target = job()
    broken = replace(source, text=source.text.replace("tl.load", "tl.lod"))
    ((_, found),) = compile_all([(broken, target)])
    assert isinstance(found, Failure)
    assert "lod" in found.reason


def test_the_interpreter_of_a_test_does_not_reach_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    ((_, found),) = compile_all([job()])
    assert isinstance(found, Compiled)


# --- rules


def case_of(stage: str = "forward", target: str = "sm_90") -> Case:
    return Case("causal", getattr(kernels_of("causal", target, 64), stage), target, 64, BF16)


FINE = Loop(instructions=500, products={"HGMMA": 8}, copies=2, waits=2, barriers=3)


def compiled(loop: Loop = FINE, shared: int = 1000, columns: int = 0, **code: int) -> Compiled:
    of_loop = dict(loop.products)
    return Compiled(MachineCode(products=of_loop, loops=(loop,), **code), shared, columns, 1.0)


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        (compiled(), []),
        (compiled(registers=255, stack=8), ["stack of 8 bytes"]),
        (compiled(registers=32, stack=80), ["stack of 80 bytes and only 32 registers"]),
        (compiled(spilled=3), ["3 registers spilled"]),
        (compiled(shared=228 * 1024), ["228.0 KiB of shared memory, there are 227"]),
        (compiled(columns=1024), ["1024 columns of tensor memory, there are 512"]),
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
        (Compiled(MachineCode(products={"HGMMA": 4}), 0, 0, 1.0), ["no loop with HGMMA instructions"]),
        (Failure("the compiler died"), ["the compiler died"]),
    ],
)
def test_rules(found: Outcome, reasons: list[str]) -> None:
    assert judge(case_of(), found) == reasons


def test_delta_needs_no_products() -> None:
    assert judge(case_of("delta"), Compiled(MachineCode(), 0, 0, 1.0)) == []


def test_products_on_amd() -> None:
    case = case_of(target="gfx942")
    assert judge(case, Compiled(MachineCode(products={"MFMA": 4}), 0, 0, 1.0)) == []
    assert judge(case, Compiled(MachineCode(), 0, 0, 1.0)) == ["no MFMA instruction"]


def test_products_of_a_loop() -> None:
    assert dots_of_loops(case_of().source.text) == 2
    assert dots_of_loops(case_of("dkdv").source.text) == 4
    assert dots_of_loops("x = tl.dot(a, b)") == 0
