"""Rules of `complaints` for a missing type, name, `=`, operand or `else`."""

from __future__ import annotations

import re
from typing import get_args

from attnc.spec.reading.fault import Fault
from attnc.spec.reading.parse_stop import ParseStop
from attnc.spec.reading.phrases import found_phrase
from attnc.spec.reading.words import RESERVED
from attnc.spec.types import Kind

_KINDS = frozenset(get_args(Kind))
_NAMED = {
    "let": "write `let name = …`",
    "for": "write `for i in low .. high`",
    ".": "write `q.axis`, with the name of an axis of `tokens`",
    "branch": "name it, as in `branch near`",
    "pattern": "name it, as in `pattern near`",
    "def": "write `def f(x) = …`",
    "tokens": "write `tokens y: height, x: width`",
    ",": "remove the `,`, or write what comes next",
}
"""How what needs a name is written."""


def type_missing(found: ParseStop) -> Fault | None:
    """An `input` or a parameter without a type, or with one that is written in another way."""
    shown = found_phrase(found.kind, found.token)
    if found.expected >= {"LSQB", "EQUAL"} and found.token in ("(", "<", "{"):
        dimensions = re.split(r"[)>}=]", found.rest)[0].strip() or "head"
        message = f"the dimensions of a type stand in `[ ]`, and here is {shown}"
        return found.fault("A100", message, help=f"write `{found.last}[{dimensions}]`")
    if found.head in ("input", "learned", "state") and found.expected in ({"COLON"}, {"NAME", "LSQB"}):
        name = found.last if found.expected == {"COLON"} else found.before.split()[1].rstrip(":")
        example = "[dk, dv]" if found.head == "state" else "real[batch, head, query]"
        message = f"`{found.head} {name}` has no type"
        return found.fault("A110", message, label="expected a type", help=f"write `{found.head} {name}: {example}`")
    if found.expected == {"NAME", "LSQB"}:
        return found.fault("A110", f"expected a type, found {shown}", help="a type is written `real` or `int[head, 3]`")
    if found.head in ("tokens", "pad") and "COLON" in found.expected:
        extent = found.rest if found.token == "=" else "extent"
        message = f"the axis `{found.last}` has no extent"
        return found.fault("A110", message, help=f"write `{found.head} {found.last}: {extent}`")
    if found.expected >= {"COLON", "EQUAL", "RPAR"} and found.kind == "NAME" and not found.rest.startswith(":"):
        name, type_ = (found.token, found.last) if found.last in _KINDS else (found.last, found.token)
        if type_ not in _KINDS:
            return found.fault("A100", f"expected `:` and a type, or `,`, found {shown}", help=f"write `{name}: int`")
        return found.fault("A110", f"expected `:` before the type `{type_}`", help=f"write `{name}: {type_}`")
    return None


def name_missing(found: ParseStop) -> Fault | None:
    """Something else than a name where one is needed, perhaps a reserved word."""
    if "NAME" not in found.expected or found.wants_operand:
        return None
    if found.token in RESERVED:
        message = f"`{found.token}` is a reserved word and cannot be a name"
        return found.fault("A109", message, help="choose another name")
    if found.expected != {"NAME"}:
        return None
    message = f"expected a name after `{found.last}`, found {found_phrase(found.kind, found.token)}"
    remedy = "a name is made of letters, digits and `_`, and starts with no digit"
    if found.head == "use":
        remedy = "modules and names are listed by name alone: `use windows (shifted, leading)`"
    elif not found.token[:1].isdigit() or found.last in (".", "tokens"):
        remedy = _NAMED.get(found.last, remedy)
    return found.fault("A121", message, help=remedy)


def equal_missing(found: ParseStop) -> Fault | None:
    """A definition, or a unit, without its `=`; parameters without a comma."""
    if "EQUAL" not in found.expected or found.wants_operator:
        return None
    shown = found_phrase(found.kind, found.token)
    if found.kind == "NAME" and "COMMA" in found.expected and found.head not in ("over", "per"):
        return found.fault("A100", f"expected `,`, found {shown}", help="parameters are separated by `,`")
    if found.head in ("over", "per"):
        whole = f"{found.before} {found.token} {found.rest}".split()[1:]
        remedy = f"name the unit, `{found.head} b = {' '.join(whole)}`, or a range, `{found.head} b in low .. high`"
    elif found.token == ",":
        remedy = f"write a `{found.head}` line for each name"
    else:
        remedy = f"write `{found.before.strip() or found.head} = …`"
    return found.fault("A111", f"expected `=`, found {shown}", help=remedy)


def operand_missing(found: ParseStop) -> Fault | None:
    """An operator, a comma, a bracket or a first word without the expression that it calls for."""
    if not found.wants_operand or found.wants_operator:
        return None
    after = f" after {found_phrase('', found.last)}" if found.last else ""
    shown = "the line ends" if found.at_line_end else f"found {found_phrase(found.kind, found.token)}"
    if found.token in RESERVED:
        shown = f"`{found.token}` cannot start one"
    message = f"an expression is missing{after}: {shown}"
    return found.fault("A102", message, label="expected an expression", help=_operand(found))


def _operand(found: ParseStop) -> str:
    """Return the help text for a missing expression."""
    if found.at_line_end:
        return "write it on this line; an expression goes on in the next one only inside of brackets"
    if found.kind == "TEXT":
        return "there are no texts in expressions; for a remark write a comment, `# …`"
    if found.token == "if":
        return "the condition stands in the middle: `a if condition else b`"
    if found.token == "for":
        return "the `for` stands at the end: `any(k == j for j in 0 .. n)`"
    if found.token == "=" and found.before.strip() == found.head:
        return f"leave the `=` out: `{found.head} …`"
    if found.last == "[":
        return "a list has at least one entry: `[0]`"
    if found.last == ",":
        return "remove the `,`, or write what comes next"
    if not re.search(r"\w", found.last) or found.last in RESERVED:
        return f"write a value after `{found.last}`, or remove the `{found.last}`"
    return f"write a value before `{found.token}`" if found.wants_left else ""


def else_missing(found: ParseStop) -> Fault | None:
    """An `if` without the other side."""
    if "ELSE" not in found.expected:
        return None
    if found.kind in ("NAME", "NUMBER", "TEXT", "LPAR"):
        return None
    return found.fault(
        "A119",
        "this `if` has no `else`",
        label="expected `else`",
        help="a choice is written `a if condition else b`; a condition alone goes on with `and`",
    )
