"""The syntax tree: what was written, with places. No name is resolved here."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from attnc.spec.source import SourceFile, Span

# --- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Name:
    """An identifier."""

    span: Span
    id: str


@dataclass(frozen=True, slots=True)
class Number:
    """A literal; a decimal one is the rational that its digits spell."""

    span: Span
    value: int | Fraction


@dataclass(frozen=True, slots=True)
class Truth:
    """`true` or `false`."""

    span: Span
    value: bool


@dataclass(frozen=True, slots=True)
class ListDisplay:
    """`[a, b, c]`."""

    span: Span
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Unary:
    """A prefix operator."""

    span: Span
    op: Literal["-", "+", "not"]
    operand: Expr


@dataclass(frozen=True, slots=True)
class Binary:
    """`op` is one of `+ - * / // % @ **`."""

    span: Span
    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class Comparison:
    """A chain `first op operand op operand …`; ops are `< <= > >= == != in`, and `not in`."""

    span: Span
    first: Expr
    rest: tuple[tuple[str, Expr], ...]


@dataclass(frozen=True, slots=True)
class Logic:
    """n-ary `and` or `or`."""

    span: Span
    op: Literal["and", "or"]
    operands: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """`then if condition else otherwise`."""

    span: Span
    then: Expr
    condition: Expr
    otherwise: Expr


@dataclass(frozen=True, slots=True)
class Attribute:
    """`base.name`."""

    span: Span
    base: Expr
    name: Name


@dataclass(frozen=True, slots=True)
class Index:
    """`base[i, j]`."""

    span: Span
    base: Expr
    indices: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a call, perhaps by name."""

    span: Span
    name: Name | None
    value: Expr


@dataclass(frozen=True, slots=True)
class Call:
    """`function(arguments)`."""

    span: Span
    function: Expr
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """`low .. high`, half-open."""

    span: Span
    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True)
class Running:
    """`name in domain`, or `name` alone: every one there is."""

    span: Span
    name: Name
    domain: Expr | Range | None


@dataclass(frozen=True, slots=True)
class Each:
    """`for a in …, b in … if condition`."""

    span: Span
    runnings: tuple[Running, ...]
    condition: Expr | None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """`function(body for …)`."""

    span: Span
    function: Expr
    body: Expr
    each: Each


Expr = (
    Name
    | Number
    | Truth
    | ListDisplay
    | Unary
    | Binary
    | Comparison
    | Logic
    | Choice
    | Attribute
    | Index
    | Call
    | Aggregate
)

# --- statements ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TypeExpr:
    """`name[dims]`; a recurrence's state has dims alone."""

    span: Span
    name: Name | None
    dims: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """`name: type = default`."""

    span: Span
    name: Name
    type: TypeExpr | None
    default: Expr | None


@dataclass(frozen=True, slots=True)
class Axis:
    """`y: domain`, in `tokens` and `pad`."""

    span: Span
    name: Name
    domain: Expr | Range


@dataclass(frozen=True, slots=True)
class Unit:
    """`b = k // block`, in `over` and `per`."""

    span: Span
    name: Name
    value: Expr


Binder = Running | Axis | Unit


@dataclass(frozen=True, slots=True)
class Text:
    """A docstring, dedented."""

    span: Span
    value: str


@dataclass(frozen=True, slots=True)
class Clause:
    """`word expression`: visible, align, documents, require, preset, score, …"""

    span: Span
    word: Name
    value: Expr


@dataclass(frozen=True, slots=True)
class Definition:
    """`let name(parameters) = value`, or `step name = value for …`."""

    span: Span
    word: Name
    name: Name
    parameters: tuple[Name, ...] | None
    value: Expr
    each: Each | None


@dataclass(frozen=True, slots=True)
class Declaration:
    """`input name: type = default`; also learned, state."""

    span: Span
    word: Name
    name: Name
    type: TypeExpr
    default: Expr | None


@dataclass(frozen=True, slots=True)
class Places:
    """`tokens name(binders)`, `pad`, `over`, `per`."""

    span: Span
    word: Name
    name: Name | None
    binders: tuple[Binder, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """`branch name[binders]`, `select`, `round`, with a body."""

    span: Span
    word: Name
    name: Name | None
    binders: tuple[Binder, ...]
    body: Body


Statement = Clause | Definition | Declaration | Places | Block


@dataclass(frozen=True, slots=True)
class Body:
    """An indented body."""

    doc: Text | None
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """`use module (names)`."""

    span: Span
    module: Name
    names: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """`def name(parameters) = expression`, or with a body of lets and a `return`."""

    span: Span
    name: Name
    parameters: tuple[Parameter, ...]
    value: Expr | Body


@dataclass(frozen=True, slots=True)
class Pattern:
    """`pattern` or `recurrence`."""

    span: Span
    word: Name
    name: Name
    parameters: tuple[Parameter, ...]
    body: Body


Item = Use | Function | Definition | Pattern


@dataclass(frozen=True, slots=True)
class Module:
    """A whole file."""

    source: SourceFile
    doc: Text | None
    items: tuple[Item, ...]
