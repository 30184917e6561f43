"""Where torch is not installed: commands that need none run, the others and the interface say what helps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
GOOD = "pattern near\n    align   end\n    visible 0 <= q - k < 9\n"


def run(code: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATTNC_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )


def test_commands_that_need_no_torch_run_without_it(tmp_path: Path) -> None:
    """One process for all: starting Python is what takes time."""
    (tmp_path / "near.attn").write_text(GOOD, encoding="utf-8")
    commands = [
        ["explain", "W001"],
        ["explain"],
        ["cache", "path"],
        ["cache", "show"],
        ["cache", "clear"],
        ["check", "near.attn"],
        ["check", "-"],
        ["fmt", "--check", "near.attn"],
        ["list", "scores"],
        [],
    ]
    code = f"from attnc.runtime.cli import main\nprint([main(one) for one in {commands!r}])"
    done = run(code, tmp_path, GOOD)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == str([0] * len(commands))


def test_what_needs_torch_says_what_helps(tmp_path: Path) -> None:
    code = """
import attnc
from attnc.runtime.cli import main
print(main(["verify", "causal"]), main(["doctor", "--json"]))
for use in (lambda: attnc.compile_attention, lambda: attnc.merge):
    try:
        use()
    except attnc.TorchMissingError as error:
        print(isinstance(error, ImportError), error)
"""
    done = run(code, tmp_path)
    remedy = "needs torch, which is not installed: `pip install torch`"
    assert done.stderr.splitlines() == [f"error: `attnc verify` {remedy}"]
    assert "`attnc doctor` needs torch" in done.stdout
    assert "2 2\n" in done.stdout
    for name in ("compile_attention", "merge"):
        assert f"True `attnc.{name}` {remedy}" in done.stdout


def test_another_module_that_is_missing_is_no_matter_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc.runtime import cli

    def missing(command: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(cli, "_module", missing)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        cli.main(["list"])
