"""Generic traversals and rewrites of expressions. A rewrite that changes nothing returns the same object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from attnc.compiler import fold
from attnc.compiler.ir import (
    VALUES,
    Apply,
    Arith,
    Attend,
    Bool,
    Compare,
    Contract,
    Coord,
    DataRead,
    Dot,
    Element,
    ExactSelect,
    FloatSelect,
    Index,
    Linear,
    Lookup,
    Loop,
    Not,
    Ratio,
    Reduce,
    RoundToInt,
    Softmax,
    Solve,
    StateAt,
    TableRead,
    Truth,
    UnitCondition,
    Value,
    ValueReduce,
    Var,
    Vec,
    VectorPart,
    VisibleReduce,
    intern,
)


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
            return fold.reduce(node.op, node.var, *children)
        case _ if isinstance(node, (RoundToInt, *VALUES)):
            return cast("Index", _value(node, children))
        case _:
            return _truth(node, children)


def _value(node: Any, children: tuple[Any, ...]) -> Any:
    match node:
        case Ratio():
            return intern(Ratio(*children))
        case RoundToInt():
            return intern(RoundToInt(node.op, *children))
        case Element():
            return intern(Element(node.tensor, children))
        case Apply():
            return intern(Apply(node.op, children))
        case Dot():
            return intern(Dot(*children))
        case FloatSelect():
            condition, then, otherwise = children
            if isinstance(condition, Truth):
                return then if condition.value else otherwise
            return intern(FloatSelect(condition, then, otherwise))
        case ValueReduce():
            return intern(ValueReduce(node.op, node.var, *children))
        case VisibleReduce():
            return intern(VisibleReduce(node.op, *children))
        case _:
            return _vector(node, children)


def _vector(node: Any, children: tuple[Any, ...]) -> Any:
    match node:
        case Vec():
            return intern(Vec(node.tensor, *children))
        case VectorPart():
            return intern(VectorPart(children[0], node.number, node.of))
        case Solve():
            return intern(Solve(children[0], children[1], node.steps))
        case Contract():
            return intern(Contract(children[0], children[1], node.left_axis, node.right_axis))
        case StateAt():
            return node
        case _:
            return intern(type(node)(*children))


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


def variables(root: Index) -> frozenset[Var]:
    """Return the aggregate variables that occur in a node, free or bound."""
    return frozenset(node for node in walk(root) if isinstance(node, Var))
