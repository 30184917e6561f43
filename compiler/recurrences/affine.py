"""Steps that are affine entry by entry: `S ← D ⊙ S + W`, with D and W of any form that does not read S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import Step, Value
from attnc.compiler.recurrences.monomials import NonlinearError
from attnc.compiler.value_nodes import apply, number, select, state_at

Affine = tuple[Value | None, Value | None]
"""D and W; None: zero."""


def affine_of(state: ir.State, steps: Sequence[Step]) -> tuple[Value, Value]:
    """(D, W) of the steps of a state one after another. Raises NonlinearError where they are not affine so."""
    whole: Affine = (number(1.0), None)
    for step in steps:
        if step.repeat is not None:
            raise NonlinearError(f"a repeated step of `{state.name}`")
        own = state_at(state.name, step.version, state.dims)
        decay, write = _affine(step.value, own)
        before, written = whole
        whole = times(before, decay), plus(times(written, decay), write)
    return _or_zero(whole[0]), _or_zero(whole[1])


def _affine(node: Value, own: Value) -> Affine:
    if node == own:
        return number(1.0), None
    if not _reads(node, own):
        return None, node
    if isinstance(node, ir.FloatSelect):
        (d, w), (e, x) = (_affine(side, own) for side in (node.then, node.otherwise))
        return _chosen(node, d, e), _chosen(node, w, x)
    if isinstance(node, ir.Apply):
        return _of_function(node, own)
    raise NonlinearError("a step that is not taken entry by entry")


def _reads(node: Value, own: Value) -> bool:
    return any(below is own for below in cast("tuple[Value, ...]", node.below))


def _of_function(node: ir.Apply, own: Value) -> Affine:
    match node.op:
        case "add":
            (d, w), (e, x) = (_affine(operand, own) for operand in node.operands)
            return plus(d, e), plus(w, x)
        case "sub":
            (d, w), (e, x) = (_affine(operand, own) for operand in node.operands)
            return plus(d, _negated(e)), plus(w, _negated(x))
        case "neg":
            d, w = _affine(node.operands[0], own)
            return _negated(d), _negated(w)
        case "mul":
            a, b = node.operands
            factor, other = (a, b) if not _reads(a, own) else (b, a)
            if not _reads(factor, own):
                d, w = _affine(other, own)
                return times(d, factor), times(w, factor)
        case "div":
            a, b = node.operands
            if not _reads(b, own):
                d, w = _affine(a, own)
                return _divided(d, b), _divided(w, b)
    raise NonlinearError(f"`{node.op}` of a state")


def plus(a: Value | None, b: Value | None) -> Value | None:
    """The sum. None: zero."""
    if a is None or b is None:
        return a if b is None else b
    return apply("add", a, b)


def times(a: Value | None, b: Value | None) -> Value | None:
    """The product. None: zero."""
    if a is None or b is None:
        return None
    one = number(1.0)
    return b if a is one else a if b is one else apply("mul", a, b)


def _divided(a: Value | None, b: Value) -> Value | None:
    return None if a is None else apply("div", a, b)


def _or_zero(a: Value | None) -> Value:
    return number(0.0) if a is None else a


def _negated(a: Value | None) -> Value | None:
    return None if a is None else apply("neg", a)


def _chosen(node: ir.FloatSelect, a: Value | None, b: Value | None) -> Value | None:
    if a is None and b is None:
        return None
    return select(node.condition, _or_zero(a), _or_zero(b))


__all__ = ["affine_of", "plus", "times"]
