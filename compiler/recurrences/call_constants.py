"""Values of a derived recurrence that are equal at all tokens and computed once per call, however tokens are cut."""

from __future__ import annotations

from functools import reduce
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import Index, Value, fold
from attnc.compiler.ir.value_nodes import apply, axes, rank
from attnc.compiler.recurrences.derived import values_of
from attnc.compiler.recurrences.monomials import product_of
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.compiler.recurrences.term_vectors import factors_of, terms_of

BY_TOKEN = frozenset({"token", "query", "key"})
"""Dimensions of an input that count tokens."""


def constants_of(derived: RecurrenceForm) -> tuple[Value, ...]:
    """Return the largest expressions of a form that depend on no token and no state, except plain inputs."""
    constants: dict[Value, None] = {}
    seen: set[Index | Value] = set()
    stack: list[Index | Value] = list(values_of(derived))
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if isinstance(node, ir.VALUES) and is_same_at_all(node):
                if not isinstance(node, ir.Element):
                    constants[cast("Value", node)] = None
            else:
                stack += node.children()
    return tuple(constants)


def is_same_at_all(node: Value) -> bool:
    """Check whether a value is the same at all tokens and does not depend on states."""
    return not any(map(_varies, node.below))


def into_matrix(write: Value) -> Value:
    """Rewrite c ⊙ (M x) as (c ⊙ M) x if c and M are the same at all tokens: one product less per token."""
    factors = factors_of(write)
    matrices = [x for x in factors if isinstance(x, ir.Contract) and _is_constant_map(x)]
    if len(matrices) != 1:
        return write
    (mapped,) = matrices
    fixed = [x for x in factors if x is not mapped and is_same_at_all(x) and axes(x) in ((), axes(mapped))]
    if not fixed:
        return write
    matrix = product_of([*fixed, mapped.left])
    others = [x for x in factors if x is not mapped and x not in fixed]
    return product_of([*others, ir.intern(ir.Contract(matrix, mapped.right, 1, mapped.right_axis))])


def into_reads(value: Value) -> Value:
    """Rewrite each term 2 Re (M x) of a sum as Re ((2 M) x) if M is the same at all tokens."""
    terms = terms_of(value)
    rewritten = list(map(_into_read, terms))
    return value if rewritten == terms else reduce(lambda a, b: apply("add", a, b), rewritten)


def _into_read(term: Value) -> Value:
    """Rewrite a term of `into_reads`; return other terms unchanged."""
    factors = factors_of(term)
    reads = [x for x in factors if isinstance(x, ir.Apply) and x.op == "real"]
    numbers = [x for x in factors if isinstance(x, ir.Number) or (isinstance(x, ir.Ratio) and not rank(x))]
    if len(reads) != 1 or not numbers or len(numbers) + 1 < len(factors):
        return term
    (mapped,) = reads[0].operands
    if not isinstance(mapped, ir.Contract) or not _is_constant_map(mapped) or not all(map(is_same_at_all, numbers)):
        return term
    matrix = product_of([*numbers, mapped.left])
    return apply("real", ir.intern(ir.Contract(matrix, mapped.right, 1, mapped.right_axis)))


def _is_constant_map(node: ir.Contract) -> bool:
    """Check whether a node is a matrix that is the same at all tokens times a vector."""
    return rank(node.left) == 2 and rank(node.right) == 1 and node.left_axis == 1 and is_same_at_all(node.left)


def _varies(node: Index | Value) -> bool:
    """Check whether a node itself differs between tokens, or between iterations of a loop."""
    if isinstance(node, ir.Element | ir.Lookup):
        return not BY_TOKEN.isdisjoint(node.tensor.dims)
    return isinstance(node, ir.Vec | ir.StateAt | ir.VisibleReduce | ir.Var | ir.DataRead) or node is fold.place("q")
