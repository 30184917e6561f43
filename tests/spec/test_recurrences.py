"""Recurrences: their clauses, and the messages about mistakes."""

from __future__ import annotations

import pytest

from attnc.spec import program
from attnc.spec.errors import SpecError
from attnc.spec.load import load_program
from attnc.spec.source import SourceFile

HEAD = """recurrence r
    input g: log_decay[batch, token, head]
    input s: real[batch, token, head, slots]
    input fresh: bool[batch, token]
    input doc: int[batch, token]
    state S: [dk, dv]
"""


def load(lines: str, head: str = HEAD) -> program.RecurrenceClauses:
    source = head + "".join(f"    {line}\n" for line in lines.splitlines())
    clauses = load_program(SourceFile("r.attn", source), lambda name, asker: None).recurrence
    assert clauses is not None
    return clauses


def test_lines_stay_in_their_order() -> None:
    clauses = load("let old = q @ S\nstep S = exp(g) * S + outer(k, v)\nread old + q @ S")
    assert [type(line).__name__ for line in clauses.lines] == ["Let", "StepClause", "ReadClause"]


def test_a_let_without_a_state_may_stand_anywhere() -> None:
    clauses = load("read q @ S * factor\nstep S = S + outer(k, v)\nlet factor = 2 * scale")
    assert [type(line).__name__ for line in clauses.lines] == ["ReadClause", "StepClause"]


def test_states_of_other_sizes_and_starts() -> None:
    lines = "state z: [slots] = -inf\nstep z = logaddexp(z, s)\nread q @ S * sum(exp(z[i]) for i in slots)"
    clauses = load(f"step S = S + outer(k, v)\n{lines}")
    assert [(state.name, state.dims, state.start) for state in clauses.states] == [
        ("S", ("dk", "dv"), 0.0),
        ("z", ("slots",), float("-inf")),
    ]


def test_processing_order_and_resets() -> None:
    clauses = load("scan -t\nreset fresh and t > 0\nstep S = S + outer(k, v)\nread q @ S")
    assert clauses.scan is not None
    assert clauses.reset is not None


STEP = "step S = S + outer(k, v)"
READ = "read q @ S"

