"""Decide why a pattern hides no pair, whatever the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnc.runtime.verifying.bounds import Bounds, BoundScope, is_condition
from attnc.spec import program
from attnc.spec.checks.measure import Measures
from attnc.spec.program import BoundProgram, Expr, KeyRange

MOST_QUESTIONS = 8
"""The maximum number of open conditions for which every combination of truth values is tried."""

MOST_BRANCHES = 16

Question = tuple[Expr, int | None]
"""A condition, and the number of the scope of its names if it reads any."""


class _OpenError(Exception):
    """A condition whose truth is not assumed yet."""

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question


def hides_nothing(bound: BoundProgram, *, more_queries: bool = True) -> str:
    """Return why no pair is hidden, whatever the lengths; empty where one may be. `more_queries` as in `Bounds`."""
    pattern = bound.program
    if not pattern.attends:
        return "a recurrence updates a state token by token: there are no pairs to hide"
    if all(isinstance(attend.over, KeyRange) for attend in pattern.attends):
        return "the keys are not tokens"
    bounds = Bounds(bound, more_queries=more_queries)
    if pattern.documents is not None or not all(bounds.truth(line, BoundScope()) for line in pattern.visible):
        return ""
    for attend in pattern.attends:
        if isinstance(attend.over, KeyRange) or pattern.round is not None:
            continue
        if all(bounds.truth(line, BoundScope()) for line in attend.visible):
            whose = "the pattern" if len(pattern.attends) == 1 else f"`{attend.name}`"
            return f"{whose} sees every key"
        if attend.family is not None and _see_together(bounds, attend.family, attend.visible):
            return f"each key is seen by one of the branches `{attend.name}`"
    return ""


def _see_together(bounds: Bounds, family: KeyRange, lines: Sequence[Expr]) -> bool:
    """Whether a branch of a family sees each key, whatever the truth of the conditions that the branches share."""
    ends = [bounds.integer(end) for end in (family.low, family.high)]
    if ends[0] is None or ends[1] is None or ends[1] - ends[0] > MOST_BRANCHES:
        return False
    members = (program.Literal(family.span, i) for i in range(ends[0], ends[1]))
    return _covers(bounds, [BoundScope().calling({family.binder: member}) for member in members], lines, {})


def _covers(
    bounds: Bounds, scopes: Sequence[BoundScope], lines: Sequence[Expr], assumed: Mapping[Question, bool]
) -> bool:
    """Whether the lines hold in some scope, for every combination of truth values of the open conditions."""
    try:
        return any(all(_truth(bounds, line, scope, assumed) for line in lines) for scope in scopes)
    except _OpenError as error:
        question = error.question
    if len(assumed) == MOST_QUESTIONS:
        return False
    return all(_covers(bounds, scopes, lines, {**assumed, question: truth}) for truth in (True, False))


def _truth(bounds: Bounds, node: Expr, scope: BoundScope, assumed: Mapping[Question, bool]) -> bool:
    """Return the truth of a condition under assumed truths of others. Raises _OpenError for an open condition."""
    proved = bounds.truth(node, scope)
    if proved is not None:
        return proved
    match node:
        case program.Operation(op="not", operands=(part,)):
            return not _truth(bounds, part, scope, assumed)
        case program.Operation(op="and", operands=parts):
            return all(_truth(bounds, part, scope, assumed) for part in parts)
        case program.Operation(op="or", operands=parts):
            return any(_truth(bounds, part, scope, assumed) for part in parts)
        case program.Operation(op="eq" | "ne" as op, operands=(a, b)) if is_condition(a) and is_condition(b):
            return (_truth(bounds, a, scope, assumed) == _truth(bounds, b, scope, assumed)) is (op == "eq")
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            return _truth(bounds, then if _truth(bounds, condition, scope, assumed) else otherwise, scope, assumed)
        case program.DefinitionUse(definition=definition):
            return _truth(bounds, definition.body, bounds.inside(node, scope), assumed)
    arguments_read = Measures().of(node).free & scope.arguments.keys()
    question = node, scope.number if arguments_read else None
    if question not in assumed:
        raise _OpenError(question)
    return assumed[question]
