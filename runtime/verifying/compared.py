"""The constants that conditions compare the numbers of inputs and heads with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from attnc.runtime.verifying.bounds import COMPARISONS, Bounds
from attnc.runtime.verifying.condition_lines import relation_lines, step_lines
from attnc.spec.checks.measure import below
from attnc.spec.program import BoundProgram, Expr, HeadIndexRead, Input, InputRead, Operation, Size

_TURNED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}

MOST_HEADS = 16
"""Calls have up to this many heads for a clause that tells heads apart."""


def input_values(bound: BoundProgram, item: Input) -> list[int]:
    """Return numbers for an integer input that make comparisons of it with constants true and false, two for each."""
    found: list[int] = []

    def reads(node: Expr) -> bool:
        return isinstance(node, InputRead) and node.input is item

    for op, constant in _comparisons(bound, reads):
        found += [constant, constant - 1 if op in ("lt", "ge") else constant + 1]
    return list(dict.fromkeys(found))


@lru_cache(maxsize=64)
def compared_heads(bound: BoundProgram, name: str) -> frozenset[int]:
    """Return the constants that clauses compare `head` or `kv_head` with."""

    def reads(node: Expr) -> bool:
        return isinstance(node, HeadIndexRead) and node.name == name

    return frozenset(constant for _, constant in _comparisons(bound, reads))


def heads_wanted(bound: BoundProgram, most: int = MOST_HEADS) -> tuple[int, int]:
    """Return how many heads, and key heads, show each such comparison true and false; 0 where that is more than most.

    One more than the constant and the heads below it: `head > 5` is true of head 6.
    """
    q, kv = (
        max((c + 2 for c in compared_heads(bound, name) if c + 2 <= most), default=0) for name in ("head", "kv_head")
    )
    return q, kv


def lines_of(bound: BoundProgram) -> list[Expr]:
    """Return the conditions of relations and states."""
    pattern = bound.program
    return [*(line for _, line in relation_lines(pattern)), *(line for _, _, line in step_lines(pattern))]


def reads_heads(node: Expr) -> bool:
    """Whether a node is the head at hand, or how many there are."""
    return isinstance(node, HeadIndexRead) or (isinstance(node, Size) and node.name == "heads")


def _comparisons(bound: BoundProgram, reads: Callable[[Expr], bool]) -> Iterator[tuple[str, int]]:
    """Yield the operator and the constant of each comparison of something with an integer, which stands right."""
    bounds = Bounds(bound)
    for node in below(lines_of(bound)):
        if not (isinstance(node, Operation) and node.op in COMPARISONS):
            continue
        left, right = node.operands
        for side, other, op in ((left, right, node.op), (right, left, _TURNED[node.op])):
            if any(reads(part) for part in below([side])):
                constant = bounds.integer(other)
                if constant is not None:
                    yield op, constant
