"""Normal forms for comparing two patterns: visible pairs, scores, weights, values, branches, states, selections.

A normal form is a digest as in `canonical`, but the order of factors, of summands, and of the two vectors of an inner
product is ignored. Equal digests prove that two parts are equal. Different digests prove nothing.
"""

from __future__ import annotations

from typing import Any

from attnc.compiler.ir import Apply, Dot, Pattern, Softmax, Value
from attnc.compiler.ir.canonical import Writer, digest_of, own_names

PARTS = ("scores", "weights", "values", "branches", "states", "selections")
"""The parts of a pattern besides its visible pairs."""

_FLATTENED = ("add", "mul", "min", "max")
_SWAPPED = (*_FLATTENED, "logaddexp")


def normal_forms(pattern: Pattern) -> dict[str, bytes]:
    """Return a digest of the `relation` and of each of `PARTS`.

    Names that are local to the text are ignored; names of inputs are not. Alignment, requirements and unread inputs are
    left out.
    """
    writer = _UnorderedWriter(own_names(pattern))
    nodes = pattern.nodes
    return {
        "relation": writer.value([node.visible for node in nodes]),
        "scores": writer.value([node.score for node in nodes]),
        "weights": writer.value([_weights(node.weights) for node in nodes]),
        "values": writer.value([node.value for node in nodes]),
        "branches": writer.value(
            [pattern.combine, pattern.lse, *((node.keys, node.key_of, node.stack, node.family) for node in nodes)]
        ),
        "states": writer.value([*pattern.stateful, pattern.recur]),
        "selections": writer.value(list(pattern.selections)),
    }


def _weights(weights: Softmax | Value) -> tuple[object, ...]:
    return ("softmax", weights.extra) if isinstance(weights, Softmax) else ("own", weights)


class _UnorderedWriter(Writer):
    """Computes digests that ignore the order of the operands of commutative functions."""

    def _structure(self, value: Any) -> bytes:
        match value:
            case Dot(left=left, right=right):
                return digest_of("Dot", *sorted(map(self.value, (left, right))))
            case Apply(op=op) if op in _SWAPPED:
                return digest_of(op, *sorted(map(self.value, _operands(value))))
        return super()._structure(value)


def _operands(value: Apply) -> list[Value]:
    """Return the operands of a function, with operands of nested calls of the same function spliced in."""
    if value.op not in _FLATTENED:
        return list(value.operands)
    result: list[Value] = []
    for operand in value.operands:
        is_nested = isinstance(operand, Apply) and operand.op == value.op
        result += _operands(operand) if is_nested and isinstance(operand, Apply) else [operand]
    return result


__all__ = ["PARTS", "normal_forms"]
