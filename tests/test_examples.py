"""The examples run as a newcomer would start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from attnc import compile_attention

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example without the tests' environment, but with their number of threads: beside other workers, two
    threads on two cores mostly wait for each other."""
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "PYTHONIOENCODING": "utf-8", **threads},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def test_byte_lm(tmp_path: Path) -> None:
    done = run("byte_lm.py", "--quick", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pattern sliding_window(window: int = 256)" in done.stdout
    assert "executor cpu: pieces" in done.stdout
    assert str(tmp_path / "byte_lm.svg") in done.stdout
    assert (tmp_path / "byte_lm.svg").read_text(encoding="utf-8").startswith("<svg")
    for rival in ("SDPA with the mask", "causal SDPA"):
        said = re.findall(rf"attnc against {rival}: (.*)", done.stdout)
        assert len(said) == 3
        assert all(re.match(r"[\d.]+ times as (fast|SLOW) \(|no ratio: |no difference beyond", one) for one in said)
    assert "compiled FlexAttention: left out of --quick" in done.stdout
    assert "trained for all 12 steps" in done.stdout
    assert "training 12/12" in done.stderr, "progress must be shown without a terminal too"


def byte_lm() -> ModuleType:
    spec = spec_from_file_location("byte_lm", EXAMPLES / "byte_lm.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["byte_lm"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1.0, 1.0, 1.0], [2.0, 2.1, 1.9], "2.00 times as fast (1.90 to 2.10)"),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.25], "2.00 times as SLOW (1.60 to 2.00)"),
        (
            [1.0, 1.0, 1.0],
            [1.1, 3.0, 0.9],
            "no ratio: it differs between runs by more than itself; the machine is busy",
        ),
        ([1.0, 1.0, 1.0], [1.1, 1.05, 0.95], "no difference beyond the spread (0.95 to 1.10)"),
        ([1.0], [2.0], "no ratio: one run says nothing of the spread"),
    ],
)
def test_byte_lm_prints_no_ratio_that_the_spread_hides(ours: list[float], theirs: list[float], said: str) -> None:
    assert byte_lm().ratio_text(ours, theirs) == said


def test_byte_lm_says_why_it_stops() -> None:
    demo = byte_lm()
    assert demo.why_it_ended(200, demo.Config()) == "trained for all 200 steps"
    assert demo.why_it_ended(156, demo.Config()) == (
        "training stopped at step 156 of 200: it may take 77 s of the 140 s for everything, and this machine is "
        "slower or busy; --budget 280 gives it twice the time"
    )


def test_byte_lm_compares_with_flex_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiled FlexAttention is measured if torch can compile it; otherwise a line says why not."""
    demo = byte_lm()
    attention = object()
    monkeypatch.setattr(demo, "flex", lambda config: attention)
    rivals = demo.forward_rivals(demo.Config(), {"attnc": None}, quick=False)
    assert rivals == {"attnc": None, "compiled FlexAttention": attention}

    def fails(config: object) -> object:
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(demo, "flex", fails)
    assert demo.forward_rivals(demo.Config(), {"attnc": None}, quick=False) == {"attnc": None}
    assert "compiled FlexAttention: torch does not compile it here: no C++ compiler\n" in capsys.readouterr().out


def test_byte_lm_says_when_the_loss_does_not_fall(tmp_path: Path) -> None:
    done = run("byte_lm.py", "--quick", "--steps", "1", folder=tmp_path)
    assert done.returncode == 1
    assert "the loss did not fall" in done.stderr


def test_engineer(tmp_path: Path) -> None:
    done = run("engineer.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_serving(tmp_path: Path) -> None:
    done = run("serving.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from a ring of 1028 slots (the first 4 and the last 1024 tokens)" in done.stdout


@pytest.mark.slow
def test_recurrence(tmp_path: Path) -> None:
    done = run("recurrence.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a scalar decay, delta rule" in done.stdout


def test_papers(tmp_path: Path) -> None:
    done = run("papers.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("differs from the dense reference by") == 7


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("diffusers")),
    reason="Transformers and Diffusers are not installed: pip install 'attnc[interop]'",
)
def test_hugging_face(tmp_path: Path) -> None:
    done = run("hugging_face.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in one batch: as each alone" in done.stdout
    assert "is causal, and `full` shows more" in done.stdout


ONE_EACH = sorted(path for path in EXAMPLES.glob("*.attn") if path.stem != "papers")


@pytest.mark.parametrize("path", ONE_EACH, ids=lambda path: path.stem)
def test_patterns_compile(path: Path) -> None:
    attend = compile_attention(path)
    assert attend.name == path.stem
    assert attend.mask(40).any(dim=-1).all()
    assert attend.plan(40, heads=2).schedule == "pieces"
