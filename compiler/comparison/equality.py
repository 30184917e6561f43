"""Equality of two relations, decided on all pairs up to a length; that length may prove equality at every length.

The proof. Let M be a common multiple of all divisors, q = M·a + r and k = M·b + s. For given remainders every term is a
multiple of a, of b or of a - b, plus a constant; a condition compares such a term with a constant of at most C. A gap
between 0, a and b of more than C + 1 can be reduced to C + 1 without changing any condition. So if two relations differ
on some pair, they also differ on a pair with a and b at most 2·(C + 1), and all of these pairs are evaluated.

Normal forms compare visible pairs, scores, weights, values, branches, states and selections of two patterns. A normal
form is a digest as in `canonical`, but the order of factors, of summands, and of the two vectors of an inner product
is ignored. Equal digests prove that two parts are equal. Different digests prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.linear_forms import UnknownFormError, common_divisor, largest_constant
from attnc.compiler.ir import Apply, Dot, Extent, Index, Pattern, Softmax, Value
from attnc.compiler.ir.canonical import Writer, digest_of, own_names
from attnc.compiler.ir.rewrite import walk

MOST = 8192
"""Maximum number of tokens for which all pairs are evaluated for a proof."""

ROWS_AT_ONCE = 1 << 22
"""Maximum number of pairs to evaluate together."""


@dataclass(frozen=True)
class Difference:
    """A pair, at `length` tokens, that is visible in only one of two relations; `first`: it is visible in the first."""

    q: int
    k: int
    length: int
    first: bool


def deciding_length(relations: Iterable[Index]) -> int | None:
    """Return a number of tokens whose pairs decide equality at every length; None where no such number is known.

    The relations are specialised and must not depend on the number of tokens.
    """
    roots = list(relations)
    divisor = 1
    for root in roots:
        divisor_of_root = common_divisor(root, MOST)
        if divisor_of_root is None:
            return None
        divisor = lcm(divisor, divisor_of_root)
    try:
        largest = max(largest_constant(root, divisor) for root in roots)
    except UnknownFormError:
        return None
    return divisor * (2 * (largest + 1) + 1)


def first_difference(one: Index, other: Index, n: int) -> Difference | None:
    """Return the first pair of n tokens, by query and then key, on which two relations differ; None for no pair."""
    rows = max(1, ROWS_AT_ONCE // max(n, 1))
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        a, b = (exact_evaluation.mask(relation, (start, stop), (0, n)) for relation in (one, other))
        pairs = np.argwhere(a != b)
        if len(pairs):
            q, k = (int(x) for x in pairs[0])
            return Difference(start + q, k, n, bool(a[q, k]))
    return None


def difference_at(one: Index, other: Index, n: int, q: int, k: int) -> Difference | None:
    """Return the given pair of n tokens if two relations differ on it, else None."""
    in_first, in_other = (exact_evaluation.mask(relation, (q, q + 1), (k, k + 1))[0, 0] for relation in (one, other))
    return None if in_first == in_other else Difference(q, k, n, bool(in_first))


def reads_length(relation: Index) -> bool:
    """Whether a relation depends on the number of tokens."""
    return any(isinstance(node, Extent) and node.name in ("queries", "keys") for node in walk(relation))


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
