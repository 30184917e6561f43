"""Why a pattern hides no pair, whatever the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnc.runtime.verifying.bounds import Bounds, BoundScope, is_condition
from attnc.spec import program
from attnc.spec.checks.measure import Measures
from attnc.spec.program import BoundProgram, Expr, KeyRange

MOST_QUESTIONS = 8
"""The largest number of conditions of which every combination of truth values is tried."""

MOST_BRANCHES = 16

Question = tuple[Expr, int | None]
"""A condition, and the scope of its names where it reads some."""


class _OpenError(Exception):
    """A condition of which no truth is assumed yet."""

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question


def hides_nothing(bound: BoundProgram, *, more_queries: bool = True) -> str:
    """Say why no pair is hidden, whatever the lengths; empty where one may be. `more_queries` as of `Bounds`."""
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
    """Whether each key is seen by one branch of a family, whatever the conditions are that they share."""
    ends = [bounds.integer(end) for end in (family.low, family.high)]
    if ends[0] is None or ends[1] is None or ends[1] - ends[0] > MOST_BRANCHES:
        return False
    members = (program.Literal(family.span, i) for i in range(ends[0], ends[1]))
    return _covers(bounds, [BoundScope().calling({family.binder: member}) for member in members], lines, {})


def _covers(
    bounds: Bounds, scopes: Sequence[BoundScope], lines: Sequence[Expr], given: Mapping[Question, bool]
) -> bool:
    """Whether the lines hold in one of some scopes, for every truth of what is not given."""
    try:
        return any(all(_truth(bounds, line, scope, given) for line in lines) for scope in scopes)
    except _OpenError as error:
        question = error.question
    if len(given) == MOST_QUESTIONS:
        return False
    return all(_covers(bounds, scopes, lines, {**given, question: truth}) for truth in (True, False))


def _truth(bounds: Bounds, node: Expr, scope: BoundScope, given: Mapping[Question, bool]) -> bool:
    """The truth of a condition, where that of others is given. Raises _OpenError for one that is not."""
    known = bounds.truth(node, scope)
    if known is not None:
        return known
    match node:
        case program.Operation(op="not", operands=(part,)):
            return not _truth(bounds, part, scope, given)
        case program.Operation(op="and", operands=parts):
            return all(_truth(bounds, part, scope, given) for part in parts)
        case program.Operation(op="or", operands=parts):
            return any(_truth(bounds, part, scope, given) for part in parts)
        case program.Operation(op="eq" | "ne" as op, operands=(a, b)) if is_condition(a) and is_condition(b):
            return (_truth(bounds, a, scope, given) == _truth(bounds, b, scope, given)) is (op == "eq")
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            return _truth(bounds, then if _truth(bounds, condition, scope, given) else otherwise, scope, given)
        case program.DefinitionUse(definition=definition):
            return _truth(bounds, definition.body, bounds.inside(node, scope), given)
    own = Measures().of(node).free & scope.arguments.keys()
    question = node, scope.number if own else None
    if question not in given:
        raise _OpenError(question)
    return given[question]
