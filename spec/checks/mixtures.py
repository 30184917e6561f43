"""Mixtures of what was chosen: nothing may have been, and what the result is then must be said."""

from __future__ import annotations

from collections.abc import Iterator

from attnc.spec import program
from attnc.spec.checks.measure import below, children
from attnc.spec.source import Span

Mixture = tuple[Span, str]
"""Where something is divided by a sum over a selection, and the name of that."""


def of_nothing(node: program.Expr, guarded: frozenset[str] = frozenset()) -> Iterator[Mixture]:
    """The mixtures of an expression that stand in no case which asks how many were chosen."""
    match node:
        case program.Choice(condition=condition, then=then, otherwise=otherwise):
            asked = {n.selection for n in below([condition]) if isinstance(n, program.ChosenSize)}
            for side in (then, otherwise):
                yield from of_nothing(side, guarded | asked)
            return
        case program.Operation(op="div" | "share", operands=(_, divisor), span=span):
            yield from ((span, name) for name in sorted(_summed(divisor) - guarded))
        case program.DefinitionUse(definition=definition):
            yield from of_nothing(definition.body, guarded)
    for child in children(node):
        yield from of_nothing(child, guarded)


def _summed(divisor: program.Expr) -> set[str]:
    """The selections over which a divisor runs, or whose size it is."""
    found = set()
    for node in below([divisor]):
        if isinstance(node, program.Aggregate) and node.condition is not None:
            found |= {n.selection for n in _conditions(node.condition) if n.number is not None}
        elif isinstance(node, program.ChosenSize):
            found.add(node.selection)
    return found


def _conditions(node: program.Expr) -> Iterator[program.Chosen]:
    if isinstance(node, program.Chosen):
        yield node
    elif isinstance(node, program.Operation) and node.op == "and":
        for operand in node.operands:
            yield from _conditions(operand)


__all__ = ["of_nothing"]
