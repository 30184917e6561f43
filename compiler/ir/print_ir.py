"""The text of a pattern in the IR: a line per declaration, then nodes, with expressions in the language's syntax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING

from attnc.compiler.ir.derivatives import Derivative, derivatives
from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.nodes import (
    Apply,
    Arith,
    Bool,
    Compare,
    Const,
    Contract,
    Coord,
    DataRead,
    Diagonal,
    Dot,
    Element,
    ExactSelect,
    Extent,
    Eye,
    FloatSelect,
    HeadIndex,
    Index,
    Linear,
    Lookup,
    Not,
    Number,
    Outer,
    Pick,
    Position,
    Ranking,
    Ratio,
    Reduce,
    RoundToInt,
    Scale,
    Softmax,
    Solve,
    StateAt,
    TableRead,
    Tensor,
    Truth,
    UnitCondition,
    Value,
    ValueReduce,
    Var,
    Vec,
    VectorPart,
    VisibleReduce,
)
from attnc.compiler.ir.value_nodes import is_default, is_scored

if TYPE_CHECKING:
    from attnc.compiler.ir.pattern import Attend, Loop, Pattern, Recur, Segment, Selection


def print_pattern(pattern: Pattern) -> str:
    """Return the text of a whole pattern."""
    lines = [f"pattern {pattern.name}{_parameters(pattern.parameters)}"]
    lines.extend(f"    {'made' if tensor.made else 'input'} {_tensor(tensor)}" for tensor in pattern.tensors)
    lines.extend(f"    tokens {_segment(segment)}" for segment in pattern.segments)
    if pattern.align is not None:
        lines.append(f"    align {pattern.align}")
    if pattern.documents is not None:
        lines.append(f"    documents {pattern.documents.name}")
    lines.extend(f"    require {print_index(condition)}" for condition, _ in pattern.requirements)
    for recur in pattern.stateful:
        lines.append(f"    branch {recur.name}" + ("" if recur.member is None else f"[{recur.member}]"))
        lines.extend(f"        {line}" for line in _recur(recur))
    for selection in pattern.selections:
        lines.extend(f"    {line}" for line in _selection(selection))
    for node in pattern.nodes:
        lines.extend(f"    {line}" for line in _attend(node))
    if pattern.recur is not None:
        lines.extend(f"    {line}" for line in _recur(pattern.recur))
    if pattern.combine is not None:
        lines.append(f"    combine {print_value(pattern.combine)}")
    return "\n".join(lines)


def _parameters(values: Mapping[str, object]) -> str:
    return f"({', '.join(f'{name} = {_constant(value)}' for name, value in values.items())})" if values else ""


def _constant(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_constant, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tensor(tensor: Tensor) -> str:
    return f"{tensor.name}: {tensor.kind}" + (f"[{', '.join(map(str, tensor.dims))}]" if tensor.dims else "")


def _segment(segment: Segment) -> str:
    axes = ", ".join(f"{name}: {print_index(extent)}" for name, extent in segment.axes)
    return axes if segment.name is None else f"{segment.name}({axes}) at {print_index(segment.offset)}"


def _attend(node: Attend) -> list[str]:
    lines = [f"attend {node.name}{'' if node.family is None else f'[{_loop(node.family)}]'}"]
    if node.keys is not None:
        lines.append(f"    keys    {print_index(node.keys)}")
    if node.stack is not None:
        lines.append(f"    stack   {_loop(node.stack)}")
    return [
        *lines,
        f"    visible {print_index(node.visible)}",
        f"    score   {print_value(node.score)}",
        *(f"        by {_derivative(derivative)}" for derivative in _derivatives(node)),
        f"    weights {_weights(node.weights)}",
        f"    value   {print_value(node.value)}",
    ]


def _selection(item: Selection) -> Iterator[str]:
    yield f"select {_tensor(item.given)}{' of all pairs' if item.pairs else ''}"
    for word, node in (("rows", item.rows), ("places", item.items)):
        if node is not None:
            yield f"    {word:<7} {print_index(node)}"
    yield f"    score   {print_value(item.score)}"
    yield f"    from    {print_index(item.candidates)}"
    yield f"    keep    {print_value(item.keep)}"
    yield f"    always  {print_index(item.always)}"


def _recur(recur: Recur) -> Iterator[str]:
    """Yield the lines of a recurrence; a state with n strokes is the state after n of its steps."""
    for state in recur.states:
        start = f" = {state.start}" if state.start else ""
        kind = "complex" if state.is_complex else ""
        yield f"state {state.name}: {kind}[{', '.join(map(str, state.dims))}]{start}"
    if recur.order is not None:
        yield f"scan {print_index(recur.order)}"
    if recur.reset is not None:
        yield f"reset {print_index(recur.reset)}"
    for step in recur.steps:
        loop = "" if step.repeat is None else f" for {_loop(step.repeat)}"
        yield f"step {step.state}{chr(39) * (step.version + 1)} = {print_value(step.value)}{loop}"
    yield f"read {print_value(recur.read)}"


def _derivatives(node: Attend) -> tuple[Derivative, ...]:
    """Return the derivatives that a score's backward needs; none for `scale * dot(q, k)`, whose backward is implied."""
    return derivatives(node.score) if is_scored(node) and not is_default(node.score) else ()


