"""Results say where they come from, and come from commits: sources with changes are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import benchmark_part
import provenance
import pytest
import timing
from provenance import UncommittedError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

BEFORE_THE_RULE = frozenset(
    {
        *("cpu-block_masks.json", "cpu-compile.json", "cpu-decode.json", "cpu-plan.json", "cpu-weights.json"),
        *("kernels-library-triton-3.7.1.json", "kernels-routing-triton-3.7.1.json", "kernels-triton-3.6.0.json"),
        *("kernels-triton-3.7.1.json", "kernels-triton-3.9.0.json", "soak.json"),
    }
)
"""Results that were written from trees with changes while that was allowed. None is added."""


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_has_provenance(path: Path) -> None:
    facts = json.loads(path.read_text(encoding="utf-8"))
    for name in ("torch", "triton", "python", "commit", "device", "date", "command"):
        assert facts.get(name), f"{path.name} has no {name}"
    assert path.name in BEFORE_THE_RULE or not facts["commit"].endswith("-dirty")


def test_no_more_results_are_excused() -> None:
    assert len(BEFORE_THE_RULE) <= 11
    assert {path.name for path in RESULTS.glob("*.json")} >= BEFORE_THE_RULE


# --- a repository ----------------------------------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *own, *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("compiler", "benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("a", encoding="utf-8")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "a")
    monkeypatch.setattr(provenance.changed, "__defaults__", (tmp_path,))
    monkeypatch.setattr(provenance.refuse_uncommitted, "__defaults__", (tmp_path,))
    monkeypatch.setattr(provenance.commit, "__defaults__", (tmp_path,))
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_a_result_of_a_commit_is_written(repository: Path) -> None:
    (repository / "benchmarks" / "results" / "a.txt").write_text("another result", encoding="utf-8")
    (repository / "docs" / "performance.md").write_text("generated", encoding="utf-8")
    (repository / "notes.txt").write_text("no source", encoding="utf-8")
    assert provenance.header()["commit"] == git(repository, "rev-parse", "--short", "HEAD")
    path = timing.save("cpu-x", [{"ms": 1}], provenance.header())
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == [{"ms": 1}]


@pytest.mark.parametrize("file", ["compiler/a.txt", "compiler/new.txt"])
def test_a_result_of_a_tree_with_changes_is_refused(repository: Path, file: str) -> None:
    (repository / file).write_text("changed", encoding="utf-8")
    assert str(provenance.header()["commit"]).endswith("-dirty")
    with pytest.raises(UncommittedError, match=rf"not written: commit {file} first"):
        timing.save("cpu-x", [{"ms": 1}], {})
    assert not (timing.RESULTS / "cpu-x.json").exists()


def test_a_part_is_refused_before_it_runs(repository: Path) -> None:
    (repository / "compiler" / "a.txt").write_text("changed", encoding="utf-8")

    own = benchmark_part.Part("cpu-x", "x", "x", "x:y", 1.0)
    with pytest.raises(UncommittedError, match=r"commit compiler/a\.txt first"):
        benchmark_part.run(own, benchmark_part.Setting("cpu", toy=False), own.file(toy=False))
