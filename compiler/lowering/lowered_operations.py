"""Operations on lowered values: exact indices, rationals, binary64 constants, floating-point values and tables."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce as accumulate
from math import lcm
from typing import NoReturn, cast

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.ir.print_ir import print_index
from attnc.compiler.ir.rewrite import aggregate, substitute, substitute_value, variables
from attnc.compiler.lowering import rational as exact
from attnc.compiler.lowering.float_tables import arguments
from attnc.compiler.lowering.lower_units import Loop
from attnc.compiler.lowering.rational import Number, Rational
from attnc.spec import program as checked
from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.errors import SpecError
from attnc.spec.exact_operations import EXACT_FUNCTIONS, TRANSCENDENTAL, apply
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault
from attnc.spec.names.builtins import FLOAT_BUILTINS
from attnc.spec.source import Span

Lowered = Index | Rational | float | ir.Value | tuple["Lowered", ...]
"""A lowered expression.

A `float` is a constant in binary64: a result of `sqrt`, `log`, … that `floor` or `ceil` rounds, or a score uses.
"""


class OpenSizeError(Exception):
    """Raised where a constant is needed, but a parameter is left open."""


def number_of(index: Index) -> int:
    """Return an integer that depends on parameters alone, or raise OpenSizeError."""
    if isinstance(index, ir.Const):
        return index.value
    raise OpenSizeError


def _numbered(variable: ir.Var, condition: Index, body: Index) -> tuple[ir.Var, Index, Index]:
    """Rename an aggregate's variable after the height of its body, so that equal aggregates become one node."""
    inside = variables(condition) | variables(body)
    number = 1 + max((v.serial for v in inside if v is not variable), default=0)
    new = fold.var(variable.name, max(number, 1))
    return new, substitute(condition, {variable: new}), substitute(body, {variable: new})


def counted(body: Lowered) -> Lowered:
    """Return a truth value as 1 or 0, and numbers unchanged."""
    if isinstance(body, ir.Node) and not value_nodes.is_value(body) and ir.is_truth(body):
        return fold.choice(body, fold.const(1), fold.const(0))
    return body


def nest(op: str, body: Index, condition: Index, loops: list[Loop]) -> Index:
    """Build nested one-variable aggregates; the innermost loop is last in `loops`."""
    for loop, low, high in reversed(loops):
        assert op in ("sum", "min", "max", "any", "all")
        variable, condition, body = _numbered(loop, condition, body)
        body = aggregate(op, variable, low, high, condition, body)  # type: ignore[arg-type]  # narrowed above
        extreme = op in ("min", "max")
        condition = aggregate("any", variable, low, high, fold.truth(True), condition) if extreme else fold.truth(True)
    return body


def constant(value: checked.Value) -> Lowered:
    """Return the lowered form of a constant of the checked program."""
    match value:
        case bool():
            return fold.truth(value)
        case int():
            return fold.const(value)
        case Fraction():
            return exact.from_fraction(value)
        case tuple():
            return tuple(constant(item) for item in value)


def entry(entries: tuple[checked.Value, ...], index: Index) -> Lowered:
    """Return the entry of a constant table at a computed index."""
    if all(isinstance(v, bool) for v in entries):
        return fold.negation(fold.zero(fold.table_read(tuple(int(bool(v)) for v in entries), index)))
    if any(isinstance(v, tuple) for v in entries):
        rows = [v for v in entries if isinstance(v, tuple)]
        return tuple(entry(column, index) for column in zip(*rows, strict=True))
    numbers = [Fraction(v) for v in entries if not isinstance(v, tuple)]
    denominator = lcm(*(n.denominator for n in numbers))
    numerator = fold.table_read(tuple(int(n * denominator) for n in numbers), index)
    return numerator if denominator == 1 else Rational(numerator, fold.const(denominator))


def element(table: tuple[Lowered, ...], index: Index, span: Span) -> Lowered:
    """Return an entry of a list; a computed index needs a list of constants."""
    if isinstance(index, ir.Const):
        if not 0 <= index.value < len(table):
            fail(span, "A502", f"index {index.value} is outside a list of {len(table)}", "Indices start at 0.")
        return table[index.value]
    constants = [_plain(item) for item in table]
    if all(c is not None for c in constants):
        return entry(tuple(c for c in constants if c is not None), index)
    unsupported(span, "a computed index into a list whose entries are not constants")


