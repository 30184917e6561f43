"""Generic traversals and rewrites of expressions. A rewrite that changes nothing returns the same object.

The constructor of aggregates is here, besides those of `fold`, because it unrolls short aggregates by substitution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np

from attnc.compiler.ir import fold
from attnc.compiler.ir.aggregates import counted
from attnc.compiler.ir.array_evaluator import ONE_LANE, ArrayEvaluator
from attnc.compiler.ir.magnitude import is_small
from attnc.compiler.ir.nodes import (
    VALUES,
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    DataRead,
    ExactSelect,
    FloatSelect,
    Index,
    Linear,
    Lookup,
    Not,
    Reduce,
    RoundToInt,
    Softmax,
    TableRead,
    Truth,
    UnitCondition,
    Value,
    Var,
    intern,
    is_truth,
    structure_fields,
)
from attnc.spec.errors import EvaluationError

if TYPE_CHECKING:
    from attnc.compiler.ir.pattern import Attend, Loop


UNROLL = 64
"""Maximum number of constant trips of an aggregate that is unrolled."""

UNROLLED_NODES = 1 << 14
"""Maximum number of nodes of an unrolled aggregate, counted before folding; larger aggregates are not unrolled."""

CLOSED_STEPS = 1 << 22
"""Maximum number of steps for computing an aggregate of constants at once."""


def walk(root: Index) -> tuple[Index, ...]:
    """Return every distinct node of an expression, including `root`, operands before users."""
    return root.below


def rewrite(root: Index, change: Callable[[Index], Index | None]) -> Index:
    """Rebuild `root` bottom-up by the folding constructors; `change` may replace a node, after its operands.

    A node that folds to a node of another kind, such as one of its operands, is not passed to `change`.
    """
    done: dict[Index, Index] = {}
    for node in walk(root):
        new = rebuild(node, tuple(done[child] for child in node.children()))
        replaced = change(new) if type(new) is type(node) else None
        done[node] = new if replaced is None else replaced
    return done[root]


def substitute(root: Index, values: Mapping[Index, Index]) -> Index:
    """Replace nodes of an exact expression."""
    return rewrite(root, values.get)


def substitute_value(root: Value, values: Mapping[Index, Index]) -> Value:
    """Replace nodes in the exact parts of a floating-point value."""
    return cast("Value", substitute(cast("Index", root), values))


def renamed(root: Value, old: Index, new: Index) -> Value:
    """Replace a variable or a position in the exact parts of a value; the result is kept while the value lives."""
    results = _RENAMED.setdefault(root, {})
    if (old, new) not in results:
        result = substitute_value(root, {old: new})
        results[old, new] = None if result is root else result
    return results[old, new] or root


_RENAMED: WeakKeyDictionary[Value, dict[tuple[Index, Index], Value | None]] = WeakKeyDictionary()


def replace_values(root: Value, values: Mapping[Value, Value]) -> Value:
    """Replace floating-point subexpressions of a floating-point value."""
    return substitute_value(root, cast("Mapping[Index, Index]", values))


def substitute_attend(node: Attend, values: Mapping[Index, Index]) -> Attend:
    """Replace nodes in the exact parts of an attention."""
    weights = node.weights
    if not isinstance(weights, Softmax):
        weights = substitute_value(weights, values)
    elif weights.extra is not None:
        weights = Softmax(substitute_value(weights.extra, values))
    return replace(
        node,
        visible=substitute(node.visible, values),
        score=substitute_value(node.score, values),
        weights=weights,
        value=substitute_value(node.value, values),
        keys=None if node.keys is None else substitute(node.keys, values),
        key_of=None if node.key_of is None else substitute(node.key_of, values),
        stack=_substitute_loop(node.stack, values),
        family=_substitute_loop(node.family, values),
    )


def _substitute_loop(loop: Loop | None, values: Mapping[Index, Index]) -> Loop | None:
    return None if loop is None else (loop[0], substitute(loop[1], values), substitute(loop[2], values))


def rebuild(node: Index, children: tuple[Index, ...]) -> Index:
    """Return a node with other operands, folded; the same node if no operand differs."""
    if all(a is b for a, b in zip(node.children(), children, strict=True)):
        return node
    return _build(node, children)


def _build(node: Index, children: tuple[Index, ...]) -> Index:
    match node:
        case Linear():
            return fold.add(
                fold.const(node.constant),
                *(fold.times(child, c) for child, (_, c) in zip(children, node.terms, strict=True)),
            )
        case Arith():
            return _arith(node.op, children)
        case Coord():
            modulus = children[3] if len(children) == 4 else None
            return fold.coord(children[0], children[1], children[2], modulus, node.name)
        case TableRead():
            return fold.table_read(node.values, children[0])
        case Lookup():
            return fold.lookup(node.tensor, children)
        case DataRead():
            return fold.data_read(node.data, children)
        case Reduce():
            return aggregate(node.op, node.var, *children)
        case _ if isinstance(node, (RoundToInt, *VALUES)):
            if isinstance(node, FloatSelect) and isinstance(children[0], Truth):
                return children[1] if children[0].value else children[2]
            return cast("Index", intern(_with_operands(node, children)))
        case _:
            return _truth(node, children)


def _with_operands(node: Any, children: tuple[Index, ...]) -> Any:
    """Return a node with the same structure and other operands."""
    operands, kind = iter(children), cast("Any", type(node))
    parts = {name: getattr(node, name) for name in structure_fields(kind)}
    for name in node.operand_fields:
        many = isinstance(parts[name], tuple)
        parts[name] = tuple(next(operands) for _ in parts[name]) if many else next(operands)
    return kind(**parts)


def _truth(node: Index, children: tuple[Index, ...]) -> Index:
    match node:
        case Compare():
            return fold.nonnegative(children[0]) if node.op == "ge" else fold.zero(children[0])
        case Bool():
            return fold.conjunction(*children) if node.op == "and" else fold.disjunction(*children)
        case Not():
            return fold.negation(children[0])
        case ExactSelect():
            return fold.choice(*children)
        case UnitCondition():
            k_start = len(node.q_units)
            return fold.rounded(node.q_vars, children[:k_start], node.k_vars, children[k_start:-1], children[-1])
        case _:
            raise AssertionError(f"{type(node).__name__} has no operands to change")


_CONSTRUCTORS: Mapping[str, Callable[..., Index]] = {
    "mul": fold.mul,
    "floordiv": fold.floordiv,
    "mod": fold.mod,
    "pow": fold.power,
    "min": fold.minimum,
    "max": fold.maximum,
    "abs": fold.absolute,
}


def _arith(op: str, operands: tuple[Index, ...]) -> Index:
    build = _CONSTRUCTORS.get(op)
    return build(*operands) if build else fold.function(op, *operands)


def aggregate(
    op: Literal["sum", "min", "max", "any", "all"],
    variable: Var,
    low: Index,
    high: Index,
    condition: Index,
    body: Index,
) -> Index:
    """Return an aggregate. Short aggregates with constant ends are unrolled, except min and max that may be empty.

    A condition that fixes a quotient of the variable becomes part of the range.
    """
    low, high, condition = _narrowed(variable, low, high, condition)
    if op == "sum" and isinstance(condition, Truth) and condition.value and isinstance(body, Const):
        return fold.times(fold.maximum(fold.sub(high, low), fold.const(0)), body.value)
    bounded = isinstance(low, Const) and isinstance(high, Const)
    if bounded and (op not in ("min", "max") or isinstance(condition, Truth)):
        assert isinstance(low, Const)
        assert isinstance(high, Const)
        trips = range(low.value, high.value)
        if 0 < high.value - low.value <= UNROLL or (high.value <= low.value and op not in ("min", "max")):
            nodes = len(trips) * (len(condition.below) + len(body.below))
            if nodes <= UNROLLED_NODES:
                return _unrolled(op, variable, trips, condition, body)
    reduced = intern(Reduce(op, variable, low, high, condition, body))
    value = _closed_value(reduced) if bounded else None
    return reduced if value is None else value


def _closed_value(node: Reduce) -> Index | None:
    """The value of an aggregate of constants; None if it reads anything else, takes too long, or is a fault."""
    bound = {below.var for below in node.below if isinstance(below, Reduce)}
    if not all(isinstance(n, _CLOSED) or (isinstance(n, Var) and n in bound) for n in node.below):
        return None
    origin = np.zeros((1, 1), dtype=np.int64)
    evaluator = ArrayEvaluator(origin, origin, not is_small(node, 1), {}, decide=None)
    try:
        with counted(CLOSED_STEPS):
            if is_truth(node):
                return fold.truth(evaluator.truth(node, ONE_LANE).item())
            return fold.const(int(evaluator.integer(node, ONE_LANE).item()))
    except EvaluationError:
        return None


_CLOSED = (Const, Truth, Linear, Arith, Compare, Bool, Not, ExactSelect, TableRead, Reduce)


def _narrowed(variable: Var, low: Index, high: Index, condition: Index) -> tuple[Index, Index, Index]:
    """Cut the range to `(variable + rest) // divisor == quotient`, if the condition requires that."""
    conjuncts = condition.operands if isinstance(condition, Bool) and condition.op == "and" else (condition,)
    for conjunct in conjuncts:
        stretch = _quotient_asked(conjunct, variable)
        if stretch is not None:
            start, length = stretch
            others = fold.conjunction(*(c for c in conjuncts if c is not conjunct))
            return fold.maximum(low, start), fold.minimum(high, fold.add(start, fold.const(length))), others
    return low, high, condition


def _quotient_asked(condition: Index, variable: Var) -> tuple[Index, int] | None:
    """The start and length of the stretch where `(variable + rest) // length == quotient`; None for others."""
    if not (isinstance(condition, Compare) and condition.op == "eq"):
        return None
    terms, constant = fold.parts(condition.value)
    quotients = [(term, factor, _quotient(term, variable)) for term, factor in terms]
    for term, factor, quotient in quotients:
        if quotient is not None and abs(factor) == 1:
            others = fold.linear([(t, -c * factor) for t, c in terms if t is not term], -constant * factor)
            if mentions(others, variable):
                return None
            inner, divisor = quotient
            return fold.sub(fold.times(others, divisor), fold.sub(inner, variable)), divisor
    return None


def _quotient(node: Index, variable: Var) -> tuple[Index, int] | None:
    """The sum `variable + rest` and the divisor of `(variable + rest) // divisor`; None for other nodes."""
    match node:
        case Arith(op="floordiv", operands=(inner, Const(value=divisor))) if divisor > 0:
            terms, _ = fold.parts(inner)
            others = (term for term, _ in terms if term is not variable)
            is_plain = dict(terms).get(variable) == 1 and not any(mentions(term, variable) for term in others)
            return (inner, divisor) if is_plain else None
        case _:
            return None


def mentions(node: Index, variable: Var) -> bool:
    """Return whether a variable occurs in a node, free or bound."""
    return variable in node.below


def _unrolled(op: str, variable: Var, trips: range, condition: Index, body: Index) -> Index:
    bodies = [substitute(body, {variable: fold.const(i)}) for i in trips]
    conditions = [substitute(condition, {variable: fold.const(i)}) for i in trips]
    pairs = list(zip(conditions, bodies, strict=True))
    match op:
        case "sum":
            return fold.add(*(fold.choice(c, b, fold.const(0)) for c, b in pairs), fold.const(0))
        case "any":
            return fold.disjunction(*(fold.conjunction(c, b) for c, b in pairs))
        case "all":
            return fold.conjunction(*(fold.disjunction(fold.negation(c), b) for c, b in pairs))
        case "min":
            return fold.minimum(*bodies)
        case _:
            return fold.maximum(*bodies)


def variables(root: Index) -> frozenset[Var]:
    """Return the aggregate variables that occur in a node, free or bound."""
    if isinstance(root, Var):
        return frozenset((root,))
    known = _VARIABLES.get(root)
    if known is None:
        known = _VARIABLES[root] = frozenset(node for node in walk(root) if isinstance(node, Var))
    return known


_VARIABLES: WeakKeyDictionary[Index, frozenset[Var]] = WeakKeyDictionary()
