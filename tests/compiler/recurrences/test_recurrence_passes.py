"""Recurrences as passes: their classes, merged states, and recurrences without a form, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from attnc.compiler.ir import Recur
from attnc.compiler.ir.print_ir import print_pattern
from attnc.compiler.ir.verify_ir import verify
from attnc.compiler.lowering.lower import lower
from attnc.compiler.recurrences.derive import derive
from attnc.compiler.recurrences.derived import Coupled, ElementwiseScan, NoFormError, Pass, RunningReduction
from attnc.compiler.recurrences.print_derived import class_of, class_of_coupled
from attnc.runtime.texts.library import ModuleLoader, library_source, recurrence_names
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.source import SourceFile

INPUTS = """
    input g: log_decay[batch, token, head]
    input w: log_decay[batch, token, head, dk]
    input c: log_decay[batch, token, head, dv]
    input f: unit[batch, token, head, dk]
    input free: real[batch, token, head]
    input beta: unit[batch, token, head]
    input a: real[batch, token, head, dk]
    input b: real[batch, token, head, dk]
"""


def recur_of(source: SourceFile, name: str | None = None, **values: Any) -> Recur:
    pattern = lower(bind(load_program(source, ModuleLoader(None), name), values, None))
    verify(pattern)
    print_pattern(pattern)
    assert pattern.recur is not None
    return pattern.recur


def written(lines: str) -> Recur:
    body = "".join(f"    {line}\n" for line in lines.splitlines())
    return recur_of(SourceFile("r.attn", f"recurrence r{INPUTS}    state S: [dk, dv]\n{body}"))


def classes(recur: Recur) -> list[str]:
    names = {ElementwiseScan: "entry by entry", RunningReduction: "log-sum-exp"}
    return [
        class_of(stage)
        if isinstance(stage, Pass)
        else class_of_coupled(stage)
        if isinstance(stage, Coupled)
        else names[type(stage)]
        for stage in derive(recur).stages
    ]


LIBRARY = {
    "aaren": ["log-sum-exp", "a scalar decay"],
    "comba": ["a scalar decay, delta rule"],
    "convs5_pointwise": ["entry by entry"],
    "delta_net": ["no decay, delta rule"],
    "gated_delta_net": ["a scalar decay, delta rule"],
    "gated_delta_product": ["a scalar decay, delta rule, several steps a token"],
    "gla": ["a decay of each row"],
    "mesa": ["a scalar decay", "a scalar decay"],
    "gsa": ["a decay of each column", "a decay of each row"],
    "hgrn": ["entry by entry"],
    "hgrn2": ["a decay of each row"],
    "kimi_delta": ["a decay of each row, delta rule"],
    "lightnet": ["log-sum-exp", "a decay of each row"],
    "lightning": ["a scalar decay"],
    "linear_attention": ["no decay", "no decay"],
    "mamba1": ["entry by entry"],
    "mamba2_ssd": ["a scalar decay"],
    "memora_linear": "`share` of a state",
    "moneta_linear": "`div` of a state",
    "mhs_vm": ["entry by entry"],
    "retention": ["a scalar decay"],
    "rwkv6": ["a decay of each row"],
    "s5": ["entry by entry"],
    "rwkv7": ["a decay of each row, a correction of rank one of the old state"],
    "test_time_regression": "different axes of `P` and `S`",
    "titans_linear": ["states that read each other, a correction of rank one"],
    "ttt_linear": "`W` and `first` read each other",
    "yaad_linear": "`min` of a state",
}


@pytest.mark.parametrize("name", recurrence_names())
def test_library(name: str) -> None:
    source = library_source(name)
    assert source is not None
    recur = recur_of(source, name, **({"height": 4, "width": 5} if name == "mhs_vm" else {}))
    wanted = LIBRARY[name]
    if isinstance(wanted, str):
        with pytest.raises(NoFormError, match=wanted.replace("`", ".")):
            derive(recur)
    else:
        assert classes(recur) == wanted
        assert str(derive(recur)).endswith(tuple("]*v)1234567890r"))


RANK_ONE = "a correction of rank one"
SAME: dict[str, tuple[str, list[str]]] = {
    "one line or two": (
        "step S = exp(g) * S + beta * outer(k, v - exp(g) * (k @ S))",
        [f"a scalar decay, {RANK_ONE} of the old state"],
    ),
    "a difference": ("step S = S - (1 - f) * S + outer(k, v)", ["a decay of each row"]),
    "a share": ("step S = (1 - f) * S + outer(k, v)", ["a decay of each row"]),
    "columns": ("step S = exp(c) * S + outer(k, v)", ["a decay of each column"]),
    "a negative gate": ("step S = exp(-softplus(free)) * S + outer(k, v)", ["a scalar decay"]),
    "rank one": (
        "step S = exp(w) * S\nstep S = S + outer(b, a @ S) + outer(k, v)",
        [f"a decay of each row, {RANK_ONE} of the decayed state"],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_ways_to_write(name: str) -> None:
    lines, wanted = SAME[name]
    assert classes(written(f"{lines}\nread q @ S")) == wanted


ENTRYWISE = {
    "a free gate": ("step S = exp(free) * S + outer(k, v)", "declare its gate `log_decay`"),
    "a free factor": ("step S = free * S + outer(k, v)", "declare its gate `unit`"),
    "a choice": ("step S = (exp(g) if t % 2 == 0 else 1) * S + outer(k, v)", "may be above 1"),
    "forgotten": ("step S = outer(k, v)", "discards all of `S`"),
    "two steps": ("step S = S + outer(k, v)\nstep S = exp(g) * S", "a decay of `S` after"),
}


@pytest.mark.parametrize("name", ENTRYWISE)
def test_recurrences_computed_elementwise_and_the_reason(name: str) -> None:
    """The reason is stated, so that the missing form can be recognised."""
    lines, says = ENTRYWISE[name]
    recur = written(f"{lines}\nread q @ S")
    assert classes(recur) == ["entry by entry"]
    assert says in derive(recur).reason
    assert says in str(derive(recur))


TOGETHER = "states that read each other"
ANY = "a factor that may be any number"
COUPLED = {
    "momentum": ("state P: [dk, dv]\nstep P = beta * P + outer(k, v)\nstep S = free * S + P", [TOGETHER]),
    "slopes": (
        "state P: [dk, dv]\nstep P = beta * P + outer(k, v - k @ S)\nstep S = S + P",
        [f"{TOGETHER}, {RANK_ONE}"],
    ),
    "two corrections": (
        "state P: [dk, dv]\nstep P = S - free * P + outer(k, v - k @ S)\nstep S = S + P - outer(a, b @ P)",
        [f"{TOGETHER}, corrections of rank one"],
    ),
    "corrections of one": (
        "state P: [dk, dv]\nstep P = P + outer(k, v - k @ S + free * (k @ P))\nstep S = S + P",
        [f"{TOGETHER}, {RANK_ONE}"],
    ),
    "vectors": (
        "state x: [dk]\nstate y: [dk]\nstep x = free * x + y\nstep y = y - x + k\nstep S = S + outer(k, v)",
        ["no decay", TOGETHER],
    ),
    "a later decay": ("step S = S + outer(k, v - k @ S)\nstep S = exp(g) * S", [f"{ANY}, {RANK_ONE}"]),
    "a free factor": ("step S = free * S\nstep S = S - outer(a, b @ S) + outer(k, v)", [f"{ANY}, {RANK_ONE}"]),
    "two at once": ("step S = S - outer(k, k @ S) - outer(a, b @ S)", [f"{ANY}, corrections of rank one"]),
    "beside a sum of exponentials": (
        "state z: [dk]\nstate P: [dk, dv]\nstep z = logaddexp(z, k)\nstep P = S + outer(z, v)\nstep S = beta * P + S",
        ["log-sum-exp", TOGETHER],
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_states_that_read_each_other(name: str) -> None:
    lines, wanted = COUPLED[name]
    recur = written(f"{lines}\nread q @ S" + (" + dot(q, x) * v" if name == "vectors" else ""))
    assert classes(recur) == wanted
    assert "in terms of the state" in str(derive(recur))


def test_a_group_as_it_is_printed() -> None:
    lines = "state P: [dk, dv]\nstep P = beta * P - outer(k, k @ S - v)\nstep S = S + P\nread q @ S"
    assert str(derive(written(lines))).splitlines() == [
        "S, P[dk, dv]: states that read each other, a correction of rank one; in terms of the states before the token",
        "    e = v + k @ ((-1.0) * S)",
        "    S = S + beta * P + outer(k, e)",
        "    P = beta * P + outer(k, e)",
        "    S.0 = q @ S",
        "out = S.0",
    ]


NOT_COUPLED = {
    "by row": ("step P = f * P + S\nstep S = S + P + outer(k, v)", "a factor of `P` that is not a number"),
    "other axes": ("step P = P + outer(k, v)\nstep z = z + P @ v\nstep S = S + P + outer(z, v)", "different axes"),
    "on columns": ("step P = S + outer(k, v)\nstep S = S + P - outer(P @ v, v)", "does not contract its first axis"),
    "a read": (
        "step P = S + outer(k, v)\nstep S = S + P\nread tanh(q @ S) * (q @ P) + tanh(P @ v) @ S",
        "does not contract its first axis",
    ),
    "not linear": ("step P = tanh(S)\nstep S = S + P + outer(k, v)", "`tanh` of a state"),
    "repeated": ("step P = S + outer(k, v)\nstep S = S + P for j in 0 .. 2", "a repeated step of `S`"),
    "empty": ("step P = S\nstep S = P", "states that nothing writes to"),
}


@pytest.mark.parametrize("name", NOT_COUPLED)
def test_states_that_read_each_other_without_a_form(name: str) -> None:
    lines, says = NOT_COUPLED[name]
    states = "state P: [dk, dv]\n" + ("state z: [dk]\n" if "z" in lines else "")
    read = "" if "read" in lines else "\nread q @ S"
    with pytest.raises(NoFormError, match=says.replace("`", ".")) as raised:
        derive(written(f"{states}{lines}{read}"))
    assert "read each other" in str(raised.value) or name in ("empty", "a read")


REFUSED = {
    "nonlinear": ("step S = tanh(S) + outer(k, v)", "`tanh` of a state"),
    "quadratic": ("step S = S * S + outer(k, v)", "a product of the states"),
    "on columns": ("step S = S + outer(k, S @ v)", "|does not contract its first axis|a matrix that is not a product"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_recurrences_without_a_form(name: str) -> None:
    lines, says = REFUSED[name]
    if name == "on columns":
        lines = "step S = S + outer(S @ v, v)"
    with pytest.raises(NoFormError, match=says.replace("`", ".")):
        derive(written(f"{lines}\nread q @ S"))


def test_a_read_between_steps_has_no_form() -> None:
    recur = written("step S = exp(g) * S\nlet seen = q @ S\nstep S = S + outer(k, v)\nread seen")
    with pytest.raises(NoFormError, match="between its steps"):
        derive(recur)
