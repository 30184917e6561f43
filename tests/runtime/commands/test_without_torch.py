"""Without torch installed: commands that need no torch run, and every other command and function names the remedy."""

from __future__ import annotations

import json
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


PLAIN = [
    ["same", "causal", "sliding_window"],
    ["same", "alibi", "alibi", "--json"],
    ["same", "neighborhood_2d", "full", "-p", "height=8", "-p", "width=8"],
    ["same", "mamba_mixer", "mamba_mixer"],
    ["same", "hybrid_window_linear", "causal", "--relation"],
    ["show", "sliding_window", "-p", "window=9"],
    ["show", "alibi", "--json"],
    ["show", "document", "--input", "doc=[0,0,0,1,1,1,1,2]", "--len", "8"],
    ["show", "neighborhood_2d", "--grid", "8,8"],
    ["show", "sliding_window", "--len", "5000", "--tiles"],
    ["show", "sliding_window", "-o", "picture.svg"],
    ["receptive", "sliding_window", "-p", "window=8", "--len", "128", "--path", "0"],
    ["receptive", "hybrid_window_linear", "--len", "128", "--json"],
    ["receptive", "gla", "--len", "64"],
    ["receptive", "neighborhood_2d", "--grid", "8,8"],
    ["simulate", "sliding_window", "--len", "2048", "--json"],
    ["simulate", "hybrid_window_linear", "--len", "2048"],
    ["simulate", "gla", "--len", "2048", "--dtype", "bf16"],
    ["simulate", "neighborhood_2d", "--grid", "32,32"],
    ["simulate", "moba", "--len", "2048"],
    ["emit", "causal"],
    ["emit", "neighborhood_2d", "-p", "height=8", "-p", "width=8", "--target", "sm_80", "-o", "kernels.py"],
    ["emit", "gla"],
]
"""Commands for which torch does no work: masks, grids, hybrids, recurrences, documents, selections."""
OBEY = f"""
import contextlib, io, json, sys
from pathlib import Path
from attnc.runtime.cli import main
def obeyed(command):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command)
    return status, out.getvalue(), err.getvalue()
found = [obeyed(command) for command in {PLAIN!r}]
found += [Path(name).read_text(encoding="utf-8") for name in ("picture.svg", "kernels.py")]
assert "torch" not in sys.modules
print(json.dumps(found))
"""


def run(code: str, folder: Path, stdin: str = "", *, before: str = BLOCKED) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATTNC_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", before + code]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )


def test_commands_that_need_no_torch_run_without_it(tmp_path: Path) -> None:
    """A single process runs all commands, because starting Python takes most of the time."""
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


def test_library_commands_run_without_torch(tmp_path: Path) -> None:
    """The output is the same with torch installed, and torch is not imported then."""
    without, beside = (run(OBEY, tmp_path, before=before) for before in (BLOCKED, ""))
    assert without.stderr == beside.stderr == ""
    outputs = json.loads(without.stdout)
    assert outputs == json.loads(beside.stdout)
    assert [command_output[0] for command_output in outputs[: len(PLAIN)]] == [1, 0, 1, 0, 2, *[0] * 17, 2]
    assert "`attnc emit` does not support recurrences" in outputs[len(PLAIN) - 1][2]


def test_errors_name_the_part_that_needs_torch(tmp_path: Path) -> None:
    needs = {
        "show gla": "a picture of `gla`, whose states are measured,",
        "show moba": "a picture of what `moba` selects by content",
        "same alibi causal": "comparing `alibi` and `causal` by the results of drawn calls",
        "simulate causal --device cpu": "a simulation on this CPU, whose rates are those of torch's kernels,",
        "simulate gla -o page.html": "a report of `gla`, whose states are measured,",
        "emit causal --binaries kernels.zip": "`attnc emit --binaries`, which compiles what calls of torch run,",
        "tune causal": "`attnc tune`",
    }
    code = f"from attnc.runtime.cli import main\nprint([main(one.split()) for one in {list(needs)!r}])"
    done = run(code, tmp_path)
    assert done.stdout == f"{[2] * len(needs)}\n"
    remedy = "needs torch, which is not installed: `pip install torch`"
    assert done.stderr.splitlines() == [f"error: {what} {remedy}" for what in needs.values()]


def test_missing_torch_errors_name_the_remedy(tmp_path: Path) -> None:
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


def test_other_missing_modules_are_not_blamed_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc.runtime import cli

    def missing(command: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(cli, "_module", missing)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        cli.main(["list"])
