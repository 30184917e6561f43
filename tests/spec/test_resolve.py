"""Names: what each name refers to, across files too."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnc.spec import program as nodes
from attnc.spec.errors import SpecError
from attnc.spec.load import check_source, load_program, load_programs
from attnc.spec.source import SourceFile

FILES = {
    "a.attn": "use b (f)\n\npattern p(w: int = 4)\n    visible f(q - k, w)\n",
    "b": "use c (least)\n\nlet origin = least\n\ndef f(x, w)\n    let low = origin\n    return low <= x < w\n",
    "c": "def unused(n) = rank < n and score > 0\nlet least = 0\n",
    "broken": "def f(x) = x +\n",
    "unknown": "def f(x) = x + wdith\n",
}


def load(name: str, asking: SourceFile) -> SourceFile | None:
    return SourceFile(f"{name}.attn", FILES[name]) if name in FILES else None


def test_names_of_other_files() -> None:
    program = load_program(SourceFile("a.attn", FILES["a.attn"]), load)
    (line,) = program.visible
    assert isinstance(line, nodes.DefinitionUse)
    assert line.definition.span.source.name == "b.attn"
    assert [b.name for b in line.definition.parameters] == ["x", "w"]


def test_errors_in_other_files_point_to_those_files() -> None:
    for module, code in (("broken", "A102"), ("unknown", "A201")):
        diagnostics = check_source(SourceFile("a.attn", f"use {module} (f)\n\npattern p\n    visible f(q) > 0\n"), load)
        assert [(d.code, d.primary.span.source.name) for d in diagnostics] == [(code, f"{module}.attn")]


def test_a_file_is_read_once() -> None:
    requests: list[str] = []

    def counting(name: str, asking: SourceFile) -> SourceFile | None:
        requests.append(asking.name)
        return load(name, asking)

    text = "use c (least)\nuse b (f)\n\npattern p\n    visible f(q, 3) and least < 1\n"
    load_programs(SourceFile("d.attn", text), counting)
    assert requests == ["d.attn", "d.attn", "b.attn"]


def test_use_chains_end() -> None:
    def endless(name: str, asking: SourceFile) -> SourceFile | None:
        return SourceFile(f"{name}.attn", f"use m{int(name[1:]) + 1} (f)\n")

    diagnostics = check_source(SourceFile("p.attn", "use m0 (f)\n"), endless)
    assert [d.code for d in diagnostics] == ["A605"]


def test_sizes_named_in_types() -> None:
    text = """pattern p(n: int, l: int[m])
    input table: bool[head, rows, 2 * n, m]
    tokens text(i: words)
    visible table[q % rows, k % (2 * n), (q + words) % m]
"""
    program = load_program(SourceFile("p.attn", text), load)
    (table,) = program.inputs
    assert [d if isinstance(d, str) else type(d).__name__ for d in table.type.dims] == [
        "head",
        "rows",
        "Operation",
        "m",
    ]


def test_definitions_may_follow_their_uses() -> None:
    text = "pattern p\n    visible b\n    let b = a < c(2)\n    let a = q - k\n    let c(n) = n * d\n    let d = 2\n"
    load_program(SourceFile("p.attn", text), load)


def test_presets_and_docstring() -> None:
    text = 'pattern p(a: int, b: int[2])\n    """What it is."""\n    preset small(a = 1, b = 2)\n'
    program = load_program(SourceFile("p.attn", text), load)
    assert program.docstring == "What it is."
    assert [(p.name, dict(p.values)) for p in program.presets] == [("small", {"a": 1, "b": (2, 2)})]


def test_check_source_never_raises() -> None:
    assert [d.code for d in check_source(SourceFile("p.attn", "pattern p\n    visible (\n"), load)] == ["A103"]
    assert check_source(SourceFile("a.attn", FILES["a.attn"]), load) == ()


DRAFTS = sorted((Path(__file__).parent / "drafts").glob("*.attn"))


@pytest.mark.parametrize("path", DRAFTS, ids=lambda path: path.stem)
def test_drafts_have_only_unsupported_constructs(path: Path) -> None:
    """Every draft resolves; the remaining errors are "not supported yet", or concern names that have been renamed."""

    def beside(name: str, asking: SourceFile) -> SourceFile | None:
        file = path.with_name(f"{name}.attn")
        return SourceFile(file.name, file.read_text("utf-8")) if file.exists() else None

    try:
        load_programs(SourceFile(path.name, path.read_text("utf-8")), beside)
    except SpecError as error:
        diagnostics = [d for d in error.diagnostics if d.message != "unknown function `token`"]  # a removed function
        assert {d.code for d in diagnostics} <= {"A701", "A703", "A704", "A211"}


def test_softmax_reads_a_let_named_score() -> None:
    text = "pattern p\n    let score = 2 * (k - q)\n    visible k <= q\n    weights softmax(score)\n"
    (attend,) = load_program(SourceFile("p.attn", text), load).attends
    assert isinstance(attend.weights, nodes.SoftmaxShare)
    assert isinstance(attend.weights.score, nodes.DefinitionUse)
