"""The constants with which conditions compare inputs and head indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from attnc.runtime.verifying.bounds import Bounds
from attnc.runtime.verifying.condition_lines import relation_lines, step_lines
from attnc.spec.checks.measure import below
from attnc.spec.exact_operations import COMPARISONS
from attnc.spec.program import BoundProgram, Expr, HeadIndexRead, Input, InputRead, Operation, Size

_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}

MOST_HEADS = 16
"""The maximum number of heads of calls for clauses that compare the head index."""


def input_values(bound: BoundProgram, item: Input) -> list[int]:
    """Return two numbers for each comparison of an integer input with a constant: one makes it true, one false."""
    values: list[int] = []

    def reads(node: Expr) -> bool:
        return isinstance(node, InputRead) and node.input is item

    for op, constant in _comparisons(bound, reads):
        values += [constant, constant - 1 if op in ("lt", "ge") else constant + 1]
    return list(dict.fromkeys(values))


@lru_cache(maxsize=64)
def compared_heads(bound: BoundProgram, name: str) -> frozenset[int]:
    """Return the constants that clauses compare `head` or `kv_head` with."""

    def reads(node: Expr) -> bool:
        return isinstance(node, HeadIndexRead) and node.name == name

    return frozenset(constant for _, constant in _comparisons(bound, reads))


def heads_needed(bound: BoundProgram, limit: int = MOST_HEADS) -> tuple[int, int]:
    """Return the numbers of heads and kv heads that make each comparison of a head index true and false.

    Comparisons that need more than `limit` heads are ignored; 0 where no comparison remains. A comparison needs two
    heads more than its constant: `head > 5` is true for head 6.
    """
    q, kv = (
        max((c + 2 for c in compared_heads(bound, name) if c + 2 <= limit), default=0) for name in ("head", "kv_head")
    )
    return q, kv


def lines_of(bound: BoundProgram) -> list[Expr]:
    """Return the conditions of relations and states."""
    pattern = bound.program
    return [*(line for _, line in relation_lines(pattern)), *(line for _, _, line in step_lines(pattern))]


def reads_heads(node: Expr) -> bool:
    """Whether a node is the head index or the number of heads."""
    return isinstance(node, HeadIndexRead) or (isinstance(node, Size) and node.name == "heads")


def _comparisons(bound: BoundProgram, reads: Callable[[Expr], bool]) -> Iterator[tuple[str, int]]:
    """Yield the operator and the constant of each comparison with an integer, with the constant on the right."""
    bounds = Bounds(bound)
    for node in below(lines_of(bound)):
        if not (isinstance(node, Operation) and node.op in COMPARISONS):
            continue
        left, right = node.operands
        for side, other, op in ((left, right, node.op), (right, left, _SWAPPED[node.op])):
            if any(reads(part) for part in below([side])):
                constant = bounds.integer(other)
                if constant is not None:
                    yield op, constant
