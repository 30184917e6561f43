"""Warnings that are cheap enough for every compilation: scores without vectors (W008), off-centre windows (W009).

`compile_attention` gives them as Python warnings, `attnc check` as diagnostics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnc.compiler import ir
from attnc.compiler.lowering.lower import lowering_of
from attnc.compiler.lowering.lower_expressions import LoweringScope
from attnc.compiler.lowering.lower_selections import SelectingLowering
from attnc.compiler.lowering.lowered_operations import Lowered
from attnc.spec import program as checked
from attnc.spec.checks.measure import below
from attnc.spec.diagnostics import Diagnostic, Label, Severity
from attnc.spec.source import Span

WINDOWS, CENTRED = "windows.attn", frozenset({"shifted", "truncated", "wrapped"})
"""The module of the library with edge policies, and its definitions that centre a window on the query."""


def call_warnings(bound: checked.BoundProgram) -> list[Diagnostic]:
    """Return the warnings W008 and W009 of a program that lowers without an error."""
    return [*_scores_without_vectors(bound.program), *_windows_off_centre(bound)]


def _warning(code: str, message: str, span: Span, label: str, help_: str) -> Diagnostic:
    return Diagnostic(code, message, Label(span, label), (), help_, Severity.WARNING)


# --- scores ----------------------------------------------------------------------------------------------------------


def _scores_without_vectors(program: checked.Program) -> Iterator[Diagnostic]:
    for attend in program.attends:
        score = attend.score
        if score is None:
            continue
        numbers = list(_numbers(score))
        positions = any(isinstance(node, checked.PositionRead | checked.Coordinate) for node in numbers)
        if positions and not any(isinstance(node, _CONTENT) for node in numbers):
            message = "the score reads no vectors: `q` and `k` are positions here"
            help_ = "write `dot(q, k)` for the product of the vectors; the default score is `scale * dot(q, k)`"
            yield _warning("W008", message, score.span, "does not depend on the contents", help_)


_CONTENT = (
    *(
        checked.Vector,
        checked.InputRead,
        checked.BranchRead,
        checked.MergeCall,
        checked.ScoreRead,
        checked.SoftmaxShare,
    ),
    checked.StateRead,
)
"""Expressions whose value depends on the tensors of a call."""


def _numbers(root: checked.Expr) -> Iterator[checked.Expr]:
    """Yield the expressions from which a value is computed; skips conditions and indices, expands definitions once."""
    pending: list[checked.Expr] = [root]
    seen: set[checked.Definition] = set()
    while pending:
        node = pending.pop()
        yield node
        match node:
            case checked.DefinitionUse(definition=definition, arguments=arguments):
                pending.extend(arguments)
                if definition not in seen:
                    seen.add(definition)
                    pending.append(definition.body)
            case checked.Operation(op=op, operands=operands) if op not in _CONDITIONS:
                pending.extend(operands)
            case checked.ConditionalValue(then=then, otherwise=otherwise):
                pending += [then, otherwise]
            case checked.Aggregate(body=body):
                pending.append(body)
            case checked.ListValue(items=items):
                pending.extend(items)
            case checked.Item(table=table):
                pending.append(table)


_CONDITIONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "not", "and", "or"})


# --- windows ---------------------------------------------------------------------------------------------------------

_Use = tuple[checked.DefinitionUse, Mapping[str, Lowered]]


def _windows_off_centre(bound: checked.BoundProgram) -> Iterator[Diagnostic]:
    program = bound.program
    lines = [*program.visible, *(line for attend in program.attends for line in attend.visible)]
    if not any(isinstance(node, checked.DefinitionUse) and _is_centred(node.definition) for node in below(lines)):
        return
    lowering = lowering_of(bound)
    reported: set[tuple[Span, int]] = set()
    for use, arguments in (window_use for line in lines for window_use in _uses(line, lowering, LoweringScope())):
        window, stride, length = (_count(arguments.get(name)) for name in ("window", "stride", "length"))
        if window is None or window % 2 or (stride or 1) % 2 == 0 or (length is not None and window >= length):
            continue
        if (use.span, window) not in reported:
            reported.add((use.span, window))
            keys_before = window // 2
            sides = f"{keys_before} before the query and {keys_before - 1} after it"
            message = f"a window of {window} is not centred: it has {sides}"
            help_ = f"an odd window is centred: {window - 1} or {window + 1}; NATTEN lays even windows the same way"
            yield _warning("W009", message, use.span, f"the window is {window} here", help_)


def _is_centred(definition: checked.Definition) -> bool:
    file = definition.span.source.name.rpartition("/")[2]
    return file == WINDOWS and definition.name in CENTRED


def _count(value: Lowered | None) -> int | None:
    return value.value if isinstance(value, ir.Const) else None


def _uses(expr: checked.Expr, lowering: SelectingLowering, scope: LoweringScope) -> Iterator[_Use]:
    """Yield the uses of centred windows in a condition, with their arguments for these parameters."""
    match expr:
        case checked.DefinitionUse(definition=definition, arguments=arguments):
            values = {b.name: lowering.lower(a, scope) for b, a in zip(definition.parameters, arguments, strict=True)}
            if _is_centred(definition):
                yield expr, values
                return
            inner = scope
            for binder in definition.parameters:
                inner = inner.bind(binder, values[binder.name])
            yield from _uses(definition.body, lowering, inner)
        case checked.Operation(op="and" | "or" | "not", operands=operands):
            for operand in operands:
                yield from _uses(operand, lowering, scope)
        case checked.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            decided = lowering.truth(condition, scope)
            if not (isinstance(decided, ir.Truth) and not decided.value):
                yield from _uses(then, lowering, scope)
            if not (isinstance(decided, ir.Truth) and decided.value):
                yield from _uses(otherwise, lowering, scope)