def _plain(item: Lowered) -> checked.Scalar | None:
    match item:
        case ir.Const() | ir.Truth():
            return item.value
        case Rational(num=ir.Const() as n, den=ir.Const() as d) if (
            d.value
        ):  # a division by 0 faults where its value is read
            return Fraction(n.value, d.value)
        case _:
            return None


def is_decay(op: str, operands: tuple[Lowered, ...]) -> bool:
    """Whether an operation raises a fraction to a computed power; computed exactly, it would soon exceed 64 bits."""
    return op == "pow" and isinstance(operands[0], Rational) and _plain(operands[1]) is None


def is_floating(op: str, operands: tuple[Lowered, ...]) -> bool:
    """Whether an operation is computed in floating point at run time; operations on constants in binary64 are not."""
    if op in FLOAT_BUILTINS or any(value_nodes.is_value(operand) for operand in operands):
        return True
    if op == "share":
        return True
    return is_binary64(op, operands) and any(
        not isinstance(operand, float) and _plain(operand) is None for operand in operands
    )


def rounded_to_int(op: str, value: ir.Value, span: Span) -> Index:
    """Return `floor` or `ceil` of a value in binary64, which may depend on at most one integer."""
    free = arguments(value)
    if len(free) > 1:
        listed = " and ".join(f"`{print_index(node)}`" for node in sorted(free, key=lambda node: node.digest))
        unsupported(span, f"`{op}` of rounded numbers that depend on {listed}, two integers,")
    if any(variables(node) for node in free):
        unsupported(span, f"`{op}` of a rounded number that changes with the variable of a `for`")
    return ir.intern(ir.RoundToInt("floor" if op == "floor" else "ceil", value))


def floating(op: str, operands: tuple[ir.Value, ...]) -> ir.Value:
    """Return a floating-point operation on values."""
    match op:
        case "dot":
            return value_nodes.dot(*operands)
        case "outer":
            return value_nodes.outer(*operands)
        case "matmul":
            return value_nodes.contract(*operands)
        case "diag":
            return value_nodes.diagonal(*operands)
        case _:
            return value_nodes.apply(op, *operands)


def as_value(lowered: Lowered) -> ir.Value:
    """Return any number as a floating-point value."""
    match lowered:
        case float():
            return value_nodes.number(lowered)
        case Rational(num=num, den=den):
            return value_nodes.ratio(num, den)
        case tuple():
            raise AssertionError("a list is no number")
        case _ if value_nodes.is_value(lowered):
            return lowered
        case _:
            return value_nodes.ratio(as_index(lowered), fold.const(1))


def loop_total(op: str, body: ir.Value, condition: Index, loops: list[Loop]) -> ir.Value:
    """Build nested one-variable aggregates of floating-point numbers; the innermost loop is last in `loops`."""
    if op == "mean":
        count = nest("sum", fold.const(1), condition, loops)
        divisor = value_nodes.ratio(fold.maximum(count, fold.const(1)), fold.const(1))
        return value_nodes.apply("div", loop_total("sum", body, condition, loops), divisor)
    assert op in ("sum", "min", "max")
    for loop, low, high in reversed(loops):
        variable, condition, body = _numbered_value(loop, condition, body)
        body = value_nodes.total(op, variable, low, high, condition, body)  # type: ignore[arg-type]  # narrowed above
        condition = fold.truth(True)
    return body


def _numbered_value(variable: ir.Var, condition: Index, body: ir.Value) -> tuple[ir.Var, Index, ir.Value]:
    """Number the variable of an aggregate as `_numbered` does, for a floating-point body."""
    inside = variables(condition) | variables(cast("Index", body))
    number = 1 + max((v.serial for v in inside if v is not variable), default=0)
    new = fold.var(variable.name, max(number, 1))
    return new, substitute(condition, {variable: new}), substitute_value(body, {variable: new})


def selected(condition: Index, then: Lowered, otherwise: Lowered) -> Lowered:
    """Return `then` where the condition holds, else `otherwise`."""
    if any(value_nodes.is_value(side) or isinstance(side, float) for side in (then, otherwise)):
        return value_nodes.select(condition, as_value(then), as_value(otherwise))
    if isinstance(then, tuple) and isinstance(otherwise, tuple):
        return tuple(selected(condition, a, b) for a, b in zip(then, otherwise, strict=True))
    return exact.choice(condition, as_number(then), as_number(otherwise))


