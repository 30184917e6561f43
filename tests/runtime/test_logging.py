"""Log messages, where they show, and no escape codes where none are wanted."""

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
from attnc.runtime import environment
from attnc.runtime.cli import COMMANDS, main
from attnc.runtime.commands import console
from attnc.runtime.environment import VARIABLES
from command_calls import BAD

ROOT = Path(__file__).resolve().parents[2]
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
    """Return what a process of its own writes to stderr."""
    own = {name: x for name, x in os.environ.items() if name not in ("TORCH_LOGS", "TRITON_INTERPRET")}
    own |= {"PYTHONPATH": str(ROOT / "src"), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    return done.stderr


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_a_slow_way_alone_is_said_without_asking() -> None:
    lines = run(CODE).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("`equal`: dense by row blocks: ")


def test_torch_logs_shows_all_and_the_middle() -> None:
    everything = run(CODE, TORCH_LOGS="+attnc")
    for said in ("`causal` at 64 × 64: planned in ", "`causal`: copy: v: ", "`equal`: dense by row blocks: "):
        assert said in everything, said
    assert everything.count("`equal`: dense by row blocks: ") == 2
    some = run(CODE, TORCH_LOGS="attnc")
    assert "planned in" not in some
    assert "`causal`: copy: v: " in some


def test_nothing_has_a_handler_or_a_level_of_ours() -> None:
    code = "import attnc, logging\nattnc.compile_attention('causal')\n"
    code += "for name in ['attnc', *logging.root.manager.loggerDict]:\n    own = logging.getLogger(name)\n"
    code += "    assert name.split('.')[0] != 'attnc' or (not own.handlers and own.level == 0), name\n"
    assert run(code) == ""


def test_loggers_are_named_by_their_modules() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                assert [ast.unparse(x) for x in node.args] == ["__name__"], path


def test_a_plan_and_kernels_are_told_when_they_are_made(caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention("pattern told_once\n    align end\n    visible k <= q and q - k < 5\n")
    with caplog.at_level(logging.DEBUG, "attnc"):
        for _ in range(2):
            attend.plan(96, heads=2)
            attend.plan(96, heads=2, device="cuda", dtype=torch.bfloat16)
    own = [(record.name, record.getMessage()) for record in caplog.records if "told_once" in record.getMessage()]
    assert [name for name, _ in own] == ["attnc.runtime.plans", "attnc.runtime.gpu.planner"]
    assert own[0][1].startswith("`told_once` at 96 × 96: planned in ")
    assert "kernels in" in own[1][1]


# --- the environment -------------------------------------------------------------------------------------------------


def sources() -> Iterator[Path]:
    for folder in ("src", "spec", "compiler", "runtime"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def asked_of_the_environment(tree: ast.AST) -> Iterator[ast.expr]:
    """The names that are read, or `environ` itself where it is used in another way than copied whole."""
    whole = {id(node) for d in ast.walk(tree) if isinstance(d, ast.Dict) for node in d.values}
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = ast.unparse(node.func)
            if of in ("os.getenv", "os.environ.get", "os.environ.pop", "os.environ.setdefault"):
                known.add(id(node.func.value))
                yield node.args[0]
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            known.add(id(node.value))
            yield node.slice
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ" and id(node) not in known | whole:
            yield node


def test_every_variable_that_is_read_is_in_the_table() -> None:
    names = {variable.name for variable in VARIABLES}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [x.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for x in node.names]
        assert not {"environ", "getenv"} & set(imported), path
        if path.name == "environment.py":
            continue
        for node in asked_of_the_environment(tree):
            assert isinstance(node, ast.Constant) and node.value in names, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_the_table_is_whole_and_only_its_variables_are_read_by_it() -> None:
    own = [x for x in vars(environment).values() if isinstance(x, environment.EnvironmentVariable)]
    assert own == list(VARIABLES)
    tree = ast.parse((ROOT / "runtime" / "environment.py").read_text(encoding="utf-8"))
    assert [ast.unparse(node) for node in asked_of_the_environment(tree)] == ["variable.name"]


def test_the_search_finds_reads() -> None:
    code = "import os\nos.environ.get('A')\nos.getenv('B')\nos.environ['C']\n{**os.environ, 'D': 1}\ndict(os.environ)\n"
    found = [ast.unparse(node) for node in asked_of_the_environment(ast.parse(code))]
    assert sorted(found) == ["'A'", "'B'", "'C'", "os.environ"]


# --- escape codes ----------------------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A terminal that keeps what is written."""

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
def on(terminal: Terminal) -> Iterator[None]:
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
"""Arguments with which a command writes something in colour."""


def test_every_command_is_here() -> None:
    assert set(COLOURED) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_colour_on_a_terminal(command: str, terminal: Terminal) -> None:
    with on(terminal):
        main([command, *COLOURED[command]])
    assert "\x1b[" in terminal.written


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("NO_COLOR", "0"), ("TERM", "dumb")])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_obey_the_wish_for_none(
    command: str, variable: tuple[str, str], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    with on(terminal):
        main([command, *COLOURED[command]])
    assert terminal.written
    assert "\x1b" not in terminal.written


@pytest.mark.parametrize("command", COMMANDS)
def test_pipes_and_json_have_none(
    command: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with redirect_stdout(terminal):  # errors go to a pipe
        main([command, *COLOURED[command], "--json"])
    assert "\x1b" not in terminal.written
    main([command, *COLOURED[command]])
    written = capsys.readouterr()
    assert written.out + written.err
    assert "\x1b" not in written.out + written.err


def test_an_empty_no_color_is_none(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert console.has_color(terminal)


def test_the_bar_is_lines_where_no_codes_are_wanted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("NO_COLOR", "1")
    with on(terminal), console.progress("work", 2) as step:
        step("one")
        step("two")
    assert terminal.written == "work: one\nwork: two\n"
    monkeypatch.delenv("NO_COLOR")
    with on(terminal), console.progress("work", 2) as step:
        step("three")
    assert "\x1b[" in terminal.written
