"""The examples run, each as a newcomer would start it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from attnc import compile_attention

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "PYTHONIOENCODING": "utf-8"},
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
    assert len(re.findall(r"times as (fast|SLOW)", done.stdout)) == 2
    assert "training 12/12" in done.stderr, "progress is shown without a terminal too"


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


def test_recurrence(tmp_path: Path) -> None:
    done = run("recurrence.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a scalar decay, delta rule" in done.stdout


def test_papers(tmp_path: Path) -> None:
    done = run("papers.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("differs from the dense reference by") == 7


@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("diffusers")),
    reason="Transformers and Diffusers are not installed: pip install 'attnc[interop]'",
)
def test_hugging_face(tmp_path: Path) -> None:
    done = run("hugging_face.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in one batch: as each alone" in done.stdout
    assert "is causal and `full` shows more" in done.stdout


ONE_EACH = sorted(path for path in EXAMPLES.glob("*.attn") if path.stem != "papers")


@pytest.mark.parametrize("path", ONE_EACH, ids=lambda path: path.stem)
def test_patterns_compile(path: Path) -> None:
    attend = compile_attention(path)
    assert attend.name == path.stem
    assert attend.mask(40).any(dim=-1).all()
    assert attend.plan(40, heads=2).schedule == "pieces"
