"""Log messages and when they are shown, and no escape codes where colour is not wanted."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.cli import COMMANDS, main
from attnc.runtime.commands import console
from attnc.runtime.process import environment
from attnc.runtime.process.environment import VARIABLES
from command_calls import BAD

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import torch
from attnc import compile_attention
x = torch.randn(1, 1, 64, 8)
compile_attention("causal")(x, x, x[..., :4])
ids = torch.randint(0, 1000, (8192,))
y = torch.randn(1, 1, 8192, 8)
equal = compile_attention("pattern equal\\n    input x: int[token]\\n    visible x[q] == x[k]\\n")
for _ in range(2):
    equal(y, y, y, x=ids)
"""


def run(code: str, **variables: str) -> str:
    """Run code in another process and return what it writes to stderr."""
    variables_of_process = {name: x for name, x in os.environ.items() if name not in ("TORCH_LOGS", "TRITON_INTERPRET")}
    variables_of_process |= {"PYTHONPATH": str(ROOT / "src"), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables_of_process, capture_output=True, text=True, check=True
    )
    return done.stderr


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_only_slow_paths_are_logged_by_default() -> None:
    lines = run(CODE).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("`equal`: dense by row blocks: ")


def test_torch_logs_sets_the_level() -> None:
    everything = run(CODE, TORCH_LOGS="+attnc")
    for message in ("`causal` at 64 × 64: planned in ", "`causal`: copy: v: ", "`equal`: dense by row blocks: "):
        assert message in everything, message
    assert everything.count("`equal`: dense by row blocks: ") == 2
    log = run(CODE, TORCH_LOGS="attnc")
    assert "planned in" not in log
    assert "`causal`: copy: v: " in log


def test_loggers_have_no_handler_or_level() -> None:
    code = "import attnc, logging\nattnc.compile_attention('causal')\n"
    code += "for name in ['attnc', *logging.root.manager.loggerDict]:\n    own = logging.getLogger(name)\n"
    code += "    assert name.split('.')[0] != 'attnc' or (not own.handlers and own.level == 0), name\n"
    assert run(code) == ""


def test_loggers_are_named_by_their_modules() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                assert [ast.unparse(x) for x in node.args] == ["__name__"], path


def test_plans_and_kernels_are_logged_when_made(caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention("pattern told_once\n    align end\n    visible k <= q and q - k < 5\n")
    with caplog.at_level(logging.DEBUG, "attnc"):
        for _ in range(2):
            attend.plan(96, heads=2)
            attend.plan(96, heads=2, device="cuda", dtype=torch.bfloat16)
    messages = [(record.name, record.getMessage()) for record in caplog.records if "told_once" in record.getMessage()]
    assert [name for name, _ in messages] == [
        "attnc.runtime.executors.cpu.cpu_plans",
        "attnc.runtime.executors.triton.planner",
    ]
    assert messages[0][1].startswith("`told_once` at 96 × 96: planned in ")
    assert "kernels in" in messages[1][1]


# --- the environment -------------------------------------------------------------------------------------------------


def sources() -> Iterator[Path]:
    for folder in ("src", "spec", "compiler", "runtime"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def environment_reads(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the names of variables that the code reads, and `os.environ` itself unless it is copied as a whole."""
    copied = {id(node) for d in ast.walk(tree) if isinstance(d, ast.Dict) for node in d.values}
    counted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = ast.unparse(node.func)
            if of in ("os.getenv", "os.environ.get", "os.environ.pop", "os.environ.setdefault"):
                counted.add(id(node.func.value))
                yield node.args[0]
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            counted.add(id(node.value))
            yield node.slice
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ" and id(node) not in counted | copied:
            yield node


def test_every_variable_that_is_read_is_in_the_table() -> None:
    names = {variable.name for variable in VARIABLES}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [x.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for x in node.names]
        assert not {"environ", "getenv"} & set(imported), path
        if path.name == "environment.py":
            continue
        for node in environment_reads(tree):
            assert isinstance(node, ast.Constant) and node.value in names, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_the_table_lists_every_environment_variable() -> None:
    declared = [x for x in vars(environment).values() if isinstance(x, environment.EnvironmentVariable)]
    assert declared == list(VARIABLES)
    tree = ast.parse((ROOT / "runtime" / "process" / "environment.py").read_text(encoding="utf-8"))
    assert [ast.unparse(node) for node in environment_reads(tree)] == ["variable.name"]


def test_the_search_finds_reads() -> None:
    code = "import os\nos.environ.get('A')\nos.getenv('B')\nos.environ['C']\n{**os.environ, 'D': 1}\ndict(os.environ)\n"
    reads = [ast.unparse(node) for node in environment_reads(ast.parse(code))]
    assert sorted(reads) == ["'A'", "'B'", "'C'", "os.environ"]


# --- escape codes ----------------------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A terminal that keeps the text written to it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.attn").write_text(BAD)
    return Terminal()


@contextmanager
def on_terminal(terminal: Terminal) -> Iterator[None]:
    with redirect_stdout(terminal), redirect_stderr(terminal):
        yield


COLOURED = {
    "cache": ["load", "missing.zip"],
    "check": ["bad.attn"],
    "doctor": ["--targets", "sm_1"],
    "emit": ["causl"],
    "explain": ["A000"],
    "fmt": ["missing.attn"],
    "list": ["vidoe"],
    "receptive": ["causl"],
    "same": ["causl", "causal"],
    "show": ["causal", "--len", "8"],
    "simulate": ["causl"],
    "tune": ["causl"],
    "verify": ["causl"],
}
"""Arguments with which each command writes coloured text."""


def test_every_command_has_a_case() -> None:
    assert set(COLOURED) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_colour_on_a_terminal(command: str, terminal: Terminal) -> None:
    with on_terminal(terminal):
        main([command, *COLOURED[command]])
    assert "\x1b[" in terminal.written


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("NO_COLOR", "0"), ("TERM", "dumb")])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_obey_requests_for_no_colour(
    command: str, variable: tuple[str, str], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    with on_terminal(terminal):
        main([command, *COLOURED[command]])
    assert terminal.written
    assert "\x1b" not in terminal.written


@pytest.mark.parametrize("command", COMMANDS)
def test_pipes_and_json_have_no_colour(
    command: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with redirect_stdout(terminal):  # errors go to a pipe
        main([command, *COLOURED[command], "--json"])
    assert "\x1b" not in terminal.written
    main([command, *COLOURED[command]])
    written = capsys.readouterr()
    assert written.out + written.err
    assert "\x1b" not in written.out + written.err


def test_an_empty_no_color_is_ignored(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert console.has_color(terminal)


def test_the_progress_bar_is_plain_lines_without_colour(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("NO_COLOR", "1")
    with on_terminal(terminal), console.progress("work", 2) as step:
        step("one")
        step("two")
    assert terminal.written == "work: one\nwork: two\n"
    monkeypatch.delenv("NO_COLOR")
    with on_terminal(terminal), console.progress("work", 2) as step:
        step("three")
    assert "\x1b[" in terminal.written
