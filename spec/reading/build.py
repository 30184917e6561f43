"""Build the `syntax` tree from the parse tree, with one small function per grammar rule; nothing recurses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from lark import Token, Tree

from attnc.spec import syntax
from attnc.spec.reading.fault import Fault
from attnc.spec.source import SourceFile, Span

Children = list[Any]
Maker = Callable[[Span, Children], Any]


def build(tree: Tree[Token], source: SourceFile) -> syntax.ModuleSyntax:
    """Return the syntax tree of a parse tree that `limits.check_tree` has checked."""
    done: Children = []
    for node in _children_first(tree):
        if isinstance(node, Tree):
            size = len(node.children)
            children = done[len(done) - size :]
            del done[len(done) - size :]
            done.append(_MAKERS[node.data](_span(source, node), children))
        else:
            done.append(_leaf(source, node))
    (module,) = done
    assert isinstance(module, syntax.ModuleSyntax)
    return module


def _children_first(tree: Tree[Token]) -> list[Tree[Token] | Token | None]:
    order: list[Tree[Token] | Token | None] = []
    pending: list[Tree[Token] | Token | None] = [tree]
    while pending:
        node = pending.pop()
        order.append(node)
        if isinstance(node, Tree):
            pending += node.children
    order.reverse()
    return order


def _span(source: SourceFile, node: Tree[Token]) -> Span:
    if node.meta.empty:
        return Span(source, 0, 0)
    return Span(source, node.meta.start_pos, node.meta.end_pos)


def _leaf(source: SourceFile, token: Token | None) -> syntax.NameExpr | None:
    """Return a token as a name with its span; the rule that contains it decides what it becomes."""
    if token is None:
        return None
    start = token.start_pos or 0
    return syntax.NameExpr(Span(source, start, start + len(token)), str(token))


# --- expressions -----------------------------------------------------------------------------------------------------


def _number(span: Span, children: Children) -> syntax.NumberExpr:
    digits: str = children[0].id
    return syntax.NumberExpr(span, int(digits) if digits.isdigit() else Fraction(digits))


def _chain(span: Span, children: Children) -> syntax.Expr:
    """Build `a + b - c` from the left; brackets may make `span` wider than the operands."""
    left: syntax.Expr = children[0]
    last = len(children) - 2
    for i in range(1, len(children), 2):
        operator, right = children[i], children[i + 1]
        operation_span = span if i == last else Span(span.source, span.start, right.span.end)
        left = syntax.BinaryExpr(operation_span, operator.id, left, right)
    return left


def _logic(span: Span, children: Children) -> syntax.LogicExpr:
    return syntax.LogicExpr(span, children[1].id, tuple(children[::2]))


# --- statements ------------------------------------------------------------------------------------------------------


def _type(span: Span, children: Children) -> syntax.TypeExpr:
    name, *dims = children
    return syntax.TypeExpr(span, name, tuple(d for d in dims if d is not None))


def _declaration(span: Span, children: Children) -> syntax.Declaration:
    word, name, kind, default = children
    if kind.name is None and word.id != "state":
        raise _no_kind(kind)
    return syntax.Declaration(span, word, name, kind, default)


def _param(span: Span, children: Children) -> syntax.ParameterDecl:
    name, kind, default = children
    if kind is not None and kind.name is None:
        raise _no_kind(kind)
    return syntax.ParameterDecl(span, name, kind, default)


def _no_kind(kind: syntax.TypeExpr) -> Fault:
    return Fault(
        "A110",
        "the type has dimensions but no kind",
        kind.span.start,
        kind.span.end,
        help=f"write `real{kind.span.text}`, or int, bool, complex, unit, log_decay, positive",
    )


def _let(span: Span, children: Children) -> syntax.DefinitionDecl:
    word, name, *parameters, value = children
    names = tuple(p for p in parameters if p is not None)
    return syntax.DefinitionDecl(span, word, name, names or None, value, None)


def _heading(span: Span, children: Children) -> syntax.BlockStatement:
    word, name, binders = children if len(children) == 3 else (children[0], None, None)
    return syntax.BlockStatement(span, word, name, binders or (), syntax.Body(None, ()))


def _doc(span: Span, children: Children) -> syntax.Docstring:
    raw: str = children[0].id
    quote = '"""' if raw.startswith('"""') else '"'
    return syntax.Docstring(span, inspect.cleandoc(raw[len(quote) : -len(quote)]))


# --- items -----------------------------------------------------------------------------------------------------------


_MAKERS: dict[str, Maker] = {
    "name": lambda span, c: c[0],
    "number": _number,
    "truth": lambda span, c: syntax.BoolExpr(span, c[0].id == "true"),
    "list": lambda span, c: syntax.ListExpr(span, tuple(c)),
    "signed": lambda span, c: syntax.UnaryExpr(span, c[0].id, c[1]),
    "negated": lambda span, c: syntax.UnaryExpr(span, c[0].id, c[1]),
    "sum": _chain,
    "product": _chain,
    "power": _chain,
    "comparison": lambda span, c: syntax.ComparisonExpr(span, c[0], tuple(zip(c[1::2], c[2::2], strict=True))),
    "comparator": lambda span, c: " ".join(word.id for word in c),
    "conjunction": _logic,
    "disjunction": _logic,
    "choice": lambda span, c: syntax.ConditionalExpr(span, c[0], c[2], c[4]),
    "attribute": lambda span, c: syntax.AttributeExpr(span, *c),
    "index": lambda span, c: syntax.IndexExpr(span, c[0], tuple(c[1:])),
    "argument": lambda span, c: syntax.CallArgument(span, None, c[0]),
    "named": lambda span, c: syntax.CallArgument(span, *c),
    "call": lambda span, c: syntax.CallExpr(span, c[0], tuple(a for a in c[1:] if a is not None)),
    "aggregate": lambda span, c: syntax.AggregateExpr(span, *c),
    "domain": lambda span, c: c[0] if c[2] is None else syntax.RangeExpr(span, c[0], c[2]),
    "running": lambda span, c: syntax.LoopVariable(span, c[0], c[2]),
    "runnings": lambda _, c: tuple(c),
    "each": lambda span, c: syntax.ForClause(span, c[1], c[3]),
    "axis": lambda span, c: syntax.AxisDecl(span, *c),
    "axes": lambda _, c: tuple(c),
    "unit": lambda span, c: syntax.UnitDecl(span, *c),
    "binders": lambda _, c: tuple(c),
    "type": _type,
    "bare_type": lambda span, c: syntax.TypeExpr(span, None, tuple(c)),
    "clause": lambda span, c: syntax.ClauseStatement(span, *c),
    "let": _let,
    "step": lambda span, c: syntax.DefinitionDecl(span, c[0], c[1], None, c[2], c[3]),
    "declaration": _declaration,
    "places": lambda span, c: syntax.BinderClause(span, c[0], None, c[1]),
    "segment": lambda span, c: syntax.BinderClause(span, *c),
    "heading": _heading,
    "block": lambda _, c: replace(c[0], body=c[1]),
    "doc": _doc,
    "body": lambda _, c: syntax.Body(c[0], tuple(c[1:])),
    "param": _param,
    "params": lambda _, c: tuple(c),
    "use": lambda span, c: syntax.UseDecl(span, c[1], tuple(c[2:])),
    "signature": lambda span, c: syntax.FunctionDecl(span, c[1], c[2] or (), syntax.Body(None, ())),
    "function": lambda _, c: replace(c[0], value=c[1]),
    "title": lambda span, c: syntax.PatternDecl(span, c[0], c[1], c[2] or (), syntax.Body(None, ())),
    "pattern": lambda _, c: replace(c[0], body=c[1]),
    "start": lambda span, c: syntax.ModuleSyntax(span.source, c[0], tuple(c[1:])),
}
