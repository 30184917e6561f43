"""The option `tune`: valid values, compiled graphs, failing disks, kernels."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc import ArgumentError, ArgumentTypeError, compile_attention
from attnc.runtime.choices.records import MODEL
from attnc.runtime.disk.store import store
from attnc.runtime.tuning import timer
from tuned_calls import TIME, record_of, vectors


@pytest.mark.parametrize(
    "tune", ["fast", "2 hours", "-1s", "", "1e3s", -1.0, float("nan"), float("inf"), "9" * 400 + "s"]
)
def test_invalid_values(tune: Any) -> None:
    with pytest.raises(ArgumentError, match="tune is"):
        compile_attention("causal", tune=tune)


@pytest.mark.parametrize("tune", [None, True, ["2s"]])
def test_values_of_a_wrong_type(tune: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="tune is"):
        compile_attention("causal", tune=tune)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nothing\.json cannot be read: No such file"):
        compile_attention("causal", tune=tmp_path / "nothing.json")
    with pytest.raises(ArgumentError, match="no schedule to tune"):
        compile_attention("causal", backend="reference", tune="2s")
    with pytest.raises(ArgumentError, match="with a time to measure in"):
        compile_attention("causal").tune(*vectors())


def test_compiled_graphs_use_known_choices_without_measuring(
    clock: Callable[[dict[str, float]], None], runs: list[str]
) -> None:
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    first = compiled(q, k, v)
    assert (runs, store().entries()) == ([], [])
    out = attend(q, k, v)
    assert record_of(attend).choices[""] != MODEL
    assert torch.equal(compiled(q, k, v), out)
    assert torch.allclose(first, out, atol=1e-5)


def test_autocast_with_a_failing_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A choice that cannot be stored on disk is kept in the process."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "file"))
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*vectors())
    assert out.dtype == torch.bfloat16
    plan = attend.plan(300, heads=2, head_dim=16, dtype=torch.bfloat16)
    assert "tuned for q512-k512-lanes2-square" in plan.reasons[0]


STEPS = ("mkdir", "stat", "open", "scandir", "replace", "unlink", "chmod", "fdopen")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=["full", "read-only", "forbidden"])
@pytest.mark.parametrize("step", STEPS)
def test_calls_work_with_any_failing_system_function(
    step: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Every call of one system function on the cache's folder fails, from the first call on."""
    real = getattr(os, step)

    def refuse(*args: Any, **options: Any) -> Any:
        if step == "fdopen" or (args and str(tmp_path) in os.fspath(args[0])):
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    with monkeypatch.context() as patched:
        patched.setattr(os, step, refuse)
        out = attend(q, k, v)
        again = attend(q, k, v)
        reasons = attend.plan(300, heads=2, head_dim=16).reasons
    assert torch.equal(out, again)
    assert torch.allclose(out, attend.reference(q, k, v), atol=1e-5)
    assert "tuned for q512-k512-lanes2-square" in reasons[0], "what was measured counts in this process"
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("attnc.runtime.disk")]
    assert len(warned) <= 1


def test_tiles_of_kernels_are_tried(monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None]) -> None:
    """Runs in the interpreter and does what a GPU would do, except for the times."""
    pytest.importorskip("triton")
    monkeypatch.setattr("attnc.runtime.tuning.knobs.FIRST", 2)
    monkeypatch.setattr(timer, "MOST", 7)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=20, backend="triton", tune="60s")
    q, k, v = vectors(40, 1, gradients=True)
    out = attend(q, k, v)
    record = record_of(attend)
    assert dict(record.key.parts)["executor"] == "triton"
    assert {trial.knob for trial in record.trials} == {"forward", "dq", "dkdv"}
    assert all(choice != MODEL for choice in record.choices.values())
    assert any(trial.predicted is not None for trial in record.trials)
    assert torch.allclose(out, attend.reference(q, k, v), atol=1e-4)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    wanted = torch.autograd.grad(attend.reference(q, k, v).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(grads, wanted, strict=True))
    plan = str(attend.plan(40, head_dim=16, device="cuda"))
    for stage, choice in record.choices.items():
        assert choice == MODEL or f"sliding_window_{stage}: tiles of {choice}" in plan


def test_a_process_without_a_home_folder() -> None:
    """A process without a home folder tunes, and reports once that nothing is stored."""
    text = "from attnc import compile_attention; import torch\n"
    text += "a = compile_attention('sliding_window', window=40, tune='60s')\n"
    text += "[a(*(torch.randn(1, 2, n, 16) for _ in range(3))) for n in (100, 300, 900)]"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/nonexistent/home", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    if os.getuid() == 0:
        assert "Traceback" not in done.stderr
    else:
        assert done.stderr.count("only time is lost") == 1
