"""The keys that one row sees, by formulas of its position and of the number of keys.

A decoding step at a new length evaluates a few numbers instead of analysing the relation again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnc.compiler.analysis.token_ranges import TokenRange, find_ranges
from attnc.compiler.ir import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    ExactSelect,
    Extent,
    HeadIndex,
    Index,
    Linear,
    Lookup,
    Not,
    Position,
    Truth,
)
from attnc.compiler.ir.magnitude import is_small
from attnc.compiler.lowering.specialise import of_any_length

Scalar = Callable[[int, int], int]
"""A function of a row's position and the number of keys."""

LONGEST = 1 << 40
"""Number of keys up to which no step of a formula may exceed 64 bits."""


class _NoFormulaError(Exception):
    """Raised where an expression has no formula here."""


@dataclass(frozen=True, eq=False)
class RowKeys:
    """Ranges of keys, each from its first key up to its last, both by formulas; None for an open end."""

    ends: tuple[tuple[Scalar | None, Scalar | None], ...]

    def at(self, position: int, count: int) -> list[tuple[int, int]]:
        """Return the keys among `count` that the row at a position sees: disjoint half-open ranges, in order."""
        ranges = []
        for first, last in self.ends:
            start = 0 if first is None else max(first(position, count), 0)
            stop = count if last is None else min(last(position, count) + 1, count)
            if start < stop:
                ranges.append((start, stop))
        if len(ranges) < 2:
            return ranges
        ranges.sort()
        joined = ranges[:1]
        for start, stop in ranges[1:]:
            if start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        return joined


def find_row_keys(relation: Index, heads: int, group: int) -> RowKeys | None:
    """Return the keys of each row of a relation that reads positions and lengths alone; None for other relations.

    The relation is that of the last rows of a call, whose `q` is the position among the keys.
    """
    if any(isinstance(node, (HeadIndex, Lookup)) for node in relation.below):
        return None
    try:
        specialised = of_any_length(relation, 0, heads, group)
    except KeyError:
        return None
    ranges = find_ranges(specialised, "k")
    if ranges is None:
        return None
    try:
        return RowKeys(tuple(_ends(token_range) for token_range in ranges))
    except _NoFormulaError:
        return None


def _ends(token_range: TokenRange) -> tuple[Scalar | None, Scalar | None]:
    low, high = token_range.low, token_range.high
    return None if low is None else _formula(low), None if high is None else _formula(high)


def _formula(node: Index) -> Scalar:
    if not is_small(node, LONGEST):
        raise _NoFormulaError
    return _scalar(node)


def _scalar(node: Index) -> Scalar:  # noqa: C901  one case per kind
    """Return an expression as a function. Raises _NoFormulaError."""
    match node:
        case Const(value=value):
            return lambda q, n: value
        case Position(name="q"):
            return lambda q, n: q
        case Extent(name="keys"):
            return lambda q, n: n
        case Truth(value=value):
            return lambda q, n: value
        case Linear():
            return _sum([(_scalar(term), factor) for term, factor in node.terms], node.constant)
        case Coord(extent=None, stride=Const(value=stride)) if stride > 0:
            position, offset = _scalar(node.position), _scalar(node.offset)
            return lambda q, n: (position(q, n) - offset(q, n)) // stride
        case Arith():
            return _operation(node.op, [_scalar(operand) for operand in node.operands], node.operands)
        case Compare():
            value_of, is_order = _scalar(node.value), node.op == "ge"
            return lambda q, n: value_of(q, n) >= 0 if is_order else value_of(q, n) == 0
        case Bool():
            operands, holds = [_scalar(operand) for operand in node.operands], all if node.op == "and" else any
            return lambda q, n: holds(operand(q, n) for operand in operands)
        case Not():
            negated = _scalar(node.operand)
            return lambda q, n: not negated(q, n)
        case ExactSelect():
            condition, then, otherwise = (_scalar(x) for x in (node.condition, node.then, node.otherwise))
            return lambda q, n: then(q, n) if condition(q, n) else otherwise(q, n)
        case _:
            raise _NoFormulaError


def _sum(terms: Sequence[tuple[Scalar, int]], constant: int) -> Scalar:
    if len(terms) == 1:
        ((term, factor),) = terms
        return lambda q, n: constant + factor * term(q, n)
    return lambda q, n: constant + sum(factor * term(q, n) for term, factor in terms)


def _operation(op: str, operands: Sequence[Scalar], nodes: Sequence[Index]) -> Scalar:
    """Return an operation that has no faults: divisors are positive constants. Raises _NoFormulaError."""
    if op in ("min", "max"):
        extreme = min if op == "min" else max
        return lambda q, n: extreme(operand(q, n) for operand in operands)
    if op == "abs":
        (inner,) = operands
        return lambda q, n: abs(inner(q, n))
    if op in ("floordiv", "mod") and isinstance(nodes[1], Const) and nodes[1].value > 0:
        dividend, divisor, is_quotient = operands[0], nodes[1].value, op == "floordiv"
        return lambda q, n: dividend(q, n) // divisor if is_quotient else dividend(q, n) % divisor
    raise _NoFormulaError
