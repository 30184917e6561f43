"""The conditions of a pattern: those of its relation, and those of its states' steps."""

from __future__ import annotations

from collections.abc import Iterator

from attnc.spec import program
from attnc.spec.checks.measure import Measures, below
from attnc.spec.program import Expr


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
