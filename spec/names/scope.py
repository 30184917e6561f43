"""Symbols that names resolve to, and the sources of definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from typing_extensions import assert_never

from attnc.spec import program, syntax
from attnc.spec.source import Span


@dataclass(frozen=True, slots=True, eq=False)
class DefinitionSource:
    """The source of a `let` or `def`, with the names that its body may read.

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
    """Whether uses must call the definition: a `def`, or a `let` with parameters."""

    @property
    def word(self) -> str:
        """Return the definition's name as messages quote it."""
        return f"`{self.name}`"


@dataclass(frozen=True, slots=True, eq=False)
class ParameterSymbol:
    """A parameter of the pattern."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class InputSymbol:
    """An input of the pattern."""

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
    """A unit: its value in expressions, its tokens after the `in` of a `for`. `is_key`: the keys of a row are units."""

    span: Span
    unit: program.Unit
    is_key: bool = False

    @property
    def binder(self) -> program.Binder:
        """The binder of the symbol's value."""
        return self.unit.binder


@dataclass(frozen=True, slots=True, eq=False)
class RangeSymbol:
    """A name that iterates over a range. `is_key`: the keys of a row are the entries of the range."""

    span: Span
    binder: program.Binder
    is_key: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PartSymbol:
    """A name of one of several ranges, computed from an index of the flat range."""

    span: Span
    definition: program.Definition


@dataclass(frozen=True, slots=True, eq=False)
class BranchSymbol:
    """A branch, or a family of branches."""

    span: Span
    name: str
    is_family: bool
    is_stateful: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class SelectionSymbol:
    """A selection, or a family of selections.

    `names` is the number of indices of a member, 0 for a single selection; `ranges` resolves their ranges.
    `is_numbered`: the selection selects indices of a range, which cover no tokens. `by_query`: each query, or unit of
    queries, selects separately.
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
    """A name whose declaration was refused; its uses are not reported again."""

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
    """Yield every expression inside `expression`, including itself, without recursion."""
    pending: list[syntax.Expr] = [expression]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(reversed(children(node)))


def children(node: syntax.Expr) -> list[syntax.Expr]:
    """Return the expressions directly inside a node."""
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
    parts: list[syntax.Expr] = [node.body]
    for variable in node.each.runnings:
        match variable.domain:
            case None:
                pass
            case syntax.RangeExpr(low=low, high=high):
                parts += [low, high]
            case domain:
                parts.append(domain)
    return parts + ([node.each.condition] if node.each.condition is not None else [])
