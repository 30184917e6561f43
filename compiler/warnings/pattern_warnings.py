"""Warnings about a pattern that compiles: rows without keys, visible later keys, numbers beyond 32 bits, and constant
conditions. Every warning is proved, by a sample of tokens or by intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import bounds, simplified
from attnc.compiler.ir.aggregates import counted
from attnc.compiler.ir.rewrite import variables, walk
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.lower_expressions import LoweringScope
from attnc.compiler.lowering.lower_selections import SelectingLowering
from attnc.compiler.lowering.specialise import alone
from attnc.compiler.warnings.call_warnings import call_warnings
from attnc.compiler.warnings.foresight import looks_ahead
from attnc.spec import program as checked
from attnc.spec.diagnostics import Diagnostic, Label, Severity
from attnc.spec.errors import AttncError
from attnc.spec.source import Span

SAMPLE = 192
"""Number of tokens of a sample, where the pattern does not fix it."""

SAMPLE_STEPS = 1 << 26
"""Maximum number of steps of the aggregates in a sample; a pattern that needs more is not sampled."""

MOST = 2048
"""Maximum number of tokens of a sample."""

LONG = 1 << 20
"""Number of tokens at which numbers and conditions are bounded."""

WORD = 1 << 31


@dataclass(frozen=True)
class _RelationSample:
    """The visible pairs of a sample: bool (queries, keys)."""

    seen: NDArray[np.bool_]
    span: Span


def warnings_of(bound: checked.BoundProgram) -> list[Diagnostic]:
    """Return the warnings W001, W002, W004 and W006 to W009 of a program with bound parameters."""
    pattern = lower(bound)
    result = [*_idle_conditions(bound), *_large_products(bound.program, pattern), *_foresight(bound.program, pattern)]
    result += call_warnings(bound)
    sample = _sample(bound.program, pattern)
    if sample is not None:
        result += [*_blind_rows(sample), *_open_future(sample)]
    return result


def _warning(code: str, message: str, span: Span, label: str, help_: str) -> Diagnostic:
    return Diagnostic(code, message, Label(span, label), (), help_, Severity.WARNING)


# --- a sample --------------------------------------------------------------------------------------------------------


def _sample(program: checked.Program, pattern: ir.Pattern) -> _RelationSample | None:
    """Sample a pattern with one attention over tokens whose relation reads no inputs; None for other patterns."""
    if len(pattern.nodes) != 1 or pattern.attend.keys is not None or pattern.documents is not None:
        return None
    lines = [*program.visible, *program.attends[0].visible]
    n = _length(pattern)
    if n is None or not lines or any(isinstance(node, ir.Lookup) for node in walk(pattern.attend.visible)):
        return None
    try:
        with counted(SAMPLE_STEPS):
            return _RelationSample(
                exact_evaluation.mask(alone(pattern.attend.visible, n), (0, n), (0, n)), lines[0].span
            )
    except (AttncError, KeyError):
        return None  # the relation reads unknown sizes, or has a fault, which a call reports


def _length(pattern: ir.Pattern) -> int | None:
    """The number of tokens to sample: the size of the grid if there is one; None where it is unknown or too large."""
    lengths = [segment.length for segment in pattern.segments]
    if not lengths:
        return SAMPLE
    total = 0
    for length in lengths:
        if not isinstance(length, ir.Const):
            return None
        total += length.value
    return total if total <= MOST else None


def _blind_rows(sample: _RelationSample) -> Iterator[Diagnostic]:
    blind = np.flatnonzero(~sample.seen.any(axis=1))
    if len(blind):
        n, first = len(sample.seen), int(blind[0])
        message = f"query {first} sees no key ({len(blind)} of {n} queries): its output is 0"
        help_ = "let a query see itself, as in `k <= q`, or the first keys, as in `or k < sinks`"
        yield _warning("W001", message, sample.span, f"false for every key of query {first}", help_)


def _open_future(sample: _RelationSample) -> Iterator[Diagnostic]:
    n = len(sample.seen)
    past, future = np.tri(n, k=-1, dtype=np.bool_), ~np.tri(n, dtype=np.bool_)
    if n < 8 or not sample.seen[future].all():
        return
    visible_share = sample.seen[past].mean()
    if visible_share in (0, 1):  # all keys, or exactly the later keys, are visible on purpose
        return
    message = f"every later key is visible, but only {visible_share:.0%} of the earlier keys (among {n} tokens)"
    help_ = "for a causal pattern, bound the distance on both sides: `0 <= q - k < window`"
    yield _warning("W002", message, sample.span, "does not exclude later keys", help_)


def _foresight(program: checked.Program, pattern: ir.Pattern) -> Iterator[Diagnostic]:
    ahead = looks_ahead(pattern)
    if ahead is None:
        return
    item = next(item for item in program.selections if item.name == ahead.selection.partition("[")[0])
    message = (
        f"`{ahead.selection}` reads later tokens: query {ahead.query} selects place {ahead.place} by token "
        f"{ahead.token}, but no query sees a later key"
    )
    score = item.row.weights
    span = score.span if isinstance(score, checked.Expr) else item.span
    help_ = "rank only units that end before the query, `from b.end <= q`; ignore this where the whole prompt is known"
    yield _warning("W007", message, span, "the score reads later tokens", help_)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _large_products(program: checked.Program, pattern: ir.Pattern) -> Iterator[Diagnostic]:
    """Warn about a product of two token-dependent numbers that exceeds 32 bits."""
    for node in pattern.nodes:
        try:
            relation = alone(node.visible, LONG)
        except (AttncError, KeyError):
            continue
        for below in walk(relation):
            if isinstance(below, ir.Arith) and below.op == "mul" and not variables(below):
                largest = max(map(abs, bounds(below, (0, LONG), (0, LONG))))
                if largest >= WORD:
                    span = pattern.origins.get(below) or _first_line(program, node.name)
                    message = f"a product reaches {largest:,} at {LONG:,} tokens, which exceeds 32 bits"
                    help_ = "compare quotients, or multiply block numbers: `q // block * (k // block)`"
                    yield _warning("W004", message, span, "64-bit arithmetic for every pair", help_)
                    return


def _first_line(program: checked.Program, name: str) -> Span:
    attend = next(attend for attend in program.attends if attend.name == name)
    return next((line.span for line in (*attend.visible, *program.visible)), attend.span)


# --- conditions ------------------------------------------------------------------------------------------------------


def _idle_conditions(bound: checked.BoundProgram) -> Iterator[Diagnostic]:
    """Warn about comparisons of positions and constants, not of parameters, with one result for all pairs."""
    program = bound.program
    if program.segments or any(p.per_head for p in program.parameters):
        return
    lowering = SelectingLowering(bound.values, frozenset(), lengths=bound.lengths, program=program)
    lines = [*program.visible, *(line for attend in program.attends for line in attend.visible)]
    for leaf in (leaf for line in lines for leaf in _leaves(line)):
        if not _is_of_places(leaf):
            continue
        condition = alone(lowering.truth(leaf, LoweringScope()), LONG)
        decided = simplified(condition, (0, LONG), (0, LONG))
        if isinstance(decided, ir.Truth):
            word = "true" if decided.value else "false"
            left, right = (_range_of(operand, lowering) for operand in leaf.operands)
            message = f"always {word}: `{_text(leaf.operands[0])}` is {left}, `{_text(leaf.operands[1])}` is {right}"
            help_ = "remove it, or compare the intended values; positions start at 0"
            yield _warning("W006", message, leaf.span, f"always {word}", help_)


COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})


def _leaves(expr: checked.Expr) -> Iterator[checked.Operation]:
    if not isinstance(expr, checked.Operation):
        return
    if expr.op in COMPARISONS:
        yield expr
    elif expr.op in ("and", "or", "not"):
        for operand in expr.operands:
            yield from _leaves(operand)


def _is_of_places(leaf: checked.Operation) -> bool:
    """Whether a comparison is made of positions and constants alone, and of at least one position."""
    pending: list[checked.Expr] = list(leaf.operands)
    has_position = False
    while pending:
        node = pending.pop()
        match node:
            case checked.PositionRead():
                has_position = True
            case checked.Literal():
                pass
            case checked.Operation(op="floordiv" | "mod", operands=(left, checked.Literal(value=divisor))) if divisor:
                pending.append(left)
            case checked.Operation(op="neg" | "add" | "sub" | "mul" | "abs" | "min" | "max", operands=operands):
                pending.extend(operands)
            case _:
                return False
    return has_position


def _range_of(expr: checked.Expr, lowering: SelectingLowering) -> str:
    integer = alone(lowering.integer(expr, LoweringScope()), LONG)
    low, high = bounds(integer, (0, LONG), (0, LONG))
    if low == high:
        return str(low)
    if high >= LONG - 1 and low >= 0:
        return f"at least {low}"
    return f"between {low} and {high}"


def _text(expr: checked.Expr) -> str:
    return " ".join(expr.span.text.split())
