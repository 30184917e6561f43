"""Rules that recognise a missing type, name, `=`, operand or `else`; `complaints` applies them."""

from __future__ import annotations

import re
from typing import get_args

from attnc.spec.reading.fault import Fault
from attnc.spec.reading.parse_stop import ParseStop
from attnc.spec.reading.phrases import RESERVED, found_phrase
from attnc.spec.types import Kind

_KINDS = frozenset(get_args(Kind))
_NAMED = {
    "let": "write `let name = …`",
    "for": "write `for i in low .. high`",
    ".": "write `q.axis`, with the name of an axis of `tokens`",
    "branch": "add a name: `branch near`",
    "pattern": "add a name: `pattern near`",
    "def": "write `def f(x) = …`",
    "tokens": "write `tokens y: height, x: width`",
    ",": "remove the `,`, or write what comes next",
}
"""The remedy for a missing name, by the token before it."""


def type_missing(stop: ParseStop) -> Fault | None:
    """Recognise an `input` or a parameter without a type, or with a type in another notation."""
    shown = found_phrase(stop.kind, stop.token)
    if stop.expected >= {"LSQB", "EQUAL"} and stop.token in ("(", "<", "{"):
        dimensions = re.split(r"[)>}=]", stop.rest)[0].strip() or "head"
        message = f"the dimensions of a type need `[ ]`, found {shown}"
        return stop.fault("A100", message, help=f"write `{stop.last}[{dimensions}]`")
    if stop.head in ("input", "learned", "state") and stop.expected in ({"COLON"}, {"NAME", "LSQB"}):
        name = stop.last if stop.expected == {"COLON"} else stop.before.split()[1].rstrip(":")
        example = "[dk, dv]" if stop.head == "state" else "real[batch, head, query]"
        message = f"`{stop.head} {name}` has no type"
        return stop.fault("A110", message, label="expected a type", help=f"write `{stop.head} {name}: {example}`")
    if stop.expected == {"NAME", "LSQB"}:
        return stop.fault("A110", f"expected a type, found {shown}", help="a type is written `real` or `int[head, 3]`")
    if stop.head in ("tokens", "pad") and "COLON" in stop.expected:
        extent = stop.rest if stop.token == "=" else "extent"
        message = f"the axis `{stop.last}` has no extent"
        return stop.fault("A110", message, help=f"write `{stop.head} {stop.last}: {extent}`")
    if stop.expected >= {"COLON", "EQUAL", "RPAR"} and stop.kind == "NAME" and not stop.rest.startswith(":"):
        name, type_ = (stop.token, stop.last) if stop.last in _KINDS else (stop.last, stop.token)
        if type_ not in _KINDS:
            return stop.fault("A100", f"expected `:` and a type, or `,`, found {shown}", help=f"write `{name}: int`")
        return stop.fault("A110", f"expected `:` before the type `{type_}`", help=f"write `{name}: {type_}`")
    return None


def name_missing(stop: ParseStop) -> Fault | None:
    """Recognise a missing name, perhaps with a reserved word in its place."""
    if "NAME" not in stop.expected or stop.wants_operand:
        return None
    if stop.token in RESERVED:
        message = f"`{stop.token}` is a reserved word and cannot be a name"
        return stop.fault("A109", message, help="choose another name")
    if stop.expected != {"NAME"}:
        return None
    message = f"expected a name after `{stop.last}`, found {found_phrase(stop.kind, stop.token)}"
    remedy = "use letters, digits and `_`; a name cannot start with a digit"
    if stop.head == "use":
        remedy = "write only names: `use windows (shifted, leading)`"
    elif not stop.token[:1].isdigit() or stop.last in (".", "tokens"):
        remedy = _NAMED.get(stop.last, remedy)
    return stop.fault("A121", message, help=remedy)


def equal_missing(stop: ParseStop) -> Fault | None:
    """Recognise a definition or a unit without `=`, or parameters without a comma."""
    if "EQUAL" not in stop.expected or stop.wants_operator:
        return None
    shown = found_phrase(stop.kind, stop.token)
    if stop.kind == "NAME" and "COMMA" in stop.expected and stop.head not in ("over", "per"):
        return stop.fault("A100", f"expected `,`, found {shown}", help="separate parameters by `,`")
    if stop.head in ("over", "per"):
        value = f"{stop.before} {stop.token} {stop.rest}".split()[1:]
        remedy = f"name the unit, `{stop.head} b = {' '.join(value)}`, or a range, `{stop.head} b in low .. high`"
    elif stop.token == ",":
        remedy = f"write a `{stop.head}` line for each name"
    else:
        remedy = f"write `{stop.before.strip() or stop.head} = …`"
    return stop.fault("A111", f"expected `=`, found {shown}", help=remedy)


def operand_missing(stop: ParseStop) -> Fault | None:
    """Recognise a missing expression after an operator, a comma, a bracket or the first word of a line."""
    if not stop.wants_operand or stop.wants_operator:
        return None
    after = f" after {found_phrase('', stop.last)}" if stop.last else ""
    shown = "the line ends" if stop.at_line_end else f"found {found_phrase(stop.kind, stop.token)}"
    if stop.token in RESERVED:
        shown = f"`{stop.token}` cannot start an expression"
    message = f"an expression is missing{after}: {shown}"
    return stop.fault("A102", message, label="expected an expression", help=_operand(stop))


def _operand(stop: ParseStop) -> str:
    """Return the help text for a missing expression."""
    if stop.at_line_end:
        return "write it on this line; an expression may continue on the next line only inside brackets"
    if stop.kind == "TEXT":
        return "expressions cannot contain text; write a comment, `# …`"
    if stop.token == "if":
        return "put the condition in the middle: `a if condition else b`"
    if stop.token == "for":
        return "put the `for` at the end: `any(k == j for j in 0 .. n)`"
    if stop.token == "=" and stop.before.strip() == stop.head:
        return f"remove the `=`: `{stop.head} …`"
    if stop.last == "[":
        return "write at least one entry: `[0]`"
    if stop.last == ",":
        return "remove the `,`, or write what comes next"
    if not re.search(r"\w", stop.last) or stop.last in RESERVED:
        return f"write a value after `{stop.last}`, or remove the `{stop.last}`"
    return f"write a value before `{stop.token}`" if stop.wants_left else ""


def else_missing(stop: ParseStop) -> Fault | None:
    """Recognise an `if` without its `else`."""
    if "ELSE" not in stop.expected:
        return None
    if stop.kind in ("NAME", "NUMBER", "TEXT", "LPAR"):
        return None
    return stop.fault(
        "A119",
        "this `if` has no `else`",
        label="expected `else`",
        help="write `a if condition else b`; join conditions with `and`",
    )