def _derivative(derivative: Derivative) -> str:
    always = isinstance(derivative.where, Truth) and derivative.where.value
    where = "" if always else f" where {print_index(derivative.where)}"
    return f"{print_value(derivative.atom)}: {print_value(derivative.by)}{where}"


def _loop(loop: Loop) -> str:
    variable, low, high = loop
    return f"{_atom(variable)} in {_text(low, Precedence.SUM)} .. {_text(high, Precedence.SUM)}"


def _weights(weights: Softmax | Value) -> str:
    if not isinstance(weights, Softmax):
        return print_value(weights)
    return "softmax(score)" if weights.extra is None else f"softmax(score, extra = {print_value(weights.extra)})"


# --- exact expressions -----------------------------------------------------------------------------------------------


class Precedence(IntEnum):
    """The precedence of operators, from loose to tight."""

    CHOICE = 0
    OR = 1
    AND = 2
    NOT = 3
    COMPARISON = 4
    SUM = 5
    PRODUCT = 6
    UNARY = 7
    POWER = 8
    ATOM = 9


def print_index(node: Index) -> str:
    """Return the text of an exact expression; bound variables carry their serial, which makes them unique."""
    return _text(node, Precedence.CHOICE)


def _text(node: Index, level: Precedence) -> str:
    """The text of an expression, in parentheses where its precedence is lower than `level`."""
    text, precedence = _expression(node)
    return text if precedence >= level else f"({text})"


def _expression(node: Index) -> tuple[str, Precedence]:
    match node:
        case Const():
            return str(node.value), Precedence.ATOM if node.value >= 0 else Precedence.UNARY
        case Linear():
            return _linear(node)
        case Arith():
            return _arith(node)
        case Compare():
            return _comparison(node), Precedence.COMPARISON
        case Bool():
            level = Precedence.AND if node.op == "and" else Precedence.OR
            return f" {node.op} ".join(_text(operand, Precedence(level + 1)) for operand in node.operands), level
        case Not():
            return f"not {_text(node.operand, Precedence.NOT)}", Precedence.NOT
        case ExactSelect():
            condition, otherwise = _text(node.condition, Precedence.OR), _text(node.otherwise, Precedence.CHOICE)
            return f"{_text(node.then, Precedence.OR)} if {condition} else {otherwise}", Precedence.CHOICE
        case _:
            return _atom(node), Precedence.ATOM


