"""Statements of the language that the compiler does not support yet, by their form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from attnc.spec import syntax
from attnc.spec.names.stateful_branches import is_stateful
from attnc.spec.source import Span

SEVERAL = "several units of keys"

_REMEDIES = {SEVERAL: "make one list of them: `b = [k.y // 8, k.x // 8]`"}


def remedy(what: str) -> str:
    """Return the help text for an unsupported feature."""
    return _REMEDIES.get(what, "ask of each place whether it is chosen: `k in chosen`; or give the choice as an input")


def later(item: syntax.Statement, selections: frozenset[str]) -> str | None:
    """Return the unsupported feature in a statement, or None; `selections` are the names of all selections."""
    if isinstance(item, syntax.BinderClause) and item.word.id == "over" and len(item.binders) > 1:
        return SEVERAL if any(isinstance(binder, syntax.UnitDecl) for binder in item.binders) else None
    if isinstance(item, syntax.BinderClause) and item.word.id == "over":
        return _over_chosen(item, selections)
    if not isinstance(item, syntax.BlockStatement) or item.word.id not in ("branch", "select"):
        return None
    if item.word.id == "select":
        return _of_select(item, selections)
    if is_stateful(item):
        return _over_chosen(item, selections)
    return next((x for inner in item.body.statements if (x := later(inner, selections))), None)


def _of_select(block: syntax.BlockStatement, selections: frozenset[str]) -> str | None:
    for item in block.body.statements:
        if not isinstance(item, syntax.BinderClause):
            continue
        binders = list(item.binders)
        if item.word.id == "per" and any(isinstance(b, syntax.UnitDecl) and _reads(b.value, "k") for b in binders):
            return "units of keys that confine a choice"
        if item.word.id == "over":
            if len(binders) > 1 and _is(binders[0], "q"):
                binders = binders[1:]
            if len(binders) > 1 and any(isinstance(binder, syntax.UnitDecl) for binder in binders):
                return SEVERAL
    return _over_chosen(block, selections)


def _over_chosen(block: syntax.Statement, selections: frozenset[str]) -> str | None:
    """Whether something runs over what a selection chose."""
    for node in _below(block):
        if isinstance(node, syntax.LoopVariable):
            base = node.domain.base if isinstance(node.domain, syntax.IndexExpr) else node.domain
            if isinstance(base, syntax.NameExpr) and base.id in selections:
                return "a `for` over what was chosen"
    return None


def _is(binder: syntax.Binder, name: str) -> bool:
    return isinstance(binder, syntax.LoopVariable) and binder.name.id == name


def _reads(node: object, name: str) -> bool:
    return any(isinstance(below, syntax.NameExpr) and below.id == name for below in _below(node))


def _below(root: object) -> Iterator[object]:
    """All nodes of a syntax tree."""
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, tuple):
            pending.extend(node)
        elif is_dataclass(node) and not isinstance(node, Span):
            yield node
            pending.extend(getattr(node, field.name) for field in fields(node) if field.name != "source")
