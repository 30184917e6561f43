"""Resolve names to program nodes: positions, sizes, inputs, definitions, branches and states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from typing import Literal as OneOf

from typing_extensions import assert_never

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.builtins import (
    FLOAT_NAMES,
    FUNCTIONS,
    HEAD_INDICES,
    HINTS,
    IMPLIED_DIMENSIONS,
    POSITIONS,
    SELECTION_NAMES,
    SIZES,
    TOKEN_DIMENSIONS,
    call_of,
)
from attnc.spec.names.families import SelectedPlace
from attnc.spec.names.scope import (
    BranchSymbol,
    DefinitionSource,
    DefinitionSymbol,
    InputSymbol,
    ParameterSymbol,
    PartSymbol,
    RangeSymbol,
    SegmentSymbol,
    SelectionSymbol,
    SilentSymbol,
    SizeSymbol,
    StateSymbol,
    Symbol,
    UnitSymbol,
)
from attnc.spec.names.worlds import World
from attnc.spec.source import SourceFile, Span
from attnc.spec.suggest import did_you_mean
from attnc.spec.types import Dim

if TYPE_CHECKING:
    from attnc.spec.names.expression_resolver import Resolver

UNKNOWN = program.Binder(Span(SourceFile("", ""), 0, 0), "")
"""The binder of a refused expression; expressions that contain it are not reported again."""

Part = OneOf["score", "from", "keep", "always"]
"""A clause of a `select`; `covers` is resolved like `always`."""


@dataclass(frozen=True, slots=True)
class Selecting:
    """The clause of a `select` that is being resolved, and the name of its candidates."""

    part: Part
    key: program.Binder | OneOf["q", "k"]


Names = Mapping[str, Symbol]
Binders = Mapping[str, program.Binder]

EXACT_ONLY = (
    "a relation is exact: it may read positions, sizes, parameters and int or bool inputs; "
    "vectors and real numbers belong in `score` or `weights`"
)


SCORES_ONLY = "scores, weights and values may use positions, inputs, vectors and the functions of the reference"


_PLACE_OF = {"query": "q", "key": "k", "token": "k"}
"""The position at which a dimension is usually read, for examples in messages."""

_LABELS = {
    "A202": "has no coordinates",
    "A203": "no such axis",
    "A204": "cannot be called like this",
    "A206": "not available here",
    "A207": "a function",
    "A208": "a segment",
    "A209": "not possible with `in`",
    "A210": "over which values?",
    "A401": "not exact",
    "A404": "out of range",
    "A701": "not compiled yet",
    "A703": "not compiled yet",
}
"""The label under the caret of an error that gives no label."""


@dataclass(slots=True)
class Surroundings:
    """The pattern's declarations that names in an expression may refer to."""

    segments: tuple[program.TokenSegment, ...] = ()
    align: str | None = None
    patterns: frozenset[str] = frozenset()
    """The names of the file's patterns, which are not values."""
    alone: bool = False
    """Whether a `def` is resolved outside any pattern; unknown coordinates and clause names are not reported then."""
    visible: list[program.Expr] = field(default_factory=list)
    """The lines of the relation that are resolved so far."""
    selecting: Selecting | None = None
    """The clause of a `select` that is being resolved, where `inf`, `rank`, `mass` and `score` may be available."""
    orders: dict[program.Input, program.Input] = field(default_factory=dict)
    """The ranks `order(input)` of inputs, each as an input."""
    selected: dict[str, program.SelectionClauses] = field(default_factory=dict)
    """The selections that are resolved so far, by name."""
    places: dict[program.Binder, SelectedPlace] = field(default_factory=dict)
    """The names that iterate over a selection, by binder."""
    recurrent: bool = False
    """Whether a recurrence is resolved: `q`, `k`, `v` and the inputs belong to one token at position `t`."""