MISTAKES: dict[str, tuple[str, str, str]] = {
    "never read": (
        f"{STEP}\nread v",
        "A222",
        "nothing reads the state `S`",
    ),
    "never updated": (
        READ,
        "A222",
        "the state `S` is never updated",
    ),
    "no read": (
        STEP,
        "A215",
        "`r` has no output",
    ),
    "two reads": (
        f"{STEP}\n{READ}\n{READ}",
        "A216",
        "`read` appears twice",
    ),
    "shapes": (
        f"step S = S + outer(v, k)\n{READ}",
        "A314",
        "a vector over `dk`, `dv`|a matrix over `dk`, `dv`",
    ),
    "no axis in common": (
        f"{STEP}\nread v @ q",
        "A314",
        "no shared axis",
    ),
    "a matrix is read": (
        f"{STEP}\nread S",
        "A310",
        "`read` must give a vector, got a matrix",
    ),
    "a number is a step": (
        f"step S = dot(q, k)\n{READ}",
        "A314",
        "the state `S` is a matrix",
    ),
    "unknown state": (
        f"{STEP}\nstep T = S\n{READ}",
        "A201",
        "there is no state `T`",
    ),
    "unknown size": (
        f"state z: [rooms]\nstep z = z\n{STEP}\nread q @ S * z[0]",
        "A303",
        "the size `rooms` is unknown",
    ),
    "tokens in a state": (
        f"state z: [token]\nstep z = z\n{STEP}\n{READ}",
        "A303",
        "a state cannot have a `token` dimension",
    ),
    "too early": (
        f"{STEP}\nread new\nlet new = q @ S",
        "A215",
        "`new` is read before its line",
    ),
    "a relation": (
        f"visible k <= q\n{STEP}\n{READ}",
        "A214",
        "`visible` does not belong in a `recurrence`",
    ),
    "a position": (
        f"{STEP}\nread q @ S if q > 3 else v",
        "A401",
        "compare and round positions",
    ),
    "the token is implied": (
        f"step S = exp(g[t]) * S + outer(k, v)\n{READ}",
        "A306",
        "takes 0 indices here, got 1",
    ),
    "a state in a scan": (
        f"scan S\n{STEP}\n{READ}",
        "A401",
        "`S` is a state",
    ),
    "a vector in a scan": (
        f"scan q\n{STEP}\n{READ}",
        "A206",
        "the position of the token is `t`",
    ),
    "vectors of other axes": (
        f"{STEP}\nread q * v",
        "A314",
        "cannot be combined elementwise",
    ),
    "a list begins a state": (
        f"state z: [dk] = [1, 2]\nstep z = z + k\n{STEP}\nread q @ S * dot(q, z)",
        "A301",
        "the start value of a state must be a number",
    ),
    "complex": (
        "state x: complex[dv]\nstep x = x + v\nread x",
        "A310",
        "`read` must give real numbers, got a complex vector over `dv`",
    ),
    "complex in a real state": (
        f"state x: complex[dv]\nstep x = x + v\nstep S = S + outer(k, x)\n{READ}",
        "A310",
        "the state `S` is a matrix over `dk`, `dv`, got a complex matrix",
    ),
    "the larger of complex numbers": (
        "state x: complex[dv]\nstep x = x + v\nread max(x, 0)",
        "A310",
        "`max` needs real numbers, got a complex vector",
    ),
    "a condition of complex numbers": (
        f"state x: complex[1]\nstep x = x + 1\nread v if x > 0 else 2 * v\n{STEP}",
        "A401",
        "`>` needs exact numbers, got a floating-point number",
    ),
    "a state of another kind": (
        f"state n: int[dv]\nstep n = n\n{STEP}\n{READ}",
        "A302",
        "a state cannot hold `int`",
    ),
    "repeated by tokens": (
        f"step S = S + outer(k, v) for j in 0 .. t\n{READ}",
        "A406",
        "the number of repetitions of a step must be the same for all tokens",
    ),
    "a score": (
        f"{STEP}\nread score * v + q @ S",
        "A206",
        "`score` is not available in a recurrence",
    ),
    "an unknown axis": (
        f"scan t.y\n{STEP}\n{READ}",
        "A203",
        "no axis is named `y`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    lines, code, says = MISTAKES[name]
    with pytest.raises(SpecError, match=says) as caught:
        load(lines)
    diagnostics = caught.value.diagnostics
    assert code in {d.code for d in diagnostics}
    assert all(d.help and d.primary.span.text for d in diagnostics)


def test_clauses_of_recurrences_are_refused_in_a_pattern() -> None:
    for line in ("state S: [dk, dv]", "step S = S", "read q", "scan t", "reset true"):
        source = f"pattern p\n    visible k <= q\n    {line}\n"
        with pytest.raises(SpecError, match="does not belong in a `pattern`"):
            load_program(SourceFile("p.attn", source), lambda name, asker: None)


@pytest.mark.parametrize(
    "line",
    [
        "input phase: complex[token]",
        "score real(dot(q, k))",
        "combine far\n    branch far\n        state x: complex[dv]\n        step x = x + v\n        read real(x)",
    ],
)
def test_patterns_have_no_complex_numbers(line: str) -> None:
    with pytest.raises(SpecError, match="A704"):
        load_program(SourceFile("p.attn", f"pattern p\n    {line}\n"), lambda name, asker: None)


def test_complex_numbers() -> None:
    head = "recurrence r\n    learned a: complex[head, n]\n    state x: complex[n] = 1\n"
    clauses = load("let now = conj(x) * imag(x) / (x + 2)\nstep x = exp(a) * x + now - heads\nread real(x)", head)
    assert clauses.states[0].is_complex
    assert [type(line).__name__ for line in clauses.lines] == ["Let", "StepClause", "ReadClause"]


@pytest.mark.parametrize("line", ["score dot(q, k) + dot(q @ q, k)", "score dot(diag(q), k)"])
def test_products_of_matrices_are_for_recurrences(line: str) -> None:
    with pytest.raises(SpecError, match="A703"):
        load_program(SourceFile("p.attn", f"pattern p\n    {line}\n"), lambda name, asker: None)
