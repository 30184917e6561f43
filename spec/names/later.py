"""Recognise statements of the language that the compiler does not support yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from attnc.spec import syntax
from attnc.spec.names.recurrence_resolver import is_stateful
from attnc.spec.source import Span

SEVERAL = "several units of keys"

_REMEDIES = {SEVERAL: "combine them in one list: `b = [k.y // 8, k.x // 8]`"}


def remedy(feature: str) -> str:
    """Return the help text for an unsupported feature."""
    return _REMEDIES.get(feature, "test each key with `k in chosen`, or pass the selection as an input")


def unsupported(item: syntax.Statement, selections: frozenset[str]) -> str | None:
    """Return the unsupported feature in a statement, or None; `selections` are the names of all selections."""
    if isinstance(item, syntax.BinderClause) and item.word.id == "over" and len(item.binders) > 1:
        return SEVERAL if any(isinstance(binder, syntax.UnitDecl) for binder in item.binders) else None
    if isinstance(item, syntax.BinderClause) and item.word.id == "over":
        return _over_selection(item, selections)
    if not isinstance(item, syntax.BlockStatement) or item.word.id not in ("branch", "select"):
        return None
    if item.word.id == "select":
        return _in_select(item, selections)
    if is_stateful(item):
        return _over_selection(item, selections)
    return next((feature for inner in item.body.statements if (feature := unsupported(inner, selections))), None)


def _in_select(block: syntax.BlockStatement, selections: frozenset[str]) -> str | None:
    for item in block.body.statements:
        if not isinstance(item, syntax.BinderClause):
            continue
        binders = list(item.binders)
        if item.word.id == "per" and any(isinstance(b, syntax.UnitDecl) and _reads(b.value, "k") for b in binders):
            return "a unit of keys in `per`"
        if item.word.id == "over":
            if len(binders) > 1 and _is_named(binders[0], "q"):
                binders = binders[1:]
            if len(binders) > 1 and any(isinstance(binder, syntax.UnitDecl) for binder in binders):
                return SEVERAL
    return _over_selection(block, selections)


def _over_selection(block: syntax.Statement, selections: frozenset[str]) -> str | None:
    """Return the unsupported feature of a statement with a variable that iterates over a selection, or None."""
    for node in _below(block):
        if isinstance(node, syntax.LoopVariable):
            base = node.domain.base if isinstance(node.domain, syntax.IndexExpr) else node.domain
            if isinstance(base, syntax.NameExpr) and base.id in selections:
                return "a variable over a selection"
    return None


def _is_named(binder: syntax.Binder, name: str) -> bool:
    return isinstance(binder, syntax.LoopVariable) and binder.name.id == name


def _reads(node: object, name: str) -> bool:
    return any(isinstance(below, syntax.NameExpr) and below.id == name for below in _below(node))


def _below(root: object) -> Iterator[object]:
    """Yield all nodes of a syntax tree."""
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, tuple):
            pending.extend(node)
        elif is_dataclass(node) and not isinstance(node, Span):
            yield node
            pending.extend(getattr(node, field.name) for field in fields(node) if field.name != "source")
