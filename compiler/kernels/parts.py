"""Weights that are a sum, such as `alpha[q] * softmax(score) + beta[q]`, split into one attention per summand.

Factors that depend on the row alone are taken out of each summand, so that each kernel has one kind of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce

from attnc.compiler.ir import Apply, Attend, Pattern, Softmax, Value, VisibleReduce, fold
from attnc.compiler.ir.value_nodes import (
    apply,
    element,
    number,
    output,
    reads,
)
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.kernels.score_formula import needs_keys, weights_of


@verified
def in_parts(pattern: Pattern) -> Pattern:
    """Return the pattern with its weights split into summands, each with an attention.

    Every summand that sums over the keys gets an attention; all others share one. The pattern is returned unchanged if
    one kernel computes it as it is, or if no kernel computes its summands.
    """
    if len(pattern.nodes) != 1 or pattern.combine is not None:
        return pattern
    node = pattern.attend
    if isinstance(node.weights, Softmax) or not needs_keys(weights_of(node)[1]):
        return pattern
    parts = list(_summands(node.weights, 1))
    others = [apply("mul", number(float(sign)), part) for part, sign in parts if not needs_keys(part)]
    summands = [_split_row_factor(part, sign) for part, sign in parts if needs_keys(part)]
    if others:
        summands.append(_split_row_factor(reduce(partial(apply, "add"), others), 1))
    nodes = [_attention(node, i, weights) for i, (_, weights) in enumerate(summands)]
    factors = [factor for factor, _ in summands]
    if any(needs_keys(weights_of(part)[1]) for part in nodes) or any(map(needs_keys, factors)):
        return pattern
    combine: Value | None = None
    for factor, part in zip(factors, nodes, strict=True):
        indices = fold.head_index("batch"), fold.head_index("head"), fold.place("q")
        scaled = apply("mul", factor, element(output(part), indices))
        combine = scaled if combine is None else apply("add", combine, scaled)
    return replace(pattern, nodes=tuple(nodes), combine=combine)


def _summands(value: Value, sign: int) -> Iterator[tuple[Value, int]]:
    """Yield the summands of a value, each with its sign."""
    match value:
        case Apply(op="add" | "sub" as op, operands=(left, right)):
            yield from _summands(left, sign)
            yield from _summands(right, -sign if op == "sub" else sign)
        case Apply(op="neg", operands=(operand,)):
            yield from _summands(operand, -sign)
        case _:
            yield value, sign


def _split_row_factor(value: Value, sign: int) -> tuple[Value, Value]:
    """Split a summand into a factor that depends on the row alone and the rest, which is 1 if nothing else is left."""
    factor, rest = number(float(sign)), value
    while any(isinstance(part, VisibleReduce) for part in rest.below):
        match rest:
            case Apply(op="mul", operands=(left, right)) if _is_row_factor(left):
                factor, rest = _times(factor, left), right
            case Apply(op="mul", operands=(left, right)) if _is_row_factor(right):
                factor, rest = _times(factor, right), left
            case Apply(op="div", operands=(left, right)) if _is_row_factor(right):
                factor, rest = apply("div", factor, right), left
            case Apply(op="share", operands=(Apply(op="mul", operands=(left, right)), total)) if _is_row_factor(left):
                factor, rest = _times(factor, left), apply("share", right, total)
            case Apply(op="share", operands=(Apply(op="mul", operands=(left, right)), total)) if _is_row_factor(right):
                factor, rest = _times(factor, right), apply("share", left, total)
            case _:
                break
    return (_times(factor, rest), number(1.0)) if _is_row_factor(rest) else (factor, rest)


def _times(factor: Value, other: Value) -> Value:
    """Return a product; a factor of one is left out."""
    return other if factor is number(1.0) else apply("mul", factor, other)


def _is_row_factor(value: Value) -> bool:
    """Whether a value is one number for all keys of a row and contains no sum over these keys."""
    return "k" not in reads(value) and not any(isinstance(part, VisibleReduce) for part in value.below)


def _attention(node: Attend, i: int, weights: Value) -> Attend:
    """Return the attention of a summand, with the plain softmax if the summand is one."""
    summand = replace(node, name=f"{node.name}_{i}", weights=weights)
    kind, formula = weights_of(summand)
    return replace(summand, score=formula, weights=Softmax()) if kind == "softmax" else summand
