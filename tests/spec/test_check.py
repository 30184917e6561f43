"""The checker's results for a correct pattern, and its messages about a wrong one."""

from __future__ import annotations

import time

import pytest

from attnc.spec import program as nodes
from attnc.spec.codes import CODES
from attnc.spec.diagnostics import Severity
from attnc.spec.errors import SpecError
from attnc.spec.load import check_source, load_program, load_programs
from attnc.spec.program import Program
from attnc.spec.source import SourceFile

GRID = """pattern p(h: int, w: int)
    tokens video(y: h, x: w)
    tokens text(i: words)
"""


def nothing(name: str, asking: SourceFile) -> SourceFile | None:
    return None


def program(text: str) -> Program:
    return load_program(SourceFile("p.attn", text), nothing)


def codes(text: str) -> list[str]:
    code_list = [d.code for d in check_source(SourceFile("p.attn", text), nothing) if d.severity is Severity.ERROR]
    assert set(code_list) <= set(CODES)
    return code_list


@pytest.mark.parametrize(
    ("visible", "needed"),
    [
        ("k <= q", True),
        ("k < 3", False),
        ("q < 3", False),
        ("a[q] == b[k]", False),
        ("a[q + 1] == b[k]", True),
        ("t[q] == b[k]", True),
        ("t[k] == 1 and head == 0", False),
        ("any(q == k for q in 0 .. 3)", False),
        ("any(q == k for k in 0 .. 3) and k < 2", True),
    ],
)
def test_align_is_needed_where_both_positions_are_read(visible: str, needed: bool) -> None:
    inputs = "    input a: int[query]\n    input b: int[key]\n    input t: int[token]\n"
    assert program(f"pattern p\n{inputs}    visible {visible}\n").needs_align is needed


def test_documents_need_align() -> None:
    assert program("pattern p\n    input doc: int[token]\n    documents doc\n").needs_align


def test_stages_of_requirements() -> None:
    text = "pattern p(w: int, s: int[head], l: int[n])\n    require w > n\n    require keys > w\n"
    text += "    require all(s > 0 for head in heads)\n    visible q - k < w\n"
    assert [r.stage for r in program(text).requirements] == ["parameter", "call", "call"]


def test_two_patterns_in_a_file() -> None:
    source = SourceFile("two.attn", "pattern a\n    visible k <= q\n\npattern b\n    visible q < k\n")
    assert [p.name for p in load_programs(source, nothing)] == ["a", "b"]
    assert load_program(source, nothing, "b").name == "b"
    with pytest.raises(SpecError, match="several patterns: `a`, `b`"):
        load_program(source, nothing)
    with pytest.raises(SpecError, match="did you mean `a`"):
        load_program(source, nothing, "A")
    with pytest.raises(SpecError, match="defines no pattern"):
        load_program(SourceFile("none.attn", "def f(x) = x\n"), nothing)


def test_a_definition_is_one_node_for_all_uses() -> None:
    (line,) = program("pattern p\n    let a = q - k\n    visible a < 3 and a >= 0\n").visible
    assert isinstance(line, nodes.Operation)
    used = [o.operands[0] for o in line.operands if isinstance(o, nodes.Operation)]
    assert isinstance(used[0], nodes.DefinitionUse)
    assert isinstance(used[1], nodes.DefinitionUse)
    assert used[0].definition is used[1].definition


@pytest.mark.parametrize(
    "visible",
    [
        "q in text or q.y == 0",
        "q in video and q.y == 0",
        "q in video and k in video and q.y == k.y",
        "q in text or k in text or q.y == k.y",
        "not (q in text or k in text) and q.y == k.y",
        "q.y == 0 if q in video else q.i == 0",
        "q.i == 0 if not q in video else q.y == 0",
        "both and q.y == k.y",
        "not both or near",
        "any(k.y == 1 for k in 0 .. 4 if k in video)",
        "q in text or any(q.y == j for j in 0 .. 2)",
        "q not in video or q.x == 1",
    ],
)
def test_guarded_coordinates(visible: str) -> None:
    lets = "    let both = q in video and k in video\n    let near = q.y == k.y\n"
    assert codes(f"{GRID}{lets}    visible {visible}\n") == []


@pytest.mark.parametrize(
    "visible",
    [
        "q.y == 0",
        "q.y == 0 and q in video",
        "q in text and q.y == 0",
        "k in video and q.y == 0",
        "(q in video and k in video or q in text and k in text) and (q.y == 0 if q in video else k.i == 0)",
        "(q in text or k in text) or near2",
        "not (q in text and k in text) and q.y == k.y",
        "q in video and any(q.y == 1 for q in 0 .. 4)",
        "near2 if k in video else true",
    ],
)
def test_unguarded_coordinates(visible: str) -> None:
    assert "A407" in codes(f"{GRID}    let near2 = q.y == 1 or k.i == 0\n    visible {visible}\n")


