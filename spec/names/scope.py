"""Symbols that names resolve to, and the sources of definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from typing_extensions import assert_never

from attnc.spec import program, syntax
from attnc.spec.source import Span


@dataclass(frozen=True, slots=True, eq=False)
class DefinitionSource:
    """A `let` or `def` as written, with the names its body sees.

    `outer` holds the parameters of an enclosing `def`; `names` is filled while the enclosing body is read, so that
    definitions may stand before or after their uses.
    """

    span: Span
    name: str
    parameters: tuple[program.Binder, ...]
    defaults: tuple[syntax.Expr | None, ...]
    body: syntax.Expr
    names: Mapping[str, Symbol]
    outer: Mapping[str, program.Binder] = field(default_factory=dict)
    is_function: bool = False
    """Whether it must be called: a `def`, or a `let` with parameters."""

    @property
    def word(self) -> str:
        """How a message calls it."""
        return f"`{self.name}`"


@dataclass(frozen=True, slots=True, eq=False)
class ParameterSymbol:
    """A parameter of the pattern."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class InputSymbol:
    """An input."""

    span: Span
    input: program.Input


@dataclass(frozen=True, slots=True, eq=False)
class SizeSymbol:
    """A new dimension of a type, or the run-time length of a segment."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSymbol:
    """A segment, for `q in text`."""

    span: Span
    segment: program.TokenSegment


@dataclass(frozen=True, slots=True, eq=False)
class DefinitionSymbol:
    """A `let` or a `def`."""

    span: Span
    source: DefinitionSource


@dataclass(frozen=True, slots=True, eq=False)
class UnitSymbol:
    """A unit: its value in expressions, its tokens after `in` of a `for`. `is_key`: it stands for the keys of a row."""

    span: Span
    unit: program.Unit
    is_key: bool = False

    @property
    def binder(self) -> program.Binder:
        """The binder of the symbol's value."""
        return self.unit.binder


@dataclass(frozen=True, slots=True, eq=False)
class RangeSymbol:
    """A name that runs over a range around its body. `is_key`: it stands for the keys of a row."""

    span: Span
    binder: program.Binder
    is_key: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PartSymbol:
    """A name among several for the keys of a row, defined by the number of the key."""

    span: Span
    definition: program.Definition


@dataclass(frozen=True, slots=True, eq=False)
class BranchSymbol:
    """A branch, or a family of them."""

    span: Span
    name: str
    is_family: bool
    is_stateful: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class SelectionSymbol:
    """A selection, or a family of them. `is_numbered`: it chooses numbers, which stand for no tokens.

    `names`: how many a member has, 0 where it is one selection; `ranges` resolves theirs. `by_query`: whether queries,
    or units of them, decide by themselves.
    """

    span: Span
    name: str
    names: int
    ranges: Callable[[], tuple[program.KeyRange, ...]]
    is_numbered: bool = False
    by_query: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class StateSymbol:
    """A state of a recurrence."""

    span: Span
    state: program.StateClause


@dataclass(frozen=True, slots=True, eq=False)
class SilentSymbol:
    """A name whose declaration was refused: its uses are not reported again."""

    span: Span


Symbol = (
    ParameterSymbol
    | InputSymbol
    | SizeSymbol
    | SegmentSymbol
    | DefinitionSymbol
    | UnitSymbol
    | RangeSymbol
    | PartSymbol
    | BranchSymbol
    | SelectionSymbol
    | StateSymbol
    | SilentSymbol
)


def walk(expression: syntax.Expr) -> Iterator[syntax.Expr]:
    """Every expression inside `expression`, itself included, without recursion."""
    pending: list[syntax.Expr] = [expression]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(reversed(children(node)))


def children(node: syntax.Expr) -> list[syntax.Expr]:
    """The expressions directly inside one."""
    match node:
        case syntax.NameExpr() | syntax.NumberExpr() | syntax.BoolExpr():
            return []
        case syntax.AttributeExpr(base=base):
            return [base]
        case syntax.IndexExpr(base=base, indices=indices):
            return [base, *indices]
        case syntax.CallExpr(function=function, arguments=arguments):
            return [function, *(a.value for a in arguments)]
        case syntax.AggregateExpr():
            return _aggregate_children(node)
        case _:
            return _operands(node)


def _operands(
    node: syntax.ListExpr
    | syntax.UnaryExpr
    | syntax.BinaryExpr
    | syntax.ComparisonExpr
    | syntax.LogicExpr
    | syntax.ConditionalExpr,
) -> list[syntax.Expr]:
    match node:
        case syntax.ListExpr(items=items):
            return list(items)
        case syntax.UnaryExpr(operand=operand):
            return [operand]
        case syntax.BinaryExpr(left=left, right=right):
            return [left, right]
        case syntax.ComparisonExpr(first=first, rest=rest):
            return [first, *(operand for _, operand in rest)]
        case syntax.LogicExpr(operands=operands):
            return list(operands)
        case syntax.ConditionalExpr(then=then, condition=condition, otherwise=otherwise):
            return [then, condition, otherwise]
        case _:
            assert_never(node)


def _aggregate_children(node: syntax.AggregateExpr) -> list[syntax.Expr]:
    found: list[syntax.Expr] = [node.body]
    for running in node.each.runnings:
        match running.domain:
            case None:
                pass
            case syntax.RangeExpr(low=low, high=high):
                found += [low, high]
            case domain:
                found.append(domain)
    return found + ([node.each.condition] if node.each.condition is not None else [])
