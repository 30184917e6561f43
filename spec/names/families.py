"""Families of branches, and names that run over a range."""

from __future__ import annotations

from collections.abc import Callable

from attnc.spec import program, syntax
from attnc.spec.report import Report


def family_of(block: syntax.Block, report: Report) -> syntax.Running | None:
    """The name and the range of a family of branches; None where there is one branch, or after a complaint."""
    if not block.binders:
        return None
    first = block.binders[0]
    if len(block.binders) > 1 or not isinstance(first, syntax.Running) or first.domain is None:
        name = block.name.id if block.name else "near"
        help_ = f"one range: `branch {name}[c in 0 .. n]`"
        report.error("A210", "a family runs over a range", first.span, "over what?", help=help_)
        return None
    return first


def range_of(item: syntax.Running, exact: Callable[[syntax.Expr], program.Expr]) -> program.Range:
    """A name with its range; `exact` resolves its ends."""
    zero = program.Literal(item.span, 0)
    match item.domain:
        case syntax.Range(low=low, high=high):
            ends = exact(low), exact(high)
        case None:
            ends = zero, zero
        case count:
            ends = zero, exact(count)
    return program.Range(item.span, program.Binder(item.name.span, item.name.id), *ends)


__all__ = ["family_of", "range_of"]
