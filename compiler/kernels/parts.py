"""Weights that are a sum, `alpha[q] * softmax(score) + beta[q]`, as attentions of their own that are added up.

What a row alone decides is taken out of each summand; a kernel then has weights of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce

from attnc.compiler import fold
from attnc.compiler.ir import Apply, Attend, Pattern, Softmax, Value, VisibleReduce
from attnc.compiler.kernels.score_formula import needs_keys, weights_of
from attnc.compiler.value_nodes import apply, element, number, output, reads
from attnc.compiler.verify_ir import verified


@verified
def in_parts(pattern: Pattern) -> Pattern:
    """Return the pattern with an attention for each summand of its weights that sums over the keys, and one for the
    others; itself where one kernel does, or none.
    """
    if len(pattern.nodes) != 1 or pattern.combine is not None:
        return pattern
    node = pattern.attend
    if isinstance(node.weights, Softmax) or not needs_keys(weights_of(node)[1]):
        return pattern
    parts = list(_summands(node.weights, 1))
    others = [apply("mul", number(float(sign)), part) for part, sign in parts if not needs_keys(part)]
    summands = [_taken_out(part, sign) for part, sign in parts if needs_keys(part)]
    if others:
        summands.append(_taken_out(reduce(partial(apply, "add"), others), 1))
    nodes = [_attention(node, i, own) for i, (_, own) in enumerate(summands)]
    factors = [factor for factor, _ in summands]
    if any(needs_keys(weights_of(part)[1]) for part in nodes) or any(map(needs_keys, factors)):
        return pattern
    combine: Value | None = None
    for factor, part in zip(factors, nodes, strict=True):
        places = fold.head_index("batch"), fold.head_index("head"), fold.place("q")
        scaled = apply("mul", factor, element(output(part), places))
        combine = scaled if combine is None else apply("add", combine, scaled)
    return replace(pattern, nodes=tuple(nodes), combine=combine)


def _summands(value: Value, sign: int) -> Iterator[tuple[Value, int]]:
    """Yield the summands of a value, each with its sign."""
    match value:
        case Apply(op="add" | "sub" as op, operands=(left, right)):
            yield from _summands(left, sign)
            yield from _summands(right, -sign if op == "sub" else sign)
        case Apply(op="neg", operands=(own,)):
            yield from _summands(own, -sign)
        case _:
            yield value, sign


def _taken_out(value: Value, sign: int) -> tuple[Value, Value]:
    """A factor that the row alone decides, and the rest: of a value with a sum over its keys, or of the row alone."""
    factor, rest = number(float(sign)), value
    while any(isinstance(below, VisibleReduce) for below in rest.below):
        match rest:
            case Apply(op="mul", operands=(left, right)) if _is_of_row(left):
                factor, rest = _times(factor, left), right
            case Apply(op="mul", operands=(left, right)) if _is_of_row(right):
                factor, rest = _times(factor, right), left
            case Apply(op="div", operands=(left, right)) if _is_of_row(right):
                factor, rest = apply("div", factor, right), left
            case Apply(op="share", operands=(Apply(op="mul", operands=(left, right)), whole)) if _is_of_row(left):
                factor, rest = _times(factor, left), apply("share", right, whole)
            case Apply(op="share", operands=(Apply(op="mul", operands=(left, right)), whole)) if _is_of_row(right):
                factor, rest = _times(factor, right), apply("share", left, whole)
            case _:
                break
    return (_times(factor, rest), number(1.0)) if _is_of_row(rest) else (factor, rest)


def _times(factor: Value, other: Value) -> Value:
    return other if factor is number(1.0) else apply("mul", factor, other)


def _is_of_row(value: Value) -> bool:
    """Whether it is one number for all keys of a row, and no sum over these."""
    return "k" not in reads(value) and not any(isinstance(below, VisibleReduce) for below in value.below)


def _attention(node: Attend, i: int, weights: Value) -> Attend:
    """The attention of a summand: plain softmax where its weights are that."""
    own = replace(node, name=f"{node.name}_{i}", weights=weights)
    kind, formula = weights_of(own)
    return replace(own, score=formula, weights=Softmax()) if kind == "softmax" else own
