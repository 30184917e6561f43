"""Elementwise affine steps `S ← D ⊙ S + W`, where D and W are any expressions that do not read S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import Step, Value
from attnc.compiler.ir.value_nodes import (
    apply,
    number,
    select,
    state_at,
)
from attnc.compiler.recurrences.monomials import NonlinearError

Affine = tuple[Value | None, Value | None]
"""The factor D and the addend W of a step; None for zero."""


def affine_of(state: ir.State, steps: Sequence[Step]) -> tuple[Value, Value]:
    """Return (D, W) of all steps of a state in sequence. Raises NonlinearError if a step is not elementwise affine."""
    total: Affine = (number(1.0), None)
    for step in steps:
        if step.repeat is not None:
            raise NonlinearError(f"a repeated step of `{state.name}`")
        state_node = state_at(state.name, step.version, state.dims)
        decay, write = _affine(step.value, state_node)
        before, written = total
        total = times(before, decay), plus(times(written, decay), write)
    return _or_zero(total[0]), _or_zero(total[1])


def _affine(node: Value, state_node: Value) -> Affine:
    if node == state_node:
        return number(1.0), None
    if not _reads(node, state_node):
        return None, node
    if isinstance(node, ir.FloatSelect):
        (d, w), (e, x) = (_affine(side, state_node) for side in (node.then, node.otherwise))
        return _select(node, d, e), _select(node, w, x)
    if isinstance(node, ir.Apply):
        return _affine_function(node, state_node)
    raise NonlinearError("a step that is not elementwise")


def _reads(node: Value, state_node: Value) -> bool:
    return any(child is state_node for child in cast("tuple[Value, ...]", node.below))


def _affine_function(node: ir.Apply, state_node: Value) -> Affine:
    match node.op:
        case "add":
            (d, w), (e, x) = (_affine(operand, state_node) for operand in node.operands)
            return plus(d, e), plus(w, x)
        case "sub":
            (d, w), (e, x) = (_affine(operand, state_node) for operand in node.operands)
            return plus(d, _negated(e)), plus(w, _negated(x))
        case "neg":
            d, w = _affine(node.operands[0], state_node)
            return _negated(d), _negated(w)
        case "mul":
            a, b = node.operands
            factor, other = (a, b) if not _reads(a, state_node) else (b, a)
            if not _reads(factor, state_node):
                d, w = _affine(other, state_node)
                return times(d, factor), times(w, factor)
        case "div":
            a, b = node.operands
            if not _reads(b, state_node):
                d, w = _affine(a, state_node)
                return _divided(d, b), _divided(w, b)
    raise NonlinearError(f"`{node.op}` of a state")


def plus(a: Value | None, b: Value | None) -> Value | None:
    """Return the sum of two values; None is zero."""
    if a is None or b is None:
        return a if b is None else b
    return apply("add", a, b)


def times(a: Value | None, b: Value | None) -> Value | None:
    """Return the product of two values; None is zero."""
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


def _select(node: ir.FloatSelect, a: Value | None, b: Value | None) -> Value | None:
    if a is None and b is None:
        return None
    return select(node.condition, _or_zero(a), _or_zero(b))
