"""`attnc doctor --targets` without a compiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from attnc.runtime.cli import main
from attnc.runtime.toolchain.compiling import (
    CompiledBinary,
    Failure,
    Job,
    Outcome,
)
from attnc.runtime.toolchain.machine_code import Loop, MachineCode
from command_calls import run_json

pytest.importorskip("triton")

LOOP = Loop(instructions=500, products={"HGMMA": 8}, copies=2, waits=2, barriers=3, exponentials=64, overlapped=60)


def compile_none(jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Outcome]]:
    """Report success for every kernel but the gradient of q, whose compiler aborts."""
    del processes
    for i, (source, _) in enumerate(jobs):
        fine = CompiledBinary(
            MachineCode(registers=168, products={"HGMMA": 8}, loops=(LOOP,)), 65536, 0, 1.0, products=2
        )
        yield i, Failure("the compiler died (SIGABRT)") if source.stage == "dq" else fine


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.runtime.commands.doctor.compile_all", compile_none)


def test_a_kernel_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--targets", "sm_90", "--patterns", "causal,combiner", "--head-dims", "64"]) == 1
    out = capsys.readouterr().out
    assert "combiner(segment=64): summary: keys that the pattern computes" in out
    assert "[500, ex2 64, 60 under]  causal" in out
    assert "causal: the compiler died (SIGABRT)" in out
    assert out.endswith("12 kernels, 2 rejected\n")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "doctor", "--targets", "sm_90,sm_80", "--patterns", "causal", "--head-dims", "64")
    assert status == 1
    rows = values["kernels"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["kernel"] for row in rows} == {"forward", "dq", "dkdv", "dkdv of groups", "delta", "decode", "merge"}
    (forward,) = [row for row in rows if row["kernel"] == "forward" and row["target"] == "sm_90"]
    assert forward["loops"][0]["ex2_under_products"] == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "sm_91"], "--targets sm_91: did you mean `sm_90`?"),
        (["--targets", ""], "--targets : write names separated by commas"),
        (["--targets", "sm_90", "--patterns", "casual"], "the library has no pattern `casual`: did you mean `causal`?"),
        (["--targets", "sm_90", "--head-dims", "64,x"], "--head-dims 64,x: write whole numbers separated by commas"),
        (["--targets", "sm_90", "--dtypes", "fp8"], "--dtypes fp8: "),
        (["--targets", "sm_90", "--processes", "0"], "--processes 0: give a whole number, at least 1"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("attnc.runtime.commands.doctor.find_spec", lambda name: None)
    assert main(["doctor", "--targets", "sm_90"]) == 2
    assert "triton is not installed; `pip install 'attnc[gpu]'` installs it" in capsys.readouterr().err