def _atom(
    node: Truth
    | Position
    | HeadIndex
    | Extent
    | Var
    | Coord
    | TableRead
    | Lookup
    | DataRead
    | Reduce
    | RoundToInt
    | UnitCondition,
) -> str:
    match node:
        case Truth():
            return "true" if node.value else "false"
        case Position() | HeadIndex() | Extent():
            return node.name
        case Var():
            return f"{node.name}'{node.serial}"
        case Coord():
            return _coordinate(node)
        case TableRead():
            return f"[{', '.join(map(str, node.values))}][{print_index(node.index)}]"
        case Lookup() | DataRead():
            name = node.tensor.name if isinstance(node, Lookup) else node.data.name
            return f"{name}[{_list(node.indices)}]" if node.indices else name
        case Reduce():
            return _reduce(node)
        case RoundToInt():
            return f"{node.op}({print_value(node.value)})"
        case UnitCondition():
            units = ", ".join(f"{_atom(var)} = {print_index(unit)}" for var, unit in node.units)
            return f"round({print_index(node.keep)} per {units})"


def _coordinate(node: Coord) -> str:
    """The text of a coordinate, such as `q.t`; a compound position is put in parentheses."""
    return f"{_text(node.position, Precedence.ATOM)}.{node.name}"


def _reduce(node: Reduce) -> str:
    return f"{node.op}({print_index(node.body)} for {_loop((node.var, node.low, node.high))}{_where(node.condition)})"


def _where(condition: Index) -> str:
    """The text of the condition of an aggregate."""
    always = isinstance(condition, Truth) and condition.value
    return "" if always else f" if {_text(condition, Precedence.OR)}"


def _list(nodes: tuple[Index, ...]) -> str:
    return ", ".join(map(print_index, nodes))


def _linear(node: Linear) -> tuple[str, Precedence]:
    """The text of a sum, with positive terms first, so that it seldom starts with a minus."""
    terms = [(_term(term, abs(factor)), factor) for term, factor in node.terms]
    terms += [(str(abs(node.constant)), node.constant)] if node.constant else []
    terms.sort(key=lambda item: item[1] < 0)
    first, factor = terms[0]
    if len(terms) == 1:
        return (first, Precedence.PRODUCT) if factor > 0 else (f"-({first})", Precedence.UNARY)
    start = first if factor > 0 else f"-({first})"
    return start + "".join(f" {'-' if f < 0 else '+'} {text}" for text, f in terms[1:]), Precedence.SUM


def _term(term: Index, factor: int) -> str:
    return _text(term, Precedence.PRODUCT) if factor == 1 else f"{factor} * {_text(term, Precedence.UNARY)}"


def _arith(node: Arith) -> tuple[str, Precedence]:
    operation = INTEGER_OPERATIONS.get(node.op)
    if operation is None or not operation.word:
        return f"{node.op}({_list(node.operands)})", Precedence.ATOM
    a, b = node.operands
    if node.op == "pow":
        return f"{_text(a, Precedence.ATOM)} {operation.word} {_text(b, Precedence.UNARY)}", Precedence.POWER
    return f"{_text(a, Precedence.PRODUCT)} {operation.word} {_text(b, Precedence.UNARY)}", Precedence.PRODUCT


def _comparison(node: Compare) -> str:
    """The text of a comparison: negative terms and constants go to the right; `x - 1 >= y` becomes `x > y`."""
    value = node.value
    terms, constant = (value.terms, value.constant) if isinstance(value, Linear) else (((value, 1),), 0)
    strict = node.op == "ge" and constant == -1
    left = [_term(term, factor) for term, factor in terms if factor > 0]
    right = [_term(term, -factor) for term, factor in terms if factor < 0]
    constant += strict
    if constant and not right:
        right.append(str(-constant))
    elif constant and (constant > 0 or not left):
        left.append(str(constant))
    elif constant:
        right.append(str(-constant))
    word = "==" if node.op == "eq" else ">" if strict else ">="
    return f"{_sum(left)} {word} {_sum(right)}"


def _sum(terms: list[str]) -> str:
    return " + ".join(terms) if terms else "0"


# --- values ----------------------------------------------------------------------------------------------------------

_OPERATORS = {
    "add": ("+", Precedence.SUM, Precedence.PRODUCT),
    "sub": ("-", Precedence.SUM, Precedence.PRODUCT),
    "mul": ("*", Precedence.PRODUCT, Precedence.UNARY),
    "div": ("/", Precedence.PRODUCT, Precedence.UNARY),
    "share": ("/", Precedence.PRODUCT, Precedence.UNARY),
}
"""The sign, the precedence of the operation and its left operand, and the precedence of its right operand."""


