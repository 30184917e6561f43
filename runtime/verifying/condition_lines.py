"""The conditions of a pattern, in its relation and in its states' steps, and the constants that they compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from attnc.runtime.verifying.bounds import Bounds
from attnc.spec import program
from attnc.spec.checks.measure import Measures, below
from attnc.spec.exact_operations import COMPARISONS
from attnc.spec.program import BoundProgram, Expr, HeadIndexRead, Input, InputRead, Operation, Size


def relation_lines(pattern: program.Program) -> Iterator[tuple[str, Expr]]:
    """Yield every condition of the relation, with the clause of the text that holds it."""
    yield from (("visible", line) for line in pattern.visible)
    if pattern.round is not None:
        yield "round keep", pattern.round.keep
    for attend in pattern.attends:
        where = "visible" if len(pattern.attends) == 1 else f"{attend.name}: visible"
        yield from ((where, line) for line in attend.visible)
    for item in pattern.selections:
        yield from ((f"{item.name}: from", line) for line in item.row.visible)
        yield f"{item.name}: keep", item.keep
        if item.always is not None:
            yield f"{item.name}: always", item.always
        if item.covers is not None:
            yield f"{item.name}: covers", item.covers


def constants(pattern: program.Program) -> set[int]:
    """Return the integer literals in the conditions of the relation and of states."""
    nodes = below([*(line for _, line in relation_lines(pattern)), *(line for _, _, line in step_lines(pattern))])
    return {n.value for n in nodes if isinstance(n, program.Literal) and type(n.value) is int}


def step_lines(pattern: program.Program) -> Iterator[tuple[str, program.RecurrenceClauses, Expr]]:
    """Yield the conditions of steps and resets that read neither states nor vectors.

    Each comes with its clause of the text and its recurrence.
    """
    single = (pattern.recurrence,) if pattern.recurrence is not None else ()
    measures = Measures()
    for recurrence in (*single, *pattern.stateful):
        name = "" if recurrence is pattern.recurrence else f"{recurrence.name}: "
        family_binders = {recurrence.family.binder} if recurrence.family is not None else set()
        lines = [line.value for line in recurrence.lines]
        conditions = [("step", node.condition) for node in below(lines) if isinstance(node, program.ConditionalValue)]
        if recurrence.reset is not None:
            conditions.append(("reset", recurrence.reset))
        for where, condition in conditions:
            reads_more = any(isinstance(node, program.StateRead | program.Vector) for node in below([condition]))
            if not reads_more and measures.of(condition).free <= family_binders:
                yield name + where, recurrence, condition


# --- constants that conditions compare with --------------------------------------------------------------------------


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
