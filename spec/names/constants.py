"""Evaluate constants in declarations: the defaults of parameters and the values of presets."""

from __future__ import annotations

from attnc.spec import syntax
from attnc.spec.exact_operations import apply
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault
from attnc.spec.names.builtins import HINTS
from attnc.spec.program import Scalar, Value
from attnc.spec.source import Span

_OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "**": "pow"}


class NotConstant(Exception):  # noqa: N818 (an error in the source text)
    """Raised for an expression that is not a constant."""

    def __init__(self, message: str, span: Span, label: str = "", help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.span = span
        self.label = label
        self.help = help


def constant(expression: syntax.Expr) -> Value:
    """Return the value of a number, a truth value, a list or arithmetic on numbers.

    Raises `NotConstant` for any other expression.
    """
    match expression:
        case syntax.NumberExpr(value=value) | syntax.BoolExpr(value=value):
            return value
        case syntax.ListExpr(items=items):
            return tuple(constant(item) for item in items)
        case syntax.UnaryExpr(op="-", operand=operand):
            return _apply(expression.span, "neg", operand)
        case syntax.UnaryExpr(op="+", operand=operand):
            return constant(operand)
        case syntax.BinaryExpr(op=op, left=left, right=right) if op in _OPERATORS:
            return _apply(expression.span, _OPERATORS[op], left, right)
    help_ = "write numbers, true or false, or a list of them"
    if isinstance(expression, syntax.NameExpr):
        help_ = HINTS.get(expression.id, help_)
    raise NotConstant("a default or a preset's value must be a constant", expression.span, "not a constant", help_)


def _apply(span: Span, op: str, *operands: syntax.Expr) -> Scalar:
    values = []
    for operand in operands:
        value = constant(operand)
        if isinstance(value, bool | tuple):
            raise NotConstant("arithmetic needs numbers", operand.span, "not a number", "write a number")
        values.append(value)
    try:
        result = apply(op, tuple(values))
    except ArithmeticFault as fault:
        raise NotConstant(str(fault), span, "here", "write the value itself") from None
    if isinstance(result, float):
        raise NotConstant("this power is not exact", span, "a fractional power", "write the value itself")
    return result