def print_value(node: Value) -> str:
    """Return the text of a floating-point expression."""
    return _value_text(node, Precedence.CHOICE)


def _value_text(node: Value, level: Precedence) -> str:
    text, precedence = _value(node)
    return text if precedence >= level else f"({text})"


def _value(node: Value) -> tuple[str, Precedence]:
    match node:
        case Ratio():
            return _ratio(node)
        case Apply():
            return _applied(node)
        case FloatSelect():
            condition, otherwise = _text(node.condition, Precedence.OR), _value_text(node.otherwise, Precedence.CHOICE)
            return f"{_value_text(node.then, Precedence.OR)} if {condition} else {otherwise}", Precedence.CHOICE
        case Number():
            return repr(node.value), Precedence.ATOM if node.value >= 0 else Precedence.UNARY
        case _:
            return _value_atom(node), Precedence.ATOM


def _ratio(node: Ratio) -> tuple[str, Precedence]:
    if isinstance(node.den, Const) and node.den.value == 1:
        return _expression(node.num)
    return f"{_text(node.num, Precedence.PRODUCT)} / {_text(node.den, Precedence.UNARY)}", Precedence.PRODUCT


def _applied(node: Apply) -> tuple[str, Precedence]:
    if node.op in _OPERATORS:
        sign, left, right = _OPERATORS[node.op]
        a, b = node.operands
        return f"{_value_text(a, left)} {sign} {_value_text(b, right)}", left
    if node.op == "neg":
        return f"-{_value_text(node.operands[0], Precedence.UNARY)}", Precedence.UNARY
    if node.op == "pow":
        a, b = node.operands
        return f"{_value_text(a, Precedence.ATOM)} ** {_value_text(b, Precedence.UNARY)}", Precedence.POWER
    return f"{node.op}({', '.join(map(print_value, node.operands))})", Precedence.ATOM


def _value_atom(node: Value) -> str:
    match node:
        case Vec():
            return _vector(node)
        case Scale():
            return "scale"
        case Element():
            return f"{node.tensor.name}[{_list(node.indices)}]" if node.indices else node.tensor.name
        case Dot() | Outer():
            name = "dot" if isinstance(node, Dot) else "outer"
            return f"{name}({print_value(node.left)}, {print_value(node.right)})"
        case Contract():
            return f"({_value_text(node.left, Precedence.UNARY)} @ {_value_text(node.right, Precedence.UNARY)})"
        case StateAt():
            return node.name + "'" * node.version
        case ValueReduce():
            loop = _loop((node.var, node.low, node.high))
            return f"{node.op}({print_value(node.body)} for {loop}{_where(node.condition)})"
        case _:
            return _matrix_atom(node)


def _matrix_atom(node: Value) -> str:
    match node:
        case Ranking():
            return node.name
        case VisibleReduce():
            return f"{node.op}({print_value(node.body)} for k{_where(node.condition)})"
        case Pick():
            return f"{_value_text(node.vector, Precedence.ATOM)}[{print_index(node.index)}]"
        case VectorPart():
            return f"part({print_value(node.vector)}, {node.number}, {node.of})"
        case Eye():
            return f"eye({print_index(node.size)})"
        case Diagonal():
            return f"diag({print_value(node.vector)})"
        case Solve():
            steps = "" if node.steps is None else f", {node.steps} steps"
            return f"solve({print_value(node.matrix)}, {print_value(node.vector)}{steps})"
        case _:
            raise AssertionError(node)


def _vector(node: Vec) -> str:
    """The text of a vector: `q`; `k[j]` at another position; `k[j] of head h` of another head."""
    is_current = isinstance(node.at, Position) and node.at.name == ("q" if node.tensor == "q" else "k")
    position = "" if is_current else f"[{print_index(node.at)}]"
    is_current_head = isinstance(node.head, HeadIndex) and node.head.name == "head"
    return (
        f"{node.tensor}{position}" if is_current_head else f"({node.tensor}{position} of head {print_index(node.head)})"
    )
