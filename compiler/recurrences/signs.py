"""The sign of a value: whether a gate may be a decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Const, Value
from attnc.spec.number_functions import NUMBER_FUNCTIONS

Sign = Literal["positive", "natural", "negative", "any"]
"""Above 0, at least 0, at most 0, or unknown."""

_NATURAL = ("positive", "natural")


def sign_of(node: Value) -> Sign:
    """Return the sign of a value, as far as the declared types of inputs determine it."""
    match node:
        case ir.Number(value=value):
            return "positive" if value > 0 else "natural" if value == 0 else "negative"
        case ir.Scale():
            return "any"
        case ir.Ratio(num=Const(value=num), den=Const(value=den)):
            return "natural" if num * den >= 0 else "negative"
        case ir.Element(tensor=tensor):
            by_refinement: dict[str | None, Sign] = {"unit": "natural", "log_decay": "negative", "positive": "positive"}
            return by_refinement.get(tensor.refinement, "any")
        case ir.Apply(op=op, operands=operands):
            return _function_sign(op, operands)
        case ir.FloatSelect(then=then, otherwise=otherwise):
            a, b = sign_of(then), sign_of(otherwise)
            return a if a == b else "natural" if a in _NATURAL and b in _NATURAL else "any"
        case _:
            return "any"


_OPPOSITE: Mapping[Sign, Sign] = {
    "positive": "negative",
    "natural": "negative",
    "negative": "natural",
    "any": "any",
}


def _function_sign(op: str, operands: tuple[Value, ...]) -> Sign:
    if op in NUMBER_FUNCTIONS:
        return NUMBER_FUNCTIONS[op].sign
    if op == "share" and all(sign_of(x) in _NATURAL for x in operands):
        return "natural"
    if op == "neg":
        return _OPPOSITE[sign_of(operands[0])]
    if op in ("mul", "div"):
        return _product_sign(*map(sign_of, operands))
    if op == "sub":
        return _difference_sign(*operands)
    if op == "add" and len({sign_of(x) in _NATURAL for x in operands}) == 1:
        signs = [sign_of(x) for x in operands]
        return "natural" if signs[0] in _NATURAL else "negative" if signs == ["negative"] * 2 else "any"
    return "any"


def _product_sign(a: Sign, b: Sign) -> Sign:
    if "any" in (a, b):
        return "any"
    return "natural" if (a in _NATURAL) == (b in _NATURAL) else "negative"


def _difference_sign(a: Value, b: Value) -> Sign:
    """Return the sign of a - b: natural for 1 - f with f in [0, 1], negative for a - logaddexp(a, …)."""
    if isinstance(b, ir.Element) and b.tensor.refinement == "unit" and is_one(a):
        return "natural"
    if isinstance(b, ir.Apply) and b.op == "logaddexp" and a in b.operands:
        return "negative"
    first, second = sign_of(a), sign_of(b)
    if first == "negative" and second in _NATURAL:
        return "negative"
    return "natural" if first in _NATURAL and second == "negative" else "any"


def is_one(node: Value) -> bool:
    """Check whether a value is the number 1."""
    if isinstance(node, ir.Ratio):
        return isinstance(node.num, Const) and isinstance(node.den, Const) and node.num.value == node.den.value
    return isinstance(node, ir.Number) and node.value == 1
