"""Record the provenance of a result (versions, machine, commit, date, command) and refuse uncommitted sources."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COMMIT = "ATTNC_BENCHMARK_COMMIT"
"""Variable that names the commit if git is not available, as on a machine that only has the files."""

WRITTEN = ("benchmarks/results", "docs")
"""Folders of results and generated files: changes in them do not affect results."""


SOURCES = ("spec", "compiler", "runtime", "stdlib_patterns", "src", "benchmarks", "tests")
"""Folders in which a new file may affect a result."""


class UncommittedError(Exception):
    """A result would name a commit whose sources differ."""


def header() -> dict[str, object]:
    """Return versions, machine, commit, date, command and load: what a figure needs to be believed."""
    from attnc.runtime.disk.machine_key import cpu_name, installed

    return {
        "torch": installed("torch"),
        "triton": installed("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "device": f"cpu: {cpu_name()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "load_before": os.getloadavg()[0],
    }


def commit(root: Path = ROOT) -> str:
    """Return the commit that is checked out, with `-dirty` where sources differ from it."""
    version = _git(root, "describe", "--always")
    if not version:
        return os.environ.get(COMMIT, "unknown")
    return f"{version}-dirty" if changed(root) else version


def changed(root: Path = ROOT) -> list[str]:
    """Return the files that differ from the commit, including new ones; none without git."""
    excluded = [f":(exclude){folder}" for folder in WRITTEN]
    tracked = _git(root, "diff", "--name-only", "HEAD", "--", ".", *excluded)
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", *SOURCES, *excluded)
    return [*tracked.splitlines(), *new.splitlines()]


def refuse_uncommitted(root: Path = ROOT) -> None:
    """Raise UncommittedError where sources differ from the commit that a result would name."""
    files = changed(root)
    if files:
        listed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise UncommittedError(
            f"a result from uncommitted sources cannot be repeated, and is not written: commit {listed} first "
            f"(changes in {' and '.join(WRITTEN)} do not count)"
        )


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
