"""The attentions of a pattern one by one, as patterns of their own."""

from __future__ import annotations

from dataclasses import replace

from attnc.compiler import fold
from attnc.compiler.ir import Attend, Element, Index, Pattern, Softmax, Tensor
from attnc.compiler.rewrite import substitute, substitute_value
from attnc.compiler.values import output, output_lse, values_of


def alone(pattern: Pattern, node: Attend, member: int | None = None) -> Pattern:
    """A pattern of one attention, which reads what others gave as inputs; `member`: one of a family."""
    own = node if member is None or node.family is None else _member(node, member)
    before = [other for other in pattern.nodes if other.name != node.name]
    given = tuple(tensor for other in before for tensor in (output(other), output_lse(other)))
    read = tuple(tensor for tensor in given if tensor in _read(own))
    return replace(pattern, tensors=pattern.tensors + read, nodes=(own,), combine=None, lse=None)


def _read(node: Attend) -> set[Tensor]:
    return {below.tensor for root in values_of(node) for below in root.below if isinstance(below, Element)}


def _member(node: Attend, member: int) -> Attend:
    """One branch of a family."""
    assert node.family is not None
    at: dict[Index, Index] = {node.family[0]: fold.const(member)}
    weights = node.weights
    if not isinstance(weights, Softmax):
        weights = substitute_value(weights, at)
    elif weights.extra is not None:
        weights = Softmax(substitute_value(weights.extra, at))
    stack = node.stack
    if stack is not None:
        stack = (stack[0], substitute(stack[1], at), substitute(stack[2], at))
    return replace(
        node,
        visible=substitute(node.visible, at),
        score=substitute_value(node.score, at),
        weights=weights,
        value=substitute_value(node.value, at),
        keys=None if node.keys is None else substitute(node.keys, at),
        key_of=None if node.key_of is None else substitute(node.key_of, at),
        stack=stack,
        family=None,
    )
