"""Emitted files run with only torch and triton installed, and agree with the reference that they contain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from attnc import compile_attention
from attnc.runtime.cli import main

pytest.importorskip("triton")

FILES: list[tuple[str, list[str], list[str]]] = [
    ("sliding_window", ["window=40", "sinks=4"], ["--target", "sm_90", "--dtype", "float16"]),
    ("causal", [], ["--target", "sm_80", "--head-dim", "24", "--value-dim", "40", "--dtype", "float32"]),
    ("alibi", [], ["--target", "sm_80", "--dtype", "float32"]),
    ("softcap", ["cap=2", "window=40"], ["--target", "sm_100", "--dtype", "float32"]),
    ("moa", ["alpha=[16,32,16,32]", "beta=[0.25,0.125,0,1]", "block=16"], ["--target", "gfx942", "--dtype", "float16"]),
    ("neighborhood_2d", ["height=8", "width=12", "window=[3,5]"], ["--target", "sm_90", "--dtype", "float32"]),
]


def emit(name: str, params: list[str], options: list[str], out: Path) -> int:
    parameters = [part for param in params for part in ("-p", param)]
    return main(["emit", name, *parameters, *options, "-o", str(out)])


@pytest.fixture(scope="module")
def isolated_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with torch, triton and their dependencies alone; Triton's interpreter also needs numpy."""
    folder = tmp_path_factory.mktemp("site")
    wanted, visited = ["torch", "triton", "numpy"], set()
    while wanted:
        name = wanted.pop()
        if name in visited:
            continue
        visited.add(name)
        package = distribution(name)
        needed = map(Requirement, package.requires or ())
        wanted += [
            requirement.name
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
        for file in package.files or ():
            top = Path(file).parts[0]
            source = Path(str(package.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    assert not (folder / "attnc").exists()
    assert not list(folder.glob("*attnc*"))
    return folder


def run(file: Path, isolated_packages: Path) -> subprocess.CompletedProcess[str]:
    """Run a file in a Python that sees its standard library and `isolated_packages` alone."""
    start = f"import sys; sys.path.append({str(isolated_packages)!r}); import runpy; sys.argv = [{str(file)!r}]; "
    code = start + f"runpy.run_path({str(file)!r}, run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=file.parent)


@pytest.mark.parametrize(("name", "params", "options"), FILES, ids=[name for name, *_ in FILES])
def test_a_file_checks_itself(
    name: str,
    params: list[str],
    options: list[str],
    tmp_path: Path,
    isolated_packages: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "kernel.py"
    assert emit(name, params, options, file) == 0
    assert f"`python {file}` checks it" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "import attnc" not in text
    assert "from attnc" not in text
    done = run(file, isolated_packages)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("the kernels agree with the reference\n")
    assert len(re.findall(r"(out|dq|dk|dv) +differs by", done.stdout)) == (8 if name == "neighborhood_2d" else 24)


def test_attnc_is_not_importable(isolated_packages: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.py"
    file.write_text("import torch, triton\nimport attnc\n", encoding="utf-8")
    done = run(file, isolated_packages)
    assert "No module named 'attnc'" in done.stderr


def test_a_wrong_file_reports_its_error(tmp_path: Path, isolated_packages: Path) -> None:
    file = tmp_path / "kernel.py"
    assert emit("sliding_window", ["window=40"], ["--target", "sm_80", "--dtype", "float32"], file) == 0
    text = file.read_text(encoding="utf-8")
    assert text.count("query - 39") == 2
    file.write_text(text.replace("query - 39", "query - 38", 1), encoding="utf-8")  # changes the forward kernel alone
    done = run(file, isolated_packages)
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert "results are wrong" in done.stdout


def test_equal_arguments_write_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.py" for i in range(2)]
    for i, file in enumerate(files):
        code = f"from attnc.runtime.cli import main; main(['emit', 'alibi', '-o', {str(file)!r}])"
        environment = {**os.environ, "PYTHONHASHSEED": str(i)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text(encoding="utf-8")
    assert "`attnc emit alibi --target sm_90 --head-dim 64 --dtype bfloat16`" in text
    assert compile_attention("alibi").bound.program.source.text.strip().splitlines()[0] in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["power"], "`attnc emit` does not support tiles that are listed"),
        (["document"], "inputs besides q, k and v"),
        (["fox"], "score terms that read inputs"),
        (["differential"], "several attentions"),
        (["causal", "--target", "sm_91"], "did you mean `sm_90`"),
        (["causal", "--dtype", "bf16"], "--dtype bf16"),
        (["causal", "--head-dim", "0"], "--head-dim 0: give a whole number, at least 1"),
        (["causal", "-o", "kernel.txt"], "-o kernel.txt: the file is Python"),
    ],
)
def test_errors_of_emit(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_to_stdout_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", "causal"]) == 0
    text = capsys.readouterr().out
    assert text.startswith('"""causal: attention as one file')
    assert main(["emit", "causal", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text


def test_a_failed_write_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emit("causal", [], [], tmp_path / "missing" / "kernel.py") == 2
    assert "missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
