"""Build the `syntax` tree from the parse tree, with one small function per grammar rule; nothing recurses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


def _comparison(span: Span, children: Children) -> syntax.ComparisonExpr:
    rest = tuple((children[i], children[i + 1]) for i in range(1, len(children), 2))
    return syntax.ComparisonExpr(span, children[0], rest)


def _unary(span: Span, children: Children) -> syntax.UnaryExpr:
    operator, operand = children
    return syntax.UnaryExpr(span, operator.id, operand)


def _call(span: Span, children: Children) -> syntax.CallExpr:
    function, *arguments = children
    return syntax.CallExpr(span, function, tuple(a for a in arguments if a is not None))


def _domain(span: Span, children: Children) -> syntax.Expr | syntax.RangeExpr:
    low, _, high = children
    return low if high is None else syntax.RangeExpr(span, low, high)


def _loop_variable(span: Span, children: Children) -> syntax.LoopVariable:
    name, _, domain = children
    return syntax.LoopVariable(span, name, domain)


def _each(span: Span, children: Children) -> syntax.ForClause:
    _, runnings, _, condition = children
    return syntax.ForClause(span, runnings, condition)


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


def _step(span: Span, children: Children) -> syntax.DefinitionDecl:
    word, name, value, each = children
    return syntax.DefinitionDecl(span, word, name, None, value, each)


def _binder_clause(span: Span, children: Children) -> syntax.BinderClause:
    word, binders = children
    return syntax.BinderClause(span, word, None, binders)


def _heading(span: Span, children: Children) -> syntax.BlockStatement:
    word, name, binders = children if len(children) == 3 else (children[0], None, None)
    return syntax.BlockStatement(span, word, name, binders or (), syntax.Body(None, ()))


def _block(_: Span, children: Children) -> syntax.BlockStatement:
    heading, body = children
    return syntax.BlockStatement(heading.span, heading.word, heading.name, heading.binders, body)


def _body(_: Span, children: Children) -> syntax.Body:
    doc, *statements = children
    return syntax.Body(doc, tuple(statements))


def _doc(span: Span, children: Children) -> syntax.Docstring:
    raw: str = children[0].id
    quote = '"""' if raw.startswith('"""') else '"'
    return syntax.Docstring(span, inspect.cleandoc(raw[len(quote) : -len(quote)]))


# --- items -----------------------------------------------------------------------------------------------------------


def _use(span: Span, children: Children) -> syntax.UseDecl:
    _, module, *names = children
    return syntax.UseDecl(span, module, tuple(names))


def _signature(span: Span, children: Children) -> syntax.FunctionDecl:
    _, name, parameters = children
    return syntax.FunctionDecl(span, name, parameters or (), syntax.Body(None, ()))


def _function(_: Span, children: Children) -> syntax.FunctionDecl:
    signature, value = children
    return syntax.FunctionDecl(signature.span, signature.name, signature.parameters, value)


def _title(span: Span, children: Children) -> syntax.PatternDecl:
    word, name, parameters = children
    return syntax.PatternDecl(span, word, name, parameters or (), syntax.Body(None, ()))


def _pattern(_: Span, children: Children) -> syntax.PatternDecl:
    title, body = children
    return syntax.PatternDecl(title.span, title.word, title.name, title.parameters, body)


def _module(span: Span, children: Children) -> syntax.ModuleSyntax:
    doc, *items = children
    return syntax.ModuleSyntax(span.source, doc, tuple(items))


def _tuple(_: Span, children: Children) -> tuple[Any, ...]:
    return tuple(children)


_MAKERS: dict[str, Maker] = {
    "name": lambda span, c: c[0],
    "number": _number,
    "truth": lambda span, c: syntax.BoolExpr(span, c[0].id == "true"),
    "list": lambda span, c: syntax.ListExpr(span, tuple(c)),
    "signed": _unary,
    "negated": _unary,
    "sum": _chain,
    "product": _chain,
    "power": _chain,
    "comparison": _comparison,
    "comparator": lambda span, c: " ".join(word.id for word in c),
    "conjunction": _logic,
    "disjunction": _logic,
    "choice": lambda span, c: syntax.ConditionalExpr(span, c[0], c[2], c[4]),
    "attribute": lambda span, c: syntax.AttributeExpr(span, *c),
    "index": lambda span, c: syntax.IndexExpr(span, c[0], tuple(c[1:])),
    "argument": lambda span, c: syntax.CallArgument(span, None, c[0]),
    "named": lambda span, c: syntax.CallArgument(span, *c),
    "call": _call,
    "aggregate": lambda span, c: syntax.AggregateExpr(span, *c),
    "domain": _domain,
    "running": _loop_variable,
    "runnings": _tuple,
    "each": _each,
    "axis": lambda span, c: syntax.AxisDecl(span, *c),
    "axes": _tuple,
    "unit": lambda span, c: syntax.UnitDecl(span, *c),
    "binders": _tuple,
    "type": _type,
    "bare_type": lambda span, c: syntax.TypeExpr(span, None, tuple(c)),
    "clause": lambda span, c: syntax.ClauseStatement(span, *c),
    "let": _let,
    "step": _step,
    "declaration": _declaration,
    "places": _binder_clause,
    "segment": lambda span, c: syntax.BinderClause(span, *c),
    "heading": _heading,
    "block": _block,
    "doc": _doc,
    "body": _body,
    "param": _param,
    "params": _tuple,
    "use": _use,
    "signature": _signature,
    "function": _function,
    "title": _title,
    "pattern": _pattern,
    "start": _module,
}
