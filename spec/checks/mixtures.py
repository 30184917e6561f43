"""Find expressions of `combine` that are undefined where a selection is empty."""

from __future__ import annotations

from collections.abc import Iterator

from attnc.spec import program
from attnc.spec.checks.measure import children
from attnc.spec.source import Span

Mixture = tuple[Span, str]
"""The span of an expression that is undefined if a selection is empty, and the selection's name."""

_TURNED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_NONE: frozenset[str] = frozenset()


def unguarded_mixtures(node: program.Expr, filled: frozenset[str] = _NONE) -> Iterator[Mixture]:
    """Yield the mixtures of an expression that no condition guards against an empty selection.

    `filled` names the selections that are surely not empty where the expression is evaluated.
    """
    match node:
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            yield from unguarded_mixtures(then, filled | _filled(condition, True))
            yield from unguarded_mixtures(otherwise, filled | _filled(condition, False))
            return
        case program.Operation(op="div" | "share", operands=(_, divisor), span=span):
            yield from ((span, name) for name in sorted(_vanishing(divisor, filled)))
        case program.Operation(op="pow", operands=(base, exponent), span=span) if _is_negative(exponent):
            yield from ((span, name) for name in sorted(_vanishing(base, filled)))
        case program.Operation(op="log" | "log2", operands=(inner,), span=span):
            yield from ((span, name) for name in sorted(_vanishing(inner, filled)))
        case program.DefinitionUse(definition=definition):
            yield from unguarded_mixtures(definition.body, filled)
    for child in children(node):
        yield from unguarded_mixtures(child, filled)


def _vanishing(node: program.Expr, filled: frozenset[str]) -> frozenset[str]:
    """Return the selections that make a number 0 when they are empty."""
    match node:
        case program.Aggregate(op="sum" | "mean" | "count", condition=condition) if condition is not None:
            return frozenset(n.selection for n in _conditions(condition) if n.number is not None) - filled
        case program.SelectedCount(selection=selection):
            return frozenset({selection}) - filled
        case program.DefinitionUse(definition=definition):
            return _vanishing(definition.body, filled)
        case program.Operation(op="mul", operands=operands):
            return _NONE.union(*(_vanishing(operand, filled) for operand in operands))
        case program.Operation(op="add" | "sub" | "max" | "min", operands=(first, *rest)):
            return _vanishing(first, filled).intersection(*(_vanishing(operand, filled) for operand in rest))
        case program.Operation(op="neg" | "abs" | "sqrt", operands=(inner,)):
            return _vanishing(inner, filled)
        case program.Operation(op="div" | "share" | "pow", operands=(inner, _)):
            return _vanishing(inner, filled)
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            sides = (then, _filled(condition, True)), (otherwise, _filled(condition, False))
            return _NONE.union(*(_vanishing(side, filled | guarded) for side, guarded in sides))
        case _:
            return _NONE


def _filled(condition: program.Expr, holds: bool) -> frozenset[str]:
    """Return the selections that are surely not empty where a condition has the truth value `holds`."""
    match condition:
        case program.DefinitionUse(definition=definition):
            return _filled(definition.body, holds)
        case program.Operation(op="not", operands=(inner,)):
            return _filled(inner, not holds)
        case program.Operation(op="and" | "or" as op, operands=operands):
            first, *rest = (_filled(operand, holds) for operand in operands)
            return first.union(*rest) if (op == "and") == holds else first.intersection(*rest)
        case program.Operation(op=op, operands=(a, b)) if op in _TURNED:
            if isinstance(b, program.SelectedCount):
                a, b, op = b, a, _TURNED[op]
            if not (isinstance(a, program.SelectedCount) and isinstance(b, program.Literal)):
                return _NONE
            return frozenset({a.selection}) if _excludes_0(op if holds else _OPPOSITE[op], b.value) else _NONE
        case _:
            return _NONE


def _excludes_0(op: str, bound: object) -> bool:
    """Whether the comparison `size op bound` is false for a size of 0."""
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        return False
    below, same = bound > 0, bound == 0
    compared = {"lt": below, "le": below or same, "gt": bound < 0, "ge": bound <= 0, "eq": same, "ne": not same}
    return not compared[op]


def _is_negative(node: program.Expr) -> bool:
    match node:
        case program.Operation(op="neg"):
            return True
        case program.Literal(value=bool() | str()):
            return False
        case program.Literal(value=value):
            return value < 0
        case _:
            return False


def _conditions(node: program.Expr) -> Iterator[program.SelectedTest]:
    if isinstance(node, program.SelectedTest):
        yield node
    elif isinstance(node, program.Operation) and node.op == "and":
        for operand in node.operands:
            yield from _conditions(operand)
