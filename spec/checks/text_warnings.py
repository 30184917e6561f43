"""Warn about a text without errors: names that nothing reads, and windows one key wider than their name says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from attnc.spec import syntax
from attnc.spec.diagnostics import DiagnosticList
from attnc.spec.source import Span

WIDTHS = ("window", "w", "width", "size", "span")
"""Names that suggest the number of keys of a window."""


def warn(module: syntax.ModuleSyntax, report: DiagnosticList) -> None:
    """Report the warnings of a file (codes W0xx)."""
    _warn_unused_names(module, report)
    for node in _below(module):
        if isinstance(node, syntax.ComparisonExpr):
            _warn_wide_window(node, report)


def _below(root: object) -> Iterator[object]:
    """Yield all nodes of a syntax tree, `root` first."""
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, tuple):
            pending.extend(reversed(node))
        elif is_dataclass(node) and not isinstance(node, Span):
            yield node
            pending.extend(getattr(node, field.name) for field in reversed(fields(node)) if field.name != "source")


# --- a window one off ------------------------------------------------------------------------------------------------


def _warn_wide_window(node: syntax.ComparisonExpr, report: DiagnosticList) -> None:
    """Warn about `q - k <= window`, which keeps `window + 1` keys."""
    left = node.first
    for op, right in node.rest:
        if op == "<=" and _is_gap(left) and isinstance(right, syntax.NameExpr) and _is_width(right.id):
            width = right.id
            report.warning(
                "W003",
                f"`q - k <= {width}` keeps `{width}` + 1 keys, as the distance starts at 0",
                Span(node.span.source, left.span.start, right.span.end),
                "one key more than `<`",
                help=f"write `q - k < {width}` for a window of `{width}` keys; if one more is meant, give `{width}` "
                f"another name, such as `reach`",
            )
        left = right


def _is_gap(node: syntax.Expr) -> bool:
    names = [node.left, node.right] if isinstance(node, syntax.BinaryExpr) and node.op == "-" else []
    return [n.id for n in names if isinstance(n, syntax.NameExpr)] == ["q", "k"]


def _is_width(name: str) -> bool:
    return name in WIDTHS or name.endswith("_window") or name.startswith("window_")


# --- names that nothing reads ----------------------------------------------------------------------------------------


def _warn_unused_names(module: syntax.ModuleSyntax, report: DiagnosticList) -> None:
    """Warn about declared names that no expression reads."""
    for name, kind, read in _declared(module):
        if name.id not in read and not name.id.startswith("_"):
            help_ = "remove it, or read it; a name that begins with `_` may be unused"
            report.warning("W005", f"nothing reads the {kind} `{name.id}`", name.span, "unused", help=help_)


def _declared(module: syntax.ModuleSyntax) -> Iterator[tuple[syntax.NameExpr, str, set[str]]]:
    """Yield each declared name, the kind of its declaration, and the names that are read in its scope.

    Definitions of a file without patterns are left out, because other files read them.
    """
    patterns = [item for item in module.items if isinstance(item, syntax.PatternDecl)]
    if patterns:
        read_anywhere = _read(module.items)
        uses = [item for item in module.items if isinstance(item, syntax.UseDecl)]
        yield from ((name, "import", read_anywhere) for use in uses for name in use.names)
    for item in module.items:
        if isinstance(item, syntax.FunctionDecl):
            read = _read((item.value,))
            yield from ((parameter.name, "parameter", read) for parameter in item.parameters)
    for pattern in patterns:
        yield from _declared_in(pattern)


def _declared_in(pattern: syntax.PatternDecl) -> Iterator[tuple[syntax.NameExpr, str, set[str]]]:
    read = _read((pattern.body, pattern.parameters))
    yield from ((parameter.name, "parameter", read) for parameter in pattern.parameters)
    for node in _below(pattern.body):
        if isinstance(node, syntax.DefinitionDecl) and node.word.id == "let":
            yield node.name, "definition", read
            read_in_value = _read((node.value,))
            yield from ((name, "parameter", read_in_value) for name in node.parameters or ())
        elif isinstance(node, syntax.Declaration) and node.word.id == "input":
            yield node.name, "input", read


def _read(roots: tuple[object, ...]) -> set[str]:
    """Return the names that expressions and types read, without the names that declarations introduce."""
    result: set[str] = set()
    pending: list[object] = list(roots)
    while pending:
        node = pending.pop()
        match node:
            case syntax.NameExpr(id=name):
                result.add(name)
            case tuple():
                pending.extend(node)
            case _ if is_dataclass(node) and not isinstance(node, Span):
                declared = (
                    ("name", "word", "module") if not isinstance(node, syntax.TypeExpr | syntax.CallArgument) else ()
                )
                hidden = {*declared, "source"} | ({"parameters"} if isinstance(node, syntax.DefinitionDecl) else set())
                if isinstance(node, syntax.AttributeExpr | syntax.UseDecl):
                    hidden |= {"name", "names"}
                pending.extend(getattr(node, f.name) for f in fields(node) if f.name not in hidden)
    return result
