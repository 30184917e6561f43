"""The nodes of the syntax tree with their spans; names are not resolved."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from attnc.spec.source import SourceFile, Span

# --- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NameExpr:
    """An identifier."""

    span: Span
    id: str


@dataclass(frozen=True, slots=True)
class NumberExpr:
    """A number; a decimal number is the exact rational of its digits."""

    span: Span
    value: int | Fraction


@dataclass(frozen=True, slots=True)
class BoolExpr:
    """`true` or `false`."""

    span: Span
    value: bool


@dataclass(frozen=True, slots=True)
class ListExpr:
    """`[a, b, c]`."""

    span: Span
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class UnaryExpr:
    """A prefix operator."""

    span: Span
    op: Literal["-", "+", "not"]
    operand: Expr


@dataclass(frozen=True, slots=True)
class BinaryExpr:
    """A binary operation; `op` is one of `+ - * / // % @ **`."""

    span: Span
    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class ComparisonExpr:
    """A chain `first op operand op operand …`; ops are `< <= > >= == != in`, and `not in`."""

    span: Span
    first: Expr
    rest: tuple[tuple[str, Expr], ...]


@dataclass(frozen=True, slots=True)
class LogicExpr:
    """An n-ary `and` or `or`."""

    span: Span
    op: Literal["and", "or"]
    operands: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class ConditionalExpr:
    """`then if condition else otherwise`."""

    span: Span
    then: Expr
    condition: Expr
    otherwise: Expr


@dataclass(frozen=True, slots=True)
class AttributeExpr:
    """`base.name`."""

    span: Span
    base: Expr
    name: NameExpr


@dataclass(frozen=True, slots=True)
class IndexExpr:
    """`base[i, j]`."""

    span: Span
    base: Expr
    indices: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class CallArgument:
    """An argument of a call, perhaps with a name."""

    span: Span
    name: NameExpr | None
    value: Expr


@dataclass(frozen=True, slots=True)
class CallExpr:
    """`function(arguments)`."""

    span: Span
    function: Expr
    arguments: tuple[CallArgument, ...]


@dataclass(frozen=True, slots=True)
class RangeExpr:
    """`low .. high`, half-open."""

    span: Span
    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True)
class LoopVariable:
    """`name in domain`, or `name` alone for all values."""

    span: Span
    name: NameExpr
    domain: Expr | RangeExpr | None


@dataclass(frozen=True, slots=True)
class ForClause:
    """`for a in …, b in … if condition`."""

    span: Span
    runnings: tuple[LoopVariable, ...]
    condition: Expr | None


@dataclass(frozen=True, slots=True)
class AggregateExpr:
    """`function(body for …)`."""

    span: Span
    function: Expr
    body: Expr
    each: ForClause


Expr = (
    NameExpr
    | NumberExpr
    | BoolExpr
    | ListExpr
    | UnaryExpr
    | BinaryExpr
    | ComparisonExpr
    | LogicExpr
    | ConditionalExpr
    | AttributeExpr
    | IndexExpr
    | CallExpr
    | AggregateExpr
)

# --- statements ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TypeExpr:
    """`name[dims]`; the type of a state may omit the name."""

    span: Span
    name: NameExpr | None
    dims: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class ParameterDecl:
    """`name: type = default`."""

    span: Span
    name: NameExpr
    type: TypeExpr | None
    default: Expr | None


@dataclass(frozen=True, slots=True)
class AxisDecl:
    """`y: domain`, in `tokens` and `pad`."""

    span: Span
    name: NameExpr
    domain: Expr | RangeExpr


@dataclass(frozen=True, slots=True)
class UnitDecl:
    """`b = k // block`, in `over` and `per`."""

    span: Span
    name: NameExpr
    value: Expr


Binder = LoopVariable | AxisDecl | UnitDecl


@dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring, dedented."""

    span: Span
    value: str


@dataclass(frozen=True, slots=True)
class ClauseStatement:
    """`word expression`: visible, align, documents, require, preset, score, …"""

    span: Span
    word: NameExpr
    value: Expr


@dataclass(frozen=True, slots=True)
class DefinitionDecl:
    """`let name(parameters) = value`, or `step name = value for …`."""

    span: Span
    word: NameExpr
    name: NameExpr
    parameters: tuple[NameExpr, ...] | None
    value: Expr
    each: ForClause | None


@dataclass(frozen=True, slots=True)
class Declaration:
    """`input name: type = default`; also learned, state."""

    span: Span
    word: NameExpr
    name: NameExpr
    type: TypeExpr
    default: Expr | None


@dataclass(frozen=True, slots=True)
class BinderClause:
    """`tokens name(binders)`, `pad`, `over`, `per`."""

    span: Span
    word: NameExpr
    name: NameExpr | None
    binders: tuple[Binder, ...]


@dataclass(frozen=True, slots=True)
class BlockStatement:
    """`branch name[binders]`, `select`, `round`, with a body."""

    span: Span
    word: NameExpr
    name: NameExpr | None
    binders: tuple[Binder, ...]
    body: Body


Statement = ClauseStatement | DefinitionDecl | Declaration | BinderClause | BlockStatement


@dataclass(frozen=True, slots=True)
class Body:
    """An indented body."""

    doc: Docstring | None
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class UseDecl:
    """`use module (names)`."""

    span: Span
    module: NameExpr
    names: tuple[NameExpr, ...]


@dataclass(frozen=True, slots=True)
class FunctionDecl:
    """`def name(parameters) = expression`, or with a body of lets and a `return`."""

    span: Span
    name: NameExpr
    parameters: tuple[ParameterDecl, ...]
    value: Expr | Body


@dataclass(frozen=True, slots=True)
class PatternDecl:
    """`pattern` or `recurrence`."""

    span: Span
    word: NameExpr
    name: NameExpr
    parameters: tuple[ParameterDecl, ...]
    body: Body


Item = UseDecl | FunctionDecl | DefinitionDecl | PatternDecl


@dataclass(frozen=True, slots=True)
class ModuleSyntax:
    """A whole file."""

    source: SourceFile
    doc: Docstring | None
    items: tuple[Item, ...]