def as_number(value: Lowered) -> Number:
    """Return an integer or a rational; the checker guarantees that the value is one."""
    assert not isinstance(value, float | tuple)
    assert not value_nodes.is_value(value)
    return value


def as_indices(value: Lowered) -> tuple[Index, ...]:
    """Return an integer as a tuple, or the integers of a list."""
    return tuple(map(as_index, value)) if isinstance(value, tuple) else (as_index(value),)


def as_index(value: Lowered) -> Index:
    """Return an integer or a condition; the checker guarantees that the value is one."""
    assert not isinstance(value, Rational | float | tuple)
    assert not value_nodes.is_value(value)
    return value


def is_binary64(op: str, operands: tuple[Lowered, ...]) -> bool:
    """Whether an operation leaves the exact numbers: a root, exponential, logarithm, fractional power, or any float."""
    fractional = op == "pow" and isinstance(operands[1], Rational)
    return op in TRANSCENDENTAL or fractional or any(isinstance(operand, float) for operand in operands)


def in_binary64(op: str, operands: tuple[Lowered, ...], span: Span) -> Lowered:
    """Evaluate an operation on constants in binary64."""
    constants = [operand if isinstance(operand, float) else _plain(operand) for operand in operands]
    if any(value is None for value in constants):
        unsupported(span, f"`{op}` of an expression that is not constant, in a relation,")
    try:
        result = apply(op, tuple(value for value in constants if value is not None))
    except ArithmeticFault as fault:
        fail(span, "A901", str(fault), "Integers have 64 bits; every part of a formula must be defined.")
    return result if isinstance(result, float) else constant(result)


def applied(op: str, operands: tuple[Number, ...], span: Span) -> Number:
    """Return an exact operation on integers and rationals."""
    match op, operands:
        case "neg", (a,):
            return exact.neg(a)
        case "add", (a, b):
            return exact.add(a, b)
        case "sub", (a, b):
            return exact.sub(a, b)
        case "mul", (a, b):
            return exact.mul(a, b)
        case "div", (a, b):
            return exact.div(a, b)
        case "floordiv", (a, b):
            return exact.floordiv(a, b)
        case "mod", (a, b):
            return exact.mod(a, b)
        case "pow", (a, b):
            return exact.power(a, exact.floor(b))
        case (("lt" | "le" | "gt" | "ge" | "eq" | "ne"), (a, b)):
            return _compare(op, a, b)
        case _:
            return _function(op, operands, span)


def _compare(op: str, a: Number, b: Number) -> Index:
    match op:
        case "lt":
            return exact.less(a, b)
        case "le":
            return exact.less_equal(a, b)
        case "gt":
            return exact.less(b, a)
        case "ge":
            return exact.less_equal(b, a)
        case "eq":
            return exact.equal(a, b)
        case _:
            return fold.negation(exact.equal(a, b))


def _function(op: str, operands: tuple[Number, ...], span: Span) -> Number:
    match op, operands:
        case "abs", (a,):
            return exact.absolute(a)
        case "min", _:
            return accumulate(exact.minimum, operands)
        case "max", _:
            return accumulate(exact.maximum, operands)
        case "clamp", (x, low, high):
            return exact.minimum(exact.maximum(x, low), high)
        case "floor", (a,):
            return exact.floor(a)
        case "ceil", (a,):
            return exact.ceil(a)
        case "power_of_two", (a,):
            n = exact.floor(a)
            highest_bit = fold.power(fold.const(2), fold.add(fold.function("bitlen", n), fold.const(-1)))
            return fold.conjunction(fold.less(fold.const(0), n), fold.equal(n, highest_bit))
        case _ if EXACT_FUNCTIONS[op].takes == "integers":
            return fold.function(op, *(exact.floor(a) for a in operands))
        case _:
            unsupported(span, f"`{op}` in a relation")


def unsupported(span: Span, what: str) -> NoReturn:
    """Raise SpecError (A701): the compiler does not support `what` yet."""
    refuse(span, what, "Write it with integer functions, or as a table of parameters.")


def refuse(span: Span, what: str, remedy: str, label: str = "") -> NoReturn:
    """Raise SpecError (A701): `what` is not supported yet; `remedy` says what to write instead."""
    fail(span, "A701", f"{what} is not supported yet", remedy, label)


def fail(span: Span, code: str, message: str, remedy: str, label: str = "") -> NoReturn:
    """Raise SpecError with one diagnostic."""
    raise SpecError((Diagnostic(code, message, Label(span, label), help=remedy),))
