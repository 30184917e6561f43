"""Names → program nodes, for expressions. Types are checked afterwards, in `spec.check`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import assert_never

from attnc.spec import program, syntax
from attnc.spec.builtins import (
    AGGREGATES,
    EXACT_FUNCTIONS,
    FLOAT_FUNCTIONS,
    FLOAT_NAMES,
    FUNCTIONS,
    HEAD_INDICES,
    IMPLIED_DIMENSIONS,
    LATER_FUNCTIONS,
    POSITIONS,
    REBINDABLE,
    RESERVED_NAMES,
    SELECTION_NAMES,
    SIZES,
)
from attnc.spec.call import bind_arguments
from attnc.spec.definitions import DefinitionOrder
from attnc.spec.diagnostics import Label
from attnc.spec.exact import INT_MAX
from attnc.spec.measure import Measures
from attnc.spec.report import Report
from attnc.spec.scope import (
    DefinitionSource,
    DefinitionSymbol,
    InputSymbol,
    ParameterSymbol,
    SegmentSymbol,
    SilentSymbol,
    SizeSymbol,
    Symbol,
)
from attnc.spec.source import SourceFile, Span
from attnc.spec.suggest import did_you_mean

UNKNOWN = program.Binder(Span(SourceFile("", ""), 0, 0), "")
"""Stands for an expression that was refused; what leans on it is not reported again."""

Names = Mapping[str, Symbol]
Binders = Mapping[str, program.Binder]

OPERATORS = {
    "+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "**": "pow",
    "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne",
}  # fmt: skip

_VECTORS = "a relation is exact: it depends on positions, sizes, parameters and int or bool inputs"


@dataclass(slots=True)
class Surroundings:
    """What the places of an expression know of the pattern around it."""

    segments: tuple[program.Segment, ...] = ()
    align: str | None = None
    alone: bool = False
    """Whether a `def` is read by itself: coordinates and the names of other bodies are taken on trust."""
    visible: list[program.Expr] = field(default_factory=list)
    """The lines of the relation so far."""


class Resolver:
    """Resolves the expressions of one pattern; a definition becomes one node, shared by its uses."""

    def __init__(self, report: Report, surroundings: Surroundings) -> None:
        self.report = report
        self.surroundings = surroundings
        self.order = DefinitionOrder(report)
        self.measures = Measures()
        self._definitions: dict[tuple[DefinitionSource, int], program.Definition] = {}
        self._so_far: dict[int, program.Definition] = {}

    def resolve(self, expression: syntax.Expr, names: Names, binders: Binders | None = None) -> program.Expr:
        """The program node of `expression`. Definitions it leans on are resolved first, so nothing recurses far."""
        self.prepare(expression, names)
        return ExpressionResolver(self, names, binders or {}).resolve(expression)

    def prepare(self, expression: syntax.Expr, names: Names) -> None:
        """Resolve every definition that `expression` leans on."""
        for source in self.order.under(expression, names):
            self.define(source)

    def define(self, source: DefinitionSource) -> program.Definition | None:
        """The definition, or None where it was refused."""
        key = (source, self._line(source))
        if source in self.order.broken:
            return None
        if key not in self._definitions:
            own = {b.name: b for b in source.parameters}
            body = ExpressionResolver(self, source.names, {**source.outer, **own}).resolve(source.body)
            definition = program.Definition(source.span, source.name, source.parameters, body)
            if not self._within_limits(definition):
                self.order.broken.add(source)
                return None
            self._definitions[key] = definition
        return self._definitions[key]

    def relation_so_far(self, span: Span) -> program.Expr:
        """What `visible` means here."""
        lines = self.surroundings.visible
        if len(lines) not in self._so_far:
            body = program.Operation(span, "and", tuple(lines)) if lines else program.Literal(span, True)
            self._so_far[len(lines)] = program.Definition(span, "visible", (), body)
        return program.DefinitionUse(span, self._so_far[len(lines)], ())

    def _line(self, source: DefinitionSource) -> int:
        return len(self.surroundings.visible) if self.order.mentions_visible(source) else 0

    def _within_limits(self, definition: program.Definition) -> bool:
        excess = self.measures.excess(definition.body)
        if excess:
            self.report.error("A507", f"`{definition.name}` {excess.message}", definition.span, help=excess.help)
        return not excess


class ExpressionResolver:
    """Resolves one body: the names around it and the binders inside it."""

    def __init__(self, resolver: Resolver, names: Names, binders: Binders) -> None:
        self._resolver = resolver
        self._report = resolver.report
        self._names = names
        self._binders = binders

    def resolve(self, node: syntax.Expr) -> program.Expr:
        """The program node of a syntax node."""
        match node:
            case syntax.Name():
                return self._name(node)
            case syntax.Number(span=span, value=value):
                return self._number(span, value)
            case syntax.Truth(span=span, value=value):
                return program.Literal(span, value)
            case syntax.ListDisplay(span=span, items=items):
                return program.Table(span, tuple(self.resolve(i) for i in items))
            case syntax.Unary():
                return self._unary(node)
            case syntax.Binary():
                return self._binary(node)
            case syntax.Comparison():
                return self._comparison(node)
            case syntax.Logic(span=span, op=op, operands=operands):
                return program.Operation(span, op, tuple(self.resolve(o) for o in operands))
            case syntax.Choice():
                parts = (self.resolve(node.condition), self.resolve(node.then), self.resolve(node.otherwise))
                return program.Choice(node.span, *parts)
            case syntax.Attribute():
                return self._attribute(node)
            case syntax.Index():
                return self._index(node)
            case syntax.Call():
                return self._call(node)
            case syntax.Aggregate():
                return self._aggregate(node)
            case _:
                assert_never(node)

    # --- names -------------------------------------------------------------------------------------------------------

    def _name(self, node: syntax.Name) -> program.Expr:
        if node.id in self._binders:
            return program.Local(node.span, self._binders[node.id])
        symbol = self._names.get(node.id)
        if symbol is not None:
            return self._symbol(node, symbol)
        return self._place(node)

    def _symbol(self, node: syntax.Name, symbol: Symbol) -> program.Expr:
        match symbol:
            case ParameterSymbol():
                return program.ParameterRead(node.span, node.id)
            case InputSymbol(input=tensor):
                return self._read(node.span, tensor, ())
            case SizeSymbol():
                return program.Size(node.span, node.id)
            case SegmentSymbol():
                return self.refuse(
                    "A208", f"`{node.id}` is a segment, not a value", node.span, f"ask `q in {node.id}` or `k in {node.id}`"
                )
            case DefinitionSymbol(source=source):
                return self._definition_name(node, source)
            case SilentSymbol():
                return self.unknown(node.span)
            case _:
                assert_never(symbol)

    def _definition_name(self, node: syntax.Name, source: DefinitionSource) -> program.Expr:
        if source.is_function:
            arguments = ", ".join(b.name for b in source.parameters)
            return self.refuse(
                "A207", f"`{node.id}` is a function, not a value", node.span, f"call it: `{node.id}({arguments})`"
            )
        return self._use(node.span, source, ())

    def _use(self, span: Span, source: DefinitionSource, arguments: tuple[program.Expr, ...]) -> program.Expr:
        definition = self._resolver.define(source)
        return program.DefinitionUse(span, definition, arguments) if definition else self.unknown(span)

    def _place(self, node: syntax.Name) -> program.Expr:
        name, span = node.id, node.span
        if name == "q" or name == "k":
            return program.Place(span, name)
        if name == "head" or name == "kv_head" or name == "batch":
            return program.HeadIndex(span, name)
        if name in SIZES:
            return program.Size(span, name)
        if name == "visible":
            return self._resolver.relation_so_far(span)
        return self._not_a_value(node)

    def _not_a_value(self, node: syntax.Name) -> program.Expr:
        name = node.id
        if self._resolver.surroundings.alone and name in FLOAT_NAMES | SELECTION_NAMES | {"t"}:
            return self.unknown(node.span)
        if name in FLOAT_NAMES:
            return self.refuse("A401", f"`{name}` is a floating-point value", node.span, _VECTORS)
        if name in SELECTION_NAMES:
            help_ = "`keep` of a `select` is the one place that knows it"
            return self.refuse("A206", f"`{name}` has no meaning here", node.span, help_)
        if name in FUNCTIONS:
            return self.refuse("A207", f"`{name}` is a function, not a value", node.span, f"call it: `{name}(…)`")
        if name == "t":
            help_ = "the position of a query is `q`, that of a key `k`"
            return self.refuse("A206", "`t` is the token of a recurrence's step", node.span, help_)
        return self._unknown_name(node, "name", self.known())

    def known(self) -> set[str]:
        """Every name that may stand here."""
        return {*self._binders, *self._names, *POSITIONS, *HEAD_INDICES, *SIZES, *FUNCTIONS, "visible"}

    def _unknown_name(self, node: syntax.Name, what: str, known: set[str]) -> program.Expr:
        otherwise = "declare it: a parameter of the pattern, an `input`, or a `let`"
        help_ = did_you_mean(node.id, known, otherwise)
        self._report.error("A201", f"unknown {what} `{node.id}`", node.span, "nothing has this name", help=help_)
        return self.unknown(node.span)

    def unknown(self, span: Span) -> program.Expr:
        """A node that stands for a refused expression."""
        return program.Local(span, UNKNOWN)

    def refuse(self, code: str, message: str, span: Span, help_: str = "", label: str = "") -> program.Expr:
        """Report, and go on with an unknown."""
        self._report.error(code, message, span, label, help=help_)
        return self.unknown(span)

    # --- operators ---------------------------------------------------------------------------------------------------

    def _number(self, span: Span, value: program.Scalar) -> program.Expr:
        if isinstance(value, int) and abs(value) > INT_MAX:
            return self.refuse("A404", "this integer does not fit in 64 bits", span, "integers go from -2**63 to 2**63 - 1")
        return program.Literal(span, value)

    def _unary(self, node: syntax.Unary) -> program.Expr:
        operand = self.resolve(node.operand)
        match node.op, operand:
            case "not", _:
                return program.Operation(node.span, "not", (operand,))
            case "-", program.Literal(value=value) if not isinstance(value, bool):
                return program.Literal(node.span, -value)
            case "-", _:
                return program.Operation(node.span, "neg", (operand,))
            case _:
                zero = program.Literal(node.span, 0)
                return program.Operation(node.span, "add", (zero, operand))

    def _binary(self, node: syntax.Binary) -> program.Expr:
        if node.op == "@":
            return self.refuse("A401", "`@` multiplies vectors, which are floating-point", node.span, _VECTORS)
        return program.Operation(node.span, OPERATORS[node.op], (self.resolve(node.left), self.resolve(node.right)))

    def _comparison(self, node: syntax.Comparison) -> program.Expr:
        if any(op in ("in", "not in") for op, _ in node.rest):
            return self._membership(node)
        operands = [self.resolve(node.first), *(self.resolve(right) for _, right in node.rest)]
        pairs = tuple(
            program.Operation(a.span.to(b.span), OPERATORS[op], (a, b))
            for (op, _), a, b in zip(node.rest, operands, operands[1:], strict=False)
        )
        return pairs[0] if len(pairs) == 1 else program.Operation(node.span, "and", pairs)

    def _membership(self, node: syntax.Comparison) -> program.Expr:
        if len(node.rest) > 1:
            return self.refuse("A209", "`in` does not chain", node.span, "join the two tests with `and`")
        op, right = node.rest[0]
        symbol = self._names.get(right.id) if isinstance(right, syntax.Name) else None
        if isinstance(symbol, SilentSymbol):
            return self.unknown(node.span)
        if not isinstance(symbol, SegmentSymbol):
            return self._no_set(node, right)
        if not isinstance(node.first, syntax.Name) or node.first.id not in POSITIONS:
            return self.refuse("A209", "only `q` and `k` can be in a segment", node.first.span, "write `q in …` or `k in …`")
        place: program.PlaceName = "q" if node.first.id == "q" else "k"
        test = program.InSegment(node.span, place, symbol.segment)
        return test if op == "in" else program.Operation(node.span, "not", (test,))

    def _no_set(self, node: syntax.Comparison, right: syntax.Expr) -> program.Expr:
        segments = {name for name, symbol in self._names.items() if isinstance(symbol, SegmentSymbol)}
        if isinstance(right, syntax.Name) and right.id not in self.known():
            return self._unknown_name(right, "segment or selection", segments)
        self.resolve(node.first)
        help_ = "segments are declared with `tokens name(…)`, selections with `select name`"
        return self.refuse("A209", "`in` needs a segment or a selection", right.span, help_, "this is neither")

    # --- attributes, items, calls ------------------------------------------------------------------------------------

    def _attribute(self, node: syntax.Attribute) -> program.Expr:
        base = node.base
        if not isinstance(base, syntax.Name):
            return self.refuse("A202", "only places have coordinates", node.span, "write `q.axis` or `k.axis`")
        if isinstance(self._names.get(base.id), SilentSymbol):
            return self.unknown(node.span)
        if base.id in self._binders:
            message = "a coordinate of a definition's parameter is not supported yet"
            return self.refuse("A701", message, node.span, "pass the coordinate itself, as in `f(q.y)`")
        if base.id not in POSITIONS:
            return self.refuse("A202", f"`{base.id}` has no coordinates", node.span, "write `q.axis` or `k.axis`")
        return self._coordinate(node, "q" if base.id == "q" else "k")

    def _coordinate(self, node: syntax.Attribute, place: program.PlaceName) -> program.Expr:
        around = self._resolver.surroundings
        for segment in around.segments:
            for i, axis in enumerate(segment.axes):
                if axis.name == node.name.id:
                    return program.Coordinate(node.span, place, segment, i)
        if around.alone:
            return self.unknown(node.span)
        axes = [axis.name for segment in around.segments for axis in segment.axes]
        listed = f"the axes are {', '.join(f'`{a}`' for a in axes)}" if axes else "declare axes: `tokens y: height, x: width`"
        help_ = did_you_mean(node.name.id, axes, listed)
        return self.refuse("A203", f"no axis is named `{node.name.id}`", node.name.span, help_)

    def _index(self, node: syntax.Index) -> program.Expr:
        base = node.base
        if isinstance(base, syntax.Name) and base.id not in self._binders:
            symbol = self._names.get(base.id)
            if isinstance(symbol, InputSymbol):
                return self._read(node.span, symbol.input, tuple(self.resolve(i) for i in node.indices))
            if symbol is None and base.id in ("q", "k", "v"):
                return self.refuse("A401", f"`{base.id}[…]` is a vector, which is floating-point", node.span, _VECTORS)
        table = self.resolve(base)
        for index in node.indices:
            table = program.Item(node.span, table, self.resolve(index))
        return table

    def _read(self, span: Span, tensor: program.Input, indices: tuple[program.Expr, ...]) -> program.Expr:
        written = [d for d in tensor.type.dims if d not in IMPLIED_DIMENSIONS]
        if len(indices) == len(written):
            return program.InputRead(span, tensor, indices)
        names = [str(d) if isinstance(d, str | int) else "…" for d in written]
        example = f"{tensor.name}[{', '.join(names)}]" if names else tensor.name
        message = f"`{tensor.name}` takes {_count(len(written), 'index', 'indices')} and is given {len(indices)}"
        self._report.error(
            "A306",
            message,
            span,
            also=(Label(tensor.span, "declared here"),),
            help=f"write `{example}`; `batch`, `head` and `kv_head` are implied",
        )
        return self.unknown(span)

    def _call(self, node: syntax.Call) -> program.Expr:
        function = node.function
        if not isinstance(function, syntax.Name):
            return self.refuse("A204", "this cannot be called", function.span, "only a function's name can")
        symbol = self._names.get(function.id)
        if isinstance(symbol, DefinitionSymbol) and symbol.source.is_function:
            return self._definition_call(node, symbol.source)
        if isinstance(symbol, SilentSymbol):
            return self.unknown(node.span)
        if symbol is not None or function.id in self._binders or function.id in RESERVED_NAMES:
            return self.refuse("A204", f"`{function.id}` is not a function", function.span, "use it without brackets")
        return self._builtin_call(node, function)

    def _builtin_call(self, node: syntax.Call, function: syntax.Name) -> program.Expr:
        name = function.id
        if name in FLOAT_FUNCTIONS | LATER_FUNCTIONS and self._resolver.surroundings.alone:
            return self.unknown(node.span)
        if name in FLOAT_FUNCTIONS:
            return self.refuse("A401", f"`{name}` computes floating-point values", node.span, _VECTORS)
        if name in LATER_FUNCTIONS:
            return self.refuse("A701", f"`{name}` is not supported yet", node.span)
        builtin = EXACT_FUNCTIONS.get(name)
        if builtin is None and name in AGGREGATES:
            return self.refuse("A204", f"`{name}` needs a `for`", node.span, f"write `{name}(… for i in low .. high)`")
        if builtin is None:
            functions = {n for n, s in self._names.items() if isinstance(s, DefinitionSymbol) and s.source.is_function}
            return self._unknown_name(function, "function", functions | FUNCTIONS)
        arguments = bind_arguments(self._report, node, name, builtin.parameters, builtin.variadic, {})
        if arguments is None:
            return self.unknown(node.span)
        return program.Operation(node.span, name, tuple(self.resolve(a) for a in arguments))

    def _definition_call(self, node: syntax.Call, source: DefinitionSource) -> program.Expr:
        names = tuple(b.name for b in source.parameters)
        defaults = {n: d for n, d in zip(names, source.defaults, strict=True) if d is not None}
        arguments = bind_arguments(self._report, node, source.name, names, False, defaults, source.span)
        if arguments is None:
            return self.unknown(node.span)
        outside = ExpressionResolver(self._resolver, source.names, {})
        given = {id(a.value) for a in node.arguments}
        resolved = tuple((self if id(a) in given else outside).resolve(a) for a in arguments)
        return self._use(node.span, source, resolved)

    # --- aggregates --------------------------------------------------------------------------------------------------

    def _aggregate(self, node: syntax.Aggregate) -> program.Expr:
        function = node.function
        if not isinstance(function, syntax.Name) or function.id not in AGGREGATES:
            if isinstance(function, syntax.Name) and function.id not in self.known():
                return self._unknown_name(function, "function", set(AGGREGATES))
            listed = ", ".join(sorted(AGGREGATES))
            return self.refuse("A204", "this function takes no `for`", function.span, f"those that do: {listed}")
        inner = ExpressionResolver(self._resolver, self._names, self._binders)
        runnings = tuple(inner._running(r) for r in node.each.runnings)
        body = inner.resolve(node.body)
        condition = inner.resolve(node.each.condition) if node.each.condition is not None else None
        return program.Aggregate(node.span, function.id, body, runnings, condition)

    def _running(self, node: syntax.Running) -> program.Running:
        low, high = self._domain(node)
        name = node.name.id
        if name in REBINDABLE and name not in self._binders:
            target: program.Binder | str = name
        else:
            self._check_hiding(node.name)
            target = program.Binder(node.name.span, name)
            self._binders = {**self._binders, name: target}
        return program.Running(target, low, high)  # type: ignore[arg-type]

    def _check_hiding(self, name: syntax.Name) -> None:
        hidden: Span | None = None
        if name.id in self._binders:
            hidden = self._binders[name.id].span
        elif name.id in self._names:
            hidden = self._names[name.id].span
        elif name.id not in RESERVED_NAMES | FUNCTIONS:
            return
        also = (Label(hidden, "the name it hides"),) if hidden else ()
        help_ = "choose another name; a `for` may bind anew only `q`, `k` and `head`"
        self._report.error("A211", f"`{name.id}` hides a name", name.span, "already taken", also=also, help=help_)

    def _domain(self, node: syntax.Running) -> tuple[program.Expr, program.Expr]:
        span = node.name.span
        match node.domain:
            case None:
                return self._everything(node.name)
            case syntax.Range(low=low, high=high):
                return self.resolve(low), self.resolve(high)
            case syntax.Name(id="group") if "group" not in self._names and "group" not in self._binders:
                head, size = program.HeadIndex(span, "kv_head"), program.Size(span, "group")
                low_ = program.Operation(span, "mul", (head, size))
                return low_, program.Operation(span, "add", (low_, size))
            case domain:
                return program.Literal(span, 0), self.resolve(domain)

    def _everything(self, name: syntax.Name) -> tuple[program.Expr, program.Expr]:
        span, zero = name.span, program.Literal(name.span, 0)
        if name.id == "head":
            return zero, program.Size(span, "heads")
        if name.id == "k":
            return zero, program.Size(span, "keys")
        if name.id == "q" and self._resolver.surroundings.align == "end":
            first = program.Operation(span, "sub", (program.Size(span, "keys"), program.Size(span, "queries")))
            return first, program.Size(span, "keys")
        if name.id == "q":
            return zero, program.Size(span, "queries")
        unknown = self.refuse("A210", f"`for {name.id}` needs a range", span, f"write `for {name.id} in low .. high`")
        return unknown, unknown


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"