class NameResolver:
    """Resolves names in one body, given the names around it and the binders inside it."""

    def __init__(
        self,
        resolver: Resolver,
        names: Names,
        binders: Binders,
        world: World = "exact",
        units: Mapping[str, program.Unit] | None = None,
    ) -> None:
        """`units`: the units that are passed for parameters, by the name of the parameter."""
        self._resolver = resolver
        self._report = resolver.report
        self._names = names
        self._binders = binders
        self._world = world
        self._units = units or {}

    def resolve_name(self, node: syntax.NameExpr) -> program.Expr:
        """Resolve a plain name."""
        if node.id in self._binders:
            return program.Local(node.span, self._binders[node.id])
        symbol = self._names.get(node.id)
        if symbol is not None:
            return self._symbol(node, symbol)
        return self._place(node)

    def _symbol(self, node: syntax.NameExpr, symbol: Symbol) -> program.Expr:  # noqa: C901  one case a kind
        match symbol:
            case ParameterSymbol():
                return program.ParameterRead(node.span, node.id)
            case InputSymbol(input=tensor):
                return self.read(node.span, tensor, ())
            case SizeSymbol():
                return program.Size(node.span, node.id)
            case SegmentSymbol():
                return self.refuse(
                    "A208",
                    f"`{node.id}` is a segment, not a value",
                    node.span,
                    f"test `q in {node.id}` or `k in {node.id}`",
                )
            case DefinitionSymbol(source=source):
                return self._definition_name(node, source)
            case UnitSymbol(binder=binder) | RangeSymbol(binder=binder):
                return program.Local(node.span, binder)
            case PartSymbol(definition=definition):
                return program.DefinitionUse(node.span, definition, ())
            case BranchSymbol():
                return self.branch(node.span, symbol, ())
            case SelectionSymbol():
                help_ = f"test `k in {node.id}`, or read `{node.id}.size`"
                return self.refuse("A208", f"`{node.id}` is a selection, not a value", node.span, help_, "a set")
            case StateSymbol(state=state):
                if self._world == "exact":
                    return self.refuse(
                        "A401", f"`{node.id}` is a state, which is floating-point", node.span, EXACT_ONLY
                    )
                return program.StateRead(node.span, state)
            case SilentSymbol():
                return self.unknown(node.span)
            case _:
                assert_never(symbol)

    def _definition_name(self, node: syntax.NameExpr, source: DefinitionSource) -> program.Expr:
        if source.is_function:
            arguments = ", ".join(b.name for b in source.parameters)
            return self.refuse(
                "A207", f"`{node.id}` is a function, not a value", node.span, f"call it: `{node.id}({arguments})`"
            )
        return self._use(node.span, source, ())

    def _use(
        self,
        span: Span,
        source: DefinitionSource,
        arguments: tuple[program.Expr, ...],
        units: tuple[tuple[str, program.Unit], ...] = (),
    ) -> program.Expr:
        definition = self._resolver.define(source, self._world, units)
        return program.DefinitionUse(span, definition, arguments) if definition else self.unknown(span)

    def _place(self, node: syntax.NameExpr) -> program.Expr:  # noqa: C901  one case a kind
        name, span = node.id, node.span
        if self._resolver.surroundings.recurrent:
            token_name = self._token_name(node)
            if token_name is not None:
                return token_name
        selection_name = self._selection_name(node)
        if selection_name is not None:
            return selection_name
        match name:
            case "q" | "k":
                return program.Vector(span, name) if self._world == "vector" else program.PositionRead(span, name)
            case "v" if self._world != "exact":
                return program.Vector(span, name)
            case "score" if self._world != "exact":
                return program.ScoreRead(span)
            case "scale" if self._world != "exact":
                return program.ScaleRead(span)
            case "head" | "kv_head" | "batch":
                return program.HeadIndexRead(span, name)
            case "visible" if self._resolver.surroundings.selecting:
                help_ = "state the candidates in `from`: the relation may itself read the selection"
                return self.refuse("A206", "`visible` is not available in a `select`", span, help_)
            case "visible":
                return self._resolver.relation_so_far(span)
        return program.Size(span, name) if name in SIZES else self._not_a_value(node)

    def _selection_name(self, node: syntax.NameExpr) -> program.Expr | None:
        """Resolve a name that is available only in the clauses of a `select`; None for other names."""
        selecting = self._resolver.surroundings.selecting
        part = None if selecting is None else selecting.part
        if node.id == "inf" and part in ("score", "keep") and self._world != "exact":
            return program.Infinity(node.span)
        ranking_names: dict[str, OneOf["rank", "mass", "score"]] = {"rank": "rank", "mass": "mass", "score": "score"}
        if node.id in ranking_names and part == "keep" and self._world != "exact":
            return program.RankingRead(node.span, ranking_names[node.id])
        return None

    def _token_name(self, node: syntax.NameExpr) -> program.Expr | None:
        """Resolve a name of a recurrence's token, its position or one of its vectors; None for other names."""
        match node.id:
            case "t":
                return program.PositionRead(node.span, "q")
            case "q" | "k" if self._world == "exact":
                help_ = "the position of the token is `t`"
                return self.refuse("A206", f"`{node.id}` is a vector of the token", node.span, help_, "no position")
            case "q":
                return program.Vector(node.span, "q")
            case "k" | "v" if self._world != "exact":
                tensor: OneOf["k", "v"] = "k" if node.id == "k" else "v"
                return program.Vector(node.span, tensor, program.PositionRead(node.span, "q"))
            case "score" | "visible":
                help_ = "it needs a query and a key, and a recurrence processes one token at a time"
                return self.refuse("A206", f"`{node.id}` is not available in a recurrence", node.span, help_)
        return None

    def _not_a_value(self, node: syntax.NameExpr) -> program.Expr:
        name = node.id
        if self._resolver.surroundings.alone and name in FLOAT_NAMES | SELECTION_NAMES | {"t"}:
            return self.unknown(node.span)
        if name in FLOAT_NAMES and self._world != "exact":
            help_ = "to hide a key use `visible`; elsewhere write a large number, such as `1e30`"
            return self.refuse("A703", f"`{name}` is not supported here yet", node.span, help_)
        if name in FLOAT_NAMES:
            return self.refuse("A401", f"`{name}` is a floating-point value", node.span, EXACT_ONLY)
        if name in SELECTION_NAMES:
            help_ = "move the condition into the `keep` of a `select`"
            return self.refuse("A206", f"`{name}` is only available in `keep`", node.span, help_)
        if name in FUNCTIONS:
            return self.refuse("A207", f"`{name}` is a function, not a value", node.span, f"call it: `{call_of(name)}`")
        if name == "t":
            help_ = "use `q` for the position of the query, `k` for the position of the key"
            return self.refuse("A206", "`t` is only available in a recurrence", node.span, help_)
        if name in self._resolver.surroundings.patterns:
            help_ = "move the relation that both need into a `def`, and call it in both"
            return self.refuse("A603", f"`{name}` is a pattern, not a value", node.span, help_, "a pattern")
        return self._unknown_name(node, "name", self.known_names())

    def known_names(self) -> set[str]:
        """Return every name that an expression may read here."""
        return {*self._binders, *self._names, *POSITIONS, *HEAD_INDICES, *SIZES, *FUNCTIONS, "visible"}

    def _unknown_name(self, node: syntax.NameExpr, kind: str, candidates: set[str]) -> program.Expr:
        otherwise = "declare it as a parameter of the pattern, an `input` or a `let`"
        if kind == "function":
            otherwise = "define it with `def`, or `use` the file that does"
        help_ = HINTS.get(node.id) or did_you_mean(node.id, candidates, otherwise)
        self._report.error("A201", f"unknown {kind} `{node.id}`", node.span, "not declared", help=help_)
        return self.unknown(node.span)

    def unknown(self, span: Span) -> program.Expr:
        """Return the node that replaces a refused expression."""
        return program.Local(span, UNKNOWN)

    def refuse(self, code: str, message: str, span: Span, help_: str = "", label: str = "") -> program.Expr:
        """Report an error and return the node that replaces the refused expression."""
        self._report.error(code, message, span, label or _LABELS.get(code, ""), help=help_)
        return self.unknown(span)

    def branch(self, span: Span, symbol: BranchSymbol, indices: tuple[program.Expr, ...]) -> program.Expr:
        """Return the output of a branch; `indices`: the member of a family, the position, entries of the vector."""
        if self._world == "exact":
            return self.refuse(
                "A401", f"`{symbol.name}` is the output of a branch, which is floating-point", span, EXACT_ONLY
            )
        if self._resolver.surroundings.recurrent:
            help_ = "read it in `combine`, or in a branch with keys"
            message = "a branch with a state that reads other branches is not supported yet"
            return self.refuse("A703", message, span, help_)
        remaining = list(indices)
        if symbol.is_family and not remaining:
            help_ = f"name a member: `{symbol.name}[i]`"
            return self.refuse("A206", f"`{symbol.name}` is a family of branches", span, help_, "which one?")
        member = remaining.pop(0) if symbol.is_family else None
        at = remaining.pop(0) if remaining else None
        result: program.Expr = program.BranchRead(span, symbol.name, "out", member, at)
        for index in remaining:
            result = program.Item(span, result, index)
        return result

    def read(self, span: Span, tensor: program.Input, indices: tuple[program.Expr, ...]) -> program.Expr:
        """Return an element of an input; report an error for a wrong number of indices."""
        if self._resolver.surroundings.recurrent:
            return self._token_read(span, tensor, indices)
        explicit_dims = [d for d in tensor.type.dims if d not in IMPLIED_DIMENSIONS]
        if tensor.type.is_floating and self._world == "exact":
            return self.refuse("A401", f"`{tensor.name}` holds floating-point numbers", span, EXACT_ONLY)
        if len(indices) == len(explicit_dims):
            return program.InputRead(span, tensor, indices)
        if tensor.type.is_floating and len(indices) < len(explicit_dims):
            return self._vector_read(span, tensor, indices, explicit_dims)
        names = [_PLACE_OF.get(d, d) if isinstance(d, str) else "…" for d in explicit_dims]
        example = f"{tensor.name}[{', '.join(names)}]" if names else tensor.name
        message = f"`{tensor.name}` takes {_count(len(explicit_dims), 'index', 'indices')}, got {len(indices)}"
        self._report.error(
            "A306",
            message,
            span,
            also=(Label(tensor.span, "declared here"),),
            help=f"write `{example}`; `batch`, `head` and `kv_head` are implied",
        )
        return self.unknown(span)

    def order(self, node: syntax.CallExpr) -> program.Input | None:
        """Return `order(input)`, the ranks of the tokens, as an input; None after an error was reported."""
        arguments = [argument.value for argument in node.arguments]
        symbol = (
            self._names.get(arguments[0].id)
            if len(arguments) == 1 and isinstance(arguments[0], syntax.NameExpr)
            else None
        )
        if isinstance(symbol, SilentSymbol) or self._resolver.surroundings.alone:
            return None
        tensor = symbol.input if isinstance(symbol, InputSymbol) else None
        dims = () if tensor is None else tensor.type.dims
        tokens = [dim for dim in dims if dim not in IMPLIED_DIMENSIONS]
        fits = len(tokens) == 1 and dims[-1] in TOKEN_DIMENSIONS and tensor is not None
        if not fits or tensor is None or tensor.type.kind not in ("int", "real"):
            help_ = "declare one number per token: `input h: int[batch, head, key]`, and write `order(h)[k]`"
            self.refuse("A305", "`order` needs an input with one number per token", node.span, help_)
            return None
        if self._resolver.surroundings.recurrent:
            help_ = "write `scan h[t]` to process the tokens by increasing numbers"
            self.refuse("A703", "`order` in a recurrence is not supported yet", node.span, help_)
            return None
        orders = self._resolver.surroundings.orders
        if tensor not in orders:
            type_ = replace(tensor.type, kind="int", refinement=None)
            orders[tensor] = program.Input(tensor.span, f"order({tensor.name})", type_, ranks_of=tensor)
        return orders[tensor]

    def selected_place(self, node: syntax.Expr) -> SelectedPlace | None:
        """Return the entry of a selection that a name iterates over; None for other names."""
        if not isinstance(node, syntax.NameExpr):
            return None
        symbol = self._names.get(node.id)
        binder = self._binders.get(node.id) or (symbol.binder if isinstance(symbol, RangeSymbol) else None)
        return None if binder is None else self._resolver.surroundings.places.get(binder)

    def _token_read(self, span: Span, tensor: program.Input, indices: tuple[program.Expr, ...]) -> program.Expr:
        """Return an element of an input in a recurrence, where the index of the token is implied too."""
        if tensor.type.is_floating and self._world == "exact":
            return self.refuse("A401", f"`{tensor.name}` holds floating-point numbers", span, EXACT_ONLY)
        explicit_dims = [d for d in tensor.type.dims if d not in IMPLIED_DIMENSIONS]
        indexed_dims = [d for d in explicit_dims if d not in TOKEN_DIMENSIONS]
        if len(indices) > len(indexed_dims) or (not tensor.type.is_floating and len(indices) < len(indexed_dims)):
            names = ", ".join("i" if isinstance(d, str) else "…" for d in indexed_dims)
            example = f"{tensor.name}[{names}]" if indexed_dims else tensor.name
            message = f"`{tensor.name}` takes {_count(len(indexed_dims), 'index', 'indices')} here, got {len(indices)}"
            also = (Label(tensor.span, "declared here"),)
            help_ = f"write `{example}`; `batch`, `head` and the token are implied"
            self._report.error("A306", message, span, also=also, help=help_)
            return self.unknown(span)
        index_iterator, all_indices = iter(indices), list[program.Expr]()
        remaining = len(indices)
        for dim in explicit_dims:
            if dim in TOKEN_DIMENSIONS:
                all_indices.append(program.PositionRead(span, "q"))
            elif remaining:
                all_indices.append(next(index_iterator))
                remaining -= 1
            else:
                break
        vector_dims = explicit_dims[len(all_indices) :]
        if any(d in TOKEN_DIMENSIONS for d in vector_dims):
            help_ = "declare the dimension of the token before the dimensions of the vector"
            also = (Label(tensor.span, "declared here"),)
            self._report.error("A306", f"`{tensor.name}` is read as a vector over tokens", span, also=also, help=help_)
            return self.unknown(span)
        return (
            self._vector_read(span, tensor, tuple(all_indices), explicit_dims)
            if vector_dims
            else program.InputRead(span, tensor, tuple(all_indices))
        )

    def _vector_read(
        self, span: Span, tensor: program.Input, indices: tuple[program.Expr, ...], explicit_dims: list[Dim]
    ) -> program.Expr:
        """Return a vector of an input over the dimensions without an index, which must be the last ones."""
        dims = list(tensor.type.dims)
        first = dims.index(explicit_dims[len(indices)])
        implied = next((d for d in dims[first:] if isinstance(d, str) and d in IMPLIED_DIMENSIONS), None)
        if implied is None:
            return program.InputRead(span, tensor, indices)
        help_ = f"declare `{implied}` before the dimensions of the vector"
        message = f"`{tensor.name}` is read as a vector, but its dimension `{implied}` follows the vector's dimensions"
        self._report.error("A306", message, span, also=(Label(tensor.span, "declared here"),), help=help_)
        return self.unknown(span)


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
