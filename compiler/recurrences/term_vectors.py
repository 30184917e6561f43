"""The vectors of a pass, taken from the terms of a step or a read."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler import ir
from attnc.compiler.ir import Value
from attnc.compiler.ir.value_nodes import apply, dot, number
from attnc.compiler.recurrences.derived import NoFormError
from attnc.compiler.recurrences.monomials import Factor, Labels, Monomial, product_of


def write_of(term: Monomial, labels: Labels) -> tuple[Value, Value]:
    """Return (k, v) of a term without a state."""
    rows, columns, scalars = _sides(term.factors, labels)
    key = signed(product_of([*scalars, *rows]), term.negative)
    return key, product_of(columns)


def correction_of(term: Monomial, labels: Labels, state: ir.State) -> tuple[Value, Value]:
    """Return (u, r) of a term that contracts the state's first axis."""
    first, *other_labels = term.labels
    if first in labels or tuple(other_labels) != labels[1:]:
        raise NoFormError(f"a correction of `{state.name}` that does not contract its first axis")
    read = [f.value for f in term.factors if f.labels == (first,)]
    others = tuple(f for f in term.factors if f.labels != (first,))
    if not read or any(first in f.labels for f in others):
        raise NoFormError(f"a correction of `{state.name}` by a matrix")
    rows, columns, scalars = _sides(others, labels)
    if columns:
        raise NoFormError(f"a correction of `{state.name}` that differs between columns")
    return signed(product_of([*scalars, *rows]), term.negative), product_of(read)


def _sides(factors: Sequence[Factor], labels: Labels) -> tuple[list[Value], list[Value], list[Value]]:
    """Return the factors along rows, along columns, and the numbers. Raises NoFormError for a factor along both."""
    result: tuple[list[Value], list[Value], list[Value]] = ([], [], [])
    for factor in factors:
        if not factor.labels:
            result[2].append(factor.value)
        elif factor.labels == labels[:1]:
            result[0].append(factor.value)
        elif factor.labels == labels[1:]:
            result[1].append(factor.value)
        else:
            raise NoFormError("a matrix that is not a product of two vectors")
    return result


def is_merged(correction: Monomial, write: Monomial, labels: Labels) -> bool:
    """Check whether a correction's left side is minus the write's key and number, as in the delta rule."""

    def by_row(term: Monomial) -> list[bytes]:
        return sorted(f.value.digest for f in term.factors if f.labels in ((), labels[:1]))

    return correction.negative and not write.negative and by_row(correction) == by_row(write)


def summed(term: Monomial, labels: Labels) -> Value:
    """Return a term without a state, summed over its axes outside `labels`."""
    inner = {label for f in term.factors for label in f.labels} - set(labels)
    if len(inner) > 1 or any(len(f.labels) > 1 and inner & set(f.labels) for f in term.factors):
        raise NoFormError("a product over several axes")
    along = [f.value for f in term.factors if inner & set(f.labels)]
    factors = [f.value for f in term.factors if not inner & set(f.labels)]
    if along:
        first, *others = along
        factors.insert(0, dot(first, product_of(others) if others else number(1.0)))
    return signed(product_of(factors), term.negative)


def signed(value: Value, negative: bool) -> Value:
    """Return a value, negated if `negative`."""
    return apply("neg", value) if negative else value


def terms_of(node: Value) -> list[Value]:
    """Return the terms of a sum."""
    if isinstance(node, ir.Apply) and node.op == "add":
        return [term for operand in node.operands for term in terms_of(operand)]
    return [node]


def factors_of(node: Value) -> list[Value]:
    """Return the factors of a product."""
    if isinstance(node, ir.Apply) and node.op == "mul":
        return [factor for operand in node.operands for factor in factors_of(operand)]
    return [node]