def test_a_visible_line_guards_the_next() -> None:
    assert codes(f"{GRID}    visible q in video\n    visible q.y == 0\n") == []


def test_a_lone_grid_needs_no_guard() -> None:
    assert codes("pattern p(h: int)\n    tokens y: h\n    visible q.y == k.y\n") == []


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("2 ** abs(q) < 4 and [1, 2][2 ** abs(q)] == 1", None),
        ("[1, 2][2 ** (q - k)] == 1", "A309"),
        ("[1, 2][q // 2] == 1", None),
        ("[1, 2][q // 0.5] == 1", None),
        ("[1, 2][q / 2] == 1", "A309"),
        ("bitlen(q / 2) == 1", "A309"),
        ("floor(sqrt(q) + 1/2) == 1", None),
        ("floor(log(max(q, 1) / 3) / log(128 / 8) * 8) == 1", None),
        ("floor(2 ** (q / 2)) == 1", None),
        ("max(sqrt(q), 1) == 1", "A401"),
        ("sqrt(q) // 2 == 1", "A401"),
        ("sum(sqrt(i) for i in 0 .. 3) < 2", "A401"),
        ("floor(tanh(q)) == 1", "A401"),
        ("(q < k) == (k < 3)", None),
        ("(q < k) == 1", "A310"),
        ("(q < k) < (k < 3)", "A310"),
        ("-true == 1", "A310"),
        ("not 3", "A308"),
        ("any(i for i in 0 .. 3)", "A308"),
        ("mean(q < i for i in 0 .. 3) > 1/2", None),
        ("[[1, 2], [3, 4]][q % 2][k % 2] == 1", None),
        ("[[1, 2], [3, 4]][0][2] == 1", "A312"),
        ("[1, 2] == [1, 2]", "A310"),
        ("0 * 2 ** 64 == 0", "A403"),
        ("2 ** -64 < 1", None),
        ("(-8) ** (1/3) < 1", "A403"),
        ("q * 1e200 < 1", "A404"),
        ("-9223372036854775808 < q", None),
    ],
)
def test_types(expression: str, code: str | None) -> None:
    assert set(codes(f"pattern p\n    visible {expression}\n")) == ({code} if code else set())


def test_an_unused_let_is_checked_too() -> None:
    assert codes("pattern p\n    let a = q + true\n    let b(x) = x + unknwon\n    visible k <= q\n") == [
        "A310",
        "A201",
    ]


def test_an_unsupported_construct_has_one_diagnostic() -> None:
    text = """pattern p(block: int, topk: int)
    input gate: unit[batch, query, head]
    learned table: real[head, block]
    let near = dot(q, k) + table[k] + merge(q, 2)
    select chosen[s in 0 .. 3]
        per a = q // block, c = k // block
        over b = k // block
        score nothing(b.k) + near
        keep rank < topk
    branch local
        visible k in chosen[2]
    visible k in chosen[2] and chosen.size > 2 and local[q] > 1 and gate[q] > 0
    round
        per a = q // block, b = k // block
        keep any(visible and k in chosen[1] for q in a, k in b)
    score near
    combine local
"""
    code_list = codes(text)
    assert code_list == ["A703", "A401"]


@pytest.mark.parametrize(
    "text",
    [
        "pattern p\n    let a0 = q\n"
        + "".join(f"    let a{i + 1} = a{i} + a{i}\n" for i in range(63))
        + "    visible a62 > 1\n",
        "def a0(x) = x\n"
        + "".join(f"def a{i + 1}(x) = a{i}(x) + a{i}(x + 1)\n" for i in range(400))
        + "pattern p\n    visible a400(q) > 1\n",
        "pattern p\n    visible " + "abs(" * 60 + "q" + ")" * 60 + " > 0\n",
        "pattern p\n    visible " + " + ".join(["q"] * 99) + " > 0\n",
        "pattern p\n    visible " + " or ".join(["q == k"] * 5000) + "\n",
        "pattern p\n" + "".join(f"    let a{i} = a{(i + 1) % 3000}\n" for i in range(3000)) + "    visible a0 > 1\n",
    ],
)
def test_every_text_is_checked_in_a_minute(text: str) -> None:
    begun = time.process_time()
    code_list = codes(text)
    assert time.process_time() - begun < 60  # exponential growth would take hours
    assert len(code_list) <= 2


@pytest.mark.parametrize("name", ["scale", "device", "head", "state", "preset", "q", "v", "self"])
def test_names_of_the_call(name: str) -> None:
    assert codes(f"pattern p({name}: int)\n    visible k <= q\n") == ["A213"]
    assert codes(f"pattern p\n    input {name}: int[batch]\n    visible k <= q\n") == ["A213"]


@pytest.mark.parametrize("name", ["score", "window", "value", "rank", "group", "step", "t", "mass", "end"])
def test_names_that_stay_free(name: str) -> None:
    assert codes(f"pattern p({name}: int)\n    visible q - k < {name}\n") == []
