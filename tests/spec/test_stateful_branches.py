"""Branches with a state: their clauses, and the messages about mistakes."""

from __future__ import annotations

import pytest

from attnc.spec import program
from attnc.spec.errors import SpecError
from attnc.spec.load import load_program
from attnc.spec.source import SourceFile

HEAD = """pattern p
    input g: log_decay[batch, token, head]
    branch near
        visible 0 <= q - k < 9
"""
FAR = """    branch far
        state S: [dk, dv]
        step  S = exp(g) * S + outer(k, v)
        read  q @ S
"""
BOTH = "    combine near + far\n"


def load(source: str) -> program.Program:
    return load_program(SourceFile("p.attn", source), lambda name, asker: None)


def test_order_and_names() -> None:
    """Branches stand in any order; a let reads `t` in a branch with a state, and `q` and `k` in an attention."""
    let = "    let even = t % 2 == 0\n"
    checked = load(HEAD + let + BOTH + FAR.replace("state S", "reset even\n        state S"))
    assert [item.name for item in checked.stateful] == ["far"]
    assert [item.name for item in checked.attends] == ["near"]
    assert checked.recurrence is None


def test_states_alone() -> None:
    checked = load("pattern p\n    input g: log_decay[batch, token, head]\n" + FAR + "    combine far\n")
    assert checked.attends == ()


MISTAKES: dict[str, tuple[str, str, str]] = {
    "visible of all": (HEAD + FAR + BOTH + "    visible k <= q\n", "A215", "cannot apply to `far`"),
    "visible inside": (
        HEAD + FAR + "        visible k <= q\n" + BOTH,
        "A214",
        "does not belong in a branch with a state",
    ),
    "two reads": (HEAD + FAR + "        read q @ S\n" + BOTH, "A216", "`read` appears twice"),
    "no read": (HEAD + FAR.replace("        read  q @ S\n", "") + BOTH, "A215", "`far` has no output"),
    "lse": (HEAD + FAR + "    combine near + far.lse * near\n", "A202", "a branch with a state has no `lse`"),
    "merge": (HEAD + FAR + "    combine merge(near, far)\n", "A206", "`far` cannot be merged without an LSE"),
    "reads a branch": (HEAD + FAR.replace("read  q @ S", "read  q @ S + near") + BOTH, "A703", "reads other branches"),
    "family": (HEAD + FAR.replace("branch far", "branch far[i in 0 .. 2]") + BOTH, "A206", "is a family"),
    "family over what": (
        HEAD + FAR.replace("branch far", "branch far[i]") + BOTH,
        "A210",
        "the index of a family needs a range",
    ),
    "state in the pattern": (HEAD + FAR + BOTH + "    state T: [dv]\n", "A214", "does not belong in a `pattern`"),
    "a matrix": (HEAD + FAR.replace("q @ S", "S") + "    combine near\n", "A703", "gives a matrix over `dk`, `dv`"),
    "axes by name elsewhere": (
        HEAD.replace("near\n", "near\n        value q * outer(q, k)\n") + FAR + BOTH,
        "A314",
        "cannot be combined elementwise",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    source, code, says = MISTAKES[name]
    with pytest.raises(SpecError, match=says) as caught:
        load(source)
    diagnostics = caught.value.diagnostics
    assert code in {d.code for d in diagnostics}
    assert all(d.help and d.primary.span.text for d in diagnostics)
