"""Resolve expressions to program nodes. Types are checked afterwards, in `spec.checks.checker`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal as OneOf

from typing_extensions import assert_never

from attnc.spec import program, syntax
from attnc.spec.checks.measure import Measures
from attnc.spec.diagnostics import DiagnosticList, Label
from attnc.spec.exact_operations import EXACT_FUNCTIONS
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, checked
from attnc.spec.names.argument_binding import bind_arguments
from attnc.spec.names.builtins import (
    AGGREGATES,
    COMPLEX_FUNCTIONS,
    FLOAT_BUILTINS,
    FLOAT_FUNCTIONS,
    FUNCTIONS,
    IMPLIED_DIMENSIONS,
    LATER_FUNCTIONS,
    REBINDABLE,
    RESERVED_NAMES,
    VECTOR_FUNCTIONS,
)
from attnc.spec.names.definitions import DefinitionOrder
from attnc.spec.names.name_resolver import (
    EXACT_ONLY,
    SCORES_ONLY,
    UNKNOWN,
    Binders,
    Names,
    Surroundings,
)
from attnc.spec.names.scope import (
    BranchSymbol,
    DefinitionSource,
    DefinitionSymbol,
    InputSymbol,
    RangeSymbol,
    SelectionSymbol,
    SilentSymbol,
    UnitSymbol,
    walk,
)
from attnc.spec.names.sets import SetResolver
from attnc.spec.names.worlds import World, Worlds
from attnc.spec.source import Span

OPERATORS = {
    "+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "**": "pow",
    "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne",
}  # fmt: skip


Lines = tuple[program.Expr, ...]
"""The lines of a relation that are resolved so far."""

Units = tuple[tuple[str, program.Unit], ...]
"""The parameters of a definition for which a call passes units, with the units."""


class Resolver:
    """Resolves the expressions of one pattern; a definition becomes one node per world, shared by its uses."""

    def __init__(self, report: DiagnosticList, surroundings: Surroundings) -> None:
        self.report = report
        self.surroundings = surroundings
        self.order = DefinitionOrder(report)
        self.worlds = Worlds()
        self.measures = Measures()
        self._definitions: dict[tuple[object, ...], program.Definition] = {}
        self._relations: dict[Lines, program.Definition] = {}
        self._takes_units: dict[DefinitionSource, bool] = {}

    def resolve(
        self, expression: syntax.Expr, names: Names, binders: Binders | None = None, world: World = "exact"
    ) -> program.Expr:
        """Return the program node of `expression`; resolves its definitions first, to keep the recursion shallow."""
        self.prepare(expression, names, world)
        return ExpressionResolver(self, names, binders or {}, world).resolve(expression)

    def prepare(self, expression: syntax.Expr, names: Names, world: World = "exact") -> None:
        """Resolve every definition that `expression` uses, directly or indirectly."""
        if world == "exact":
            for source in self.order.under(expression, names):
                self.define(source, world)
            return
        demanded = self.worlds.demanded(expression, names, world)
        for source in self.order.under(expression, names, again=True):
            for used_in in sorted(demanded[source]) if not self.takes_units(source) else ():
                self.define(source, used_in)

    def define(self, source: DefinitionSource, world: World, units: Units = ()) -> program.Definition | None:
        """Return the definition in a world, with units for some parameters; None where it was refused."""
        surroundings = self.surroundings
        relation: Lines = tuple(surroundings.visible) if self.order.mentions_visible(source) else ()
        key = (source, world, relation, units, surroundings.recurrent, surroundings.selecting)
        if source in self.order.broken:
            return None
        if self.order.uses_excessive(source):
            self.order.refuse_excessive(source)
            return None
        if key not in self._definitions:
            parameters = {b.name: b for b in source.parameters}
            resolver = ExpressionResolver(self, source.names, {**source.outer, **parameters}, world, dict(units))
            body = resolver.resolve(source.body)
            definition = program.Definition(source.span, source.name, source.parameters, body)
            if not self._within_limits(definition):
                self.order.refuse_excessive(source)
                return None
            self._definitions[key] = definition
        return self._definitions[key]

    def takes_units(self, source: DefinitionSource) -> bool:
        """Whether a parameter may be a unit: it is a domain, has attributes, or is passed on as a unit."""
        if source in self.order.broken:
            return False
        if source not in self._takes_units:
            self._takes_units[source] = False  # guards against recursion; cycles are reported by `DefinitionOrder`
            self._takes_units[source] = any(name in self._unit_parameters(source) for name in source.parameters)
        return self._takes_units[source]

    def _unit_parameters(self, source: DefinitionSource) -> set[program.Binder]:
        """Return the parameters that the body uses where a unit may stand."""
        parameters = {binder.name: binder for binder in source.parameters}
        binders: set[program.Binder] = set()
        for node in walk(source.body) if parameters else ():
            places: list[object] = [node.base] if isinstance(node, syntax.AttributeExpr) else []
            places += [r.domain for r in node.each.runnings] if isinstance(node, syntax.AggregateExpr) else []
            if isinstance(node, syntax.CallExpr) and isinstance(node.function, syntax.NameExpr):
                symbol = source.names.get(node.function.id)
                if isinstance(symbol, DefinitionSymbol) and self.takes_units(symbol.source):
                    places += [argument.value for argument in node.arguments]
            names = (place.id for place in places if isinstance(place, syntax.NameExpr))
            binders |= {parameters[name] for name in names if name in parameters}
        return binders

    def is_used(self, source: DefinitionSource) -> bool:
        """Whether a definition has been resolved in some world."""
        return any(key[0] is source for key in self._definitions)

    def relation_so_far(self, span: Span) -> program.Expr:
        """Return the conjunction of the relation's lines so far, the meaning of `visible` at this point."""
        lines = tuple(self.surroundings.visible)
        if lines not in self._relations:
            body = program.Operation(span, "and", lines) if lines else program.Literal(span, True)
            self._relations[lines] = program.Definition(span, "visible", (), body)
        return program.DefinitionUse(span, self._relations[lines], ())

    def _within_limits(self, definition: program.Definition) -> bool:
        excess = self.measures.excess(definition.body)
        if excess:
            self.report.error("A507", f"`{definition.name}` {excess.message}", definition.span, help=excess.help)
        return not excess


class ExpressionResolver(SetResolver):
    """Resolves the expressions of one body, given the names around it and the binders inside it."""

    def _in_world(self, world: World) -> ExpressionResolver:
        """Return a resolver with the same names in another world."""
        if self._world in ("exact", world):
            return self
        return ExpressionResolver(self._resolver, self._names, self._binders, world, self._units)

    def _applied(self, span: Span, op: str, *operands: program.Expr) -> program.Operation:
        return program.Operation(span, op, operands, floating=self._world != "exact")

    def resolve(self, node: syntax.Expr) -> program.Expr:
        """Return the program node of a syntax node."""
        match node:
            case syntax.NameExpr():
                return self.resolve_name(node)
            case syntax.NumberExpr(span=span, value=value):
                return self._number(span, value)
            case syntax.BoolExpr(span=span, value=value):
                return program.Literal(span, value)
            case syntax.AttributeExpr():
                return self._attribute(node)
            case syntax.IndexExpr():
                return self._index(node)
            case syntax.CallExpr():
                return self._call(node)
            case syntax.AggregateExpr():
                return self._aggregate(node)
            case _:
                return self._operation(node)

    def _operation(
        self,
        node: syntax.ListExpr
        | syntax.UnaryExpr
        | syntax.BinaryExpr
        | syntax.ComparisonExpr
        | syntax.LogicExpr
        | syntax.ConditionalExpr,
    ) -> program.Expr:
        match node:
            case syntax.ListExpr(span=span, items=items):
                return program.ListValue(span, tuple(self.resolve(i) for i in items))
            case syntax.UnaryExpr():
                return self._unary(node)
            case syntax.BinaryExpr():
                return self._binary(node)
            case syntax.ComparisonExpr():
                return self._comparison(node)
            case syntax.LogicExpr(span=span, op=op, operands=operands):
                return program.Operation(span, op, tuple(self._in_world("float").resolve(o) for o in operands))
            case syntax.ConditionalExpr():
                condition = self._in_world("float").resolve(node.condition)
                return program.ConditionalValue(
                    node.span, condition, self.resolve(node.then), self.resolve(node.otherwise)
                )
            case _:
                assert_never(node)

    # --- operators ---------------------------------------------------------------------------------------------------

    def _number(self, span: Span, value: program.Scalar) -> program.Expr:
        try:
            checked(value)
        except ArithmeticFault:
            kind = "integer does not fit in 64 bits" if isinstance(value, int) else "fraction is too fine or too large"
            help_ = "integers go from -2**63 to 2**63 - 1; the parts of a fraction have 128 bits"
            return self.refuse("A404", f"this {kind}", span, help_)
        return program.Literal(span, value)

    def _unary(self, node: syntax.UnaryExpr) -> program.Expr:
        if node.op == "-" and isinstance(node.operand, syntax.NumberExpr):
            return self._number(node.span, -node.operand.value)
        operand = self.resolve(node.operand)
        match node.op, operand:
            case "not", _:
                return program.Operation(node.span, "not", (operand,))
            case "-", _:
                return self._applied(node.span, "neg", operand)
            case _:
                return self._applied(node.span, "add", program.Literal(node.span, 0), operand)

    def _binary(self, node: syntax.BinaryExpr) -> program.Expr:
        if node.op == "@":
            if self._world == "exact":
                return self.refuse("A401", "`@` multiplies vectors, which are floating-point", node.span, EXACT_ONLY)
            if not self._resolver.surroundings.recurrent:
                help_ = "write `dot(a, b)`, `outer(a, b)`"
                return self.refuse("A703", "`@` is not supported in a pattern yet", node.span, help_)
            inner = self._in_world("vector")
            return self._applied(node.span, "matmul", inner.resolve(node.left), inner.resolve(node.right))
        left, right = self.resolve(node.left), self.resolve(node.right)
        op = "share" if node.op == "/" and _is_sum(right) else OPERATORS[node.op]
        return self._applied(node.span, op, left, right)

    def _comparison(self, node: syntax.ComparisonExpr) -> program.Expr:
        if any(op in ("in", "not in") for op, _ in node.rest):
            return self._membership(node)
        sides = [node.first, *(right for _, right in node.rest)]
        selecting = self._resolver.surroundings.selecting
        in_keep = selecting is not None and selecting.part == "keep"
        operands = [self._in_world("float").resolve(side) for side in sides]
        pairs = tuple(
            program.Operation(a.span.to(b.span), OPERATORS[op], (a, b), floating=in_keep)
            for (op, _), a, b in zip(node.rest, operands, operands[1:], strict=False)
        )
        return pairs[0] if len(pairs) == 1 else program.Operation(node.span, "and", pairs)

    def _index(self, node: syntax.IndexExpr) -> program.Expr:
        base = node.base
        if isinstance(base, syntax.NameExpr) and base.id not in self._binders:
            symbol = self._names.get(base.id)
            if isinstance(symbol, InputSymbol):
                return self._read_at(node, symbol.input)
            if isinstance(symbol, BranchSymbol):
                return self.branch(node.span, symbol, self._indices(node))
            if symbol is None and base.id in ("q", "k", "v", "score") and self._world != "exact":
                return self._indexed(node, base.id)
            if symbol is None and base.id in ("q", "k", "v"):
                return self.refuse(
                    "A401", f"`{base.id}[…]` is a vector, which is floating-point", node.span, EXACT_ONLY
                )
        if (
            isinstance(base, syntax.CallExpr)
            and isinstance(base.function, syntax.NameExpr)
            and base.function.id == "order"
        ):
            tensor = self.order(base)
            return self.unknown(node.span) if tensor is None else self._read_at(node, tensor)
        table = self.resolve(base)
        indices = self._indices(node)
        is_member = isinstance(base, syntax.IndexExpr)  # a member of a family, all of its indices given
        if isinstance(table, program.BranchRead) and table.at is None and (table.part == "lse" or is_member):
            table, indices = replace(table, span=node.span, at=indices[0]), indices[1:]
        return _items(node.span, table, indices)

    def _read_at(self, node: syntax.IndexExpr, tensor: program.Input) -> program.Expr:
        """Return an element of an input; report an error for an index that is implied."""
        for index in node.indices:
            if isinstance(index, syntax.NameExpr) and index.id in IMPLIED_DIMENSIONS & set(tensor.type.dims):
                help_ = f"remove it: `{tensor.name}` is always read at the current `{index.id}`"
                message = f"the index `{index.id}` of `{tensor.name}` is implied and must not be written"
                return self.refuse("A306", message, index.span, help_, "implied")
        return self.read(node.span, tensor, self._indices(node))

    def _indexed(self, node: syntax.IndexExpr, name: str) -> program.Expr:
        """Return `q[i]`, `k[j]`, `v[j]` or `score[j]`, or an entry of the vector."""
        at, *rest = self._indices(node)
        if name == "score":
            return _items(node.span, program.ScoreRead(node.span, at), rest)
        tensor: OneOf["q", "k", "v"] = "q" if name == "q" else "k" if name == "k" else "v"
        return _items(node.span, program.Vector(node.span, tensor, at), rest)

    def _call(self, node: syntax.CallExpr) -> program.Expr:
        function = node.function
        if not isinstance(function, syntax.NameExpr):
            help_ = "only the name of a function can be called"
            if isinstance(function, syntax.AttributeExpr):
                help_ = f"call the function by its name: `{function.name.id}(…)`"
            return self.refuse("A204", "this cannot be called", function.span, help_)
        symbol = self._names.get(function.id)
        if isinstance(symbol, DefinitionSymbol) and symbol.source.is_function:
            return self._definition_call(node, symbol.source)
        if isinstance(symbol, SilentSymbol):
            return self.unknown(node.span)
        if symbol is not None or function.id in self._binders or function.id in RESERVED_NAMES:
            help_ = "use it without brackets"
            if isinstance(symbol, InputSymbol):
                help_ = f"read an entry with `[ ]`: `{function.id}[…]`"
            return self.refuse("A204", f"`{function.id}` is not a function", function.span, help_)
        return self._builtin_call(node, function)

    def _builtin_call(self, node: syntax.CallExpr, function: syntax.NameExpr) -> program.Expr:
        name = function.id
        if name in FLOAT_FUNCTIONS | LATER_FUNCTIONS.keys() and self._resolver.surroundings.alone:
            return self.unknown(node.span)
        if self._world != "exact":
            special = self._special_call(node, name)
            if special is not None:
                return special
        if name in FLOAT_FUNCTIONS and self._world == "exact":
            return self.refuse("A401", f"`{name}` computes floating-point values", node.span, EXACT_ONLY)
        if name == "order":
            ranks = self.order(node)
            return self.unknown(node.span) if ranks is None else self.read(node.span, ranks, ())
        builtin = EXACT_FUNCTIONS.get(name) or FLOAT_BUILTINS.get(name)
        if builtin is None or self._unsupported(name) is not None:
            return self._no_builtin(node, function)
        if name in ("min", "max") and len(node.arguments) == 1 and self._world != "exact":
            help_ = self._aggregate_example(name, node)
            return self.refuse("A305", f"`{name}` needs two values or a `for`", node.span, help_)
        arguments = bind_arguments(self._report, node, name, builtin.parameters, builtin.variadic, {})
        if arguments is None:
            return self.unknown(node.span)
        inner = self._in_world("vector") if name in VECTOR_FUNCTIONS else self
        return self._applied(node.span, name, *(inner.resolve(a) for a in arguments))

    def _no_builtin(self, node: syntax.CallExpr, function: syntax.NameExpr) -> program.Expr:
        name, unsupported = function.id, self._unsupported(function.id)
        if unsupported is not None:
            code, message, help_ = unsupported
            return self.refuse(code, message, node.span, help_)
        if name in AGGREGATES:
            return self.refuse("A204", f"`{name}` needs a `for`", node.span, self._aggregate_example(name, node))
        functions = {n for n, s in self._names.items() if isinstance(s, DefinitionSymbol) and s.source.is_function}
        complex_functions = COMPLEX_FUNCTIONS if self._resolver.surroundings.recurrent else frozenset[str]()
        return self._unknown_name(function, "function", functions | FUNCTIONS | complex_functions)

    def _unsupported(self, name: str) -> tuple[str, str, str] | None:
        """Return code, message and remedy for a function that is not supported here; None for other functions."""
        if name in COMPLEX_FUNCTIONS and not self._resolver.surroundings.recurrent:
            help_ = "write a recurrence: its states and inputs may be `complex`"
            return "A704", f"`{name}` needs complex numbers, which patterns do not support yet", help_
        if name not in LATER_FUNCTIONS:
            return None
        code, help_ = LATER_FUNCTIONS[name]
        return code, f"`{name}` is not supported yet", help_

    def _special_call(self, node: syntax.CallExpr, name: str) -> program.Expr | None:
        """Resolve a call of `softmax`, `merge` or an aggregate of a unit's vectors; None for other functions."""
        if name == "diag" and not self._resolver.surroundings.recurrent:
            return self.refuse("A703", "`diag` is not supported in a pattern yet", node.span, SCORES_ONLY)
        if name == "softmax":
            return self._softmax(node)
        if name == "merge":
            return self._merge(node)
        if name in AGGREGATES and len(node.arguments) == 1:
            return self._pooled(node, name, node.arguments[0].value)
        if name in FLOAT_FUNCTIONS and name not in FLOAT_BUILTINS:
            return self.refuse("A703", f"`{name}` is not supported here yet", node.span, SCORES_ONLY)
        return None

    def _aggregate_example(self, name: str, node: syntax.CallExpr) -> str:
        """Return the remedy for a call that lacks its `for`: the same call as an aggregate."""
        text = node.arguments[0].value.span.text if node.arguments else "…"
        if len(node.arguments) == 1 and self._unit(node.arguments[0].value) is not None:
            return f"aggregate the keys of the unit, `{name}({text}.k)`, or the values, `{name}({text}.v)`"
        if self._world == "exact":
            return f"write `{name}(… for i in low .. high)`"
        return f"over the visible keys: `{name}({text} for k)`; over a range: `… for i in low .. high`"

    def _pooled(self, node: syntax.CallExpr, op: str, vectors: syntax.Expr) -> program.Expr | None:
        """Return an aggregate over the vectors of a unit's tokens, such as `mean(b.k)`; None for other arguments."""
        if not isinstance(vectors, syntax.AttributeExpr) or not isinstance(vectors.base, syntax.NameExpr):
            return None
        if isinstance(self._names.get(vectors.base.id), SilentSymbol):
            return self.unknown(node.span)
        unit = self._unit(vectors.base)
        if unit is None or vectors.name.id not in ("q", "k", "v"):
            return None
        tensor: OneOf["q", "k", "v"] = "q" if vectors.name.id == "q" else "k" if vectors.name.id == "k" else "v"
        token = program.Binder(vectors.span, "token")
        vector = program.Vector(vectors.span, tensor, program.Local(vectors.span, token))
        members = (program.UnitVariable(token, unit),)
        return program.Aggregate(node.span, op, vector, members, None, floating=True)

    def _softmax(self, node: syntax.CallExpr) -> program.Expr:
        """Return `softmax(score, extra = …)`, where the score may be left out."""
        positional = [a.value for a in node.arguments if a.name is None]
        extra = [a for a in node.arguments if a.name is not None]
        unknown = next((a for a in extra if a.name is not None and a.name.id != "extra"), None)
        if len(positional) > 1 or len(extra) > 1 or unknown is not None:
            span = unknown.span if unknown is not None else node.arguments[1].span
            help_ = "call it as `softmax(score)` or `softmax(score, extra = …)`"
            self._report.error("A305", "`softmax` takes a score and `extra`", span, help=help_)
            return self.unknown(node.span)
        inner = self._in_world("float")
        if self._resolver.surroundings.recurrent and positional and not extra:
            return self._applied(node.span, "softmax", self._in_world("vector").resolve(positional[0]))
        selecting = self._resolver.surroundings.selecting
        if selecting is not None and positional and not extra:
            return self._softmax_of_candidates(node.span, inner.resolve(positional[0]), selecting.key)
        score = None if not positional or self._is_score(positional[0]) else inner.resolve(positional[0])
        return program.SoftmaxShare(node.span, score, inner.resolve(extra[0].value) if extra else None)

    def _softmax_of_candidates(
        self, span: Span, score: program.Expr, key: program.Binder | OneOf["q", "k"]
    ) -> program.Expr:
        """Return the softmax of a score over the candidates of a `select`."""
        term = self._applied(span, "exp", score)
        total = program.Aggregate(span, "sum", term, (program.VisibleVariable(key),), None, floating=True)
        return self._applied(span, "share", term, total)

    def _is_score(self, node: syntax.Expr) -> bool:
        """Whether an expression is the built-in `score`, not a declared name that hides it."""
        is_named = isinstance(node, syntax.NameExpr) and node.id == "score"
        return is_named and "score" not in self._names and "score" not in self._binders

    def _merge(self, node: syntax.CallExpr) -> program.Expr:
        parts = [self.resolve(argument.value) for argument in node.arguments]
        branches = tuple(p for p in parts if isinstance(p, program.BranchRead) and p.part == "out" and p.at is None)
        if any(isinstance(p, program.Local) and p.binder is UNKNOWN for p in parts):
            return self.unknown(node.span)
        if len(branches) < max(len(parts), 1):
            help_ = "write `merge(near, far)` with names of branches"
            return self.refuse("A204", "`merge` needs branches", node.span, help_, "not all of these are branches")
        return program.MergeCall(node.span, branches)

    def _definition_call(self, node: syntax.CallExpr, source: DefinitionSource) -> program.Expr:
        names = tuple(b.name for b in source.parameters)
        defaults = {n: d for n, d in zip(names, source.defaults, strict=True) if d is not None}
        arguments = bind_arguments(self._report, node, source.name, names, False, defaults, source.span)
        if arguments is None:
            return self.unknown(node.span)
        written = {id(a.value) for a in node.arguments}
        vectors = self._resolver.worlds.vector_parameters(source) if self._world != "exact" else frozenset()
        of_defaults = ExpressionResolver(self._resolver, source.names, {}, self._world)
        resolved = []
        for binder, argument in zip(source.parameters, arguments, strict=True):
            inner = self if id(argument) in written else of_defaults
            resolved.append(inner._in_world("vector" if binder.name in vectors else "float").resolve(argument))
        pairs = zip(source.parameters, arguments, strict=True)
        units = tuple((b.name, u) for b, a in pairs if id(a) in written and (u := self._unit(a)) is not None)
        return self._use(node.span, source, tuple(resolved), units if self._resolver.takes_units(source) else ())

    # --- aggregates --------------------------------------------------------------------------------------------------

    def _aggregate(self, node: syntax.AggregateExpr) -> program.Expr:
        function = node.function
        if not isinstance(function, syntax.NameExpr) or function.id not in AGGREGATES:
            if isinstance(function, syntax.NameExpr) and function.id not in self.known_names():
                return self._unknown_name(function, "function", set(AGGREGATES))
            listed = ", ".join(sorted(AGGREGATES))
            help_ = f"the functions with a `for`: {listed}"
            return self.refuse("A204", "this function takes no `for`", function.span, help_)
        inner = ExpressionResolver(self._resolver, self._names, self._binders, self._world, self._units)
        runnings = tuple(inner._domain_of(r) for r in node.each.runnings)
        entries = self._resolver.surroundings.places
        selected = [entries[r.target] for r in runnings if isinstance(r.target, program.Binder) and r.target in entries]
        conditions = [entry.is_selected(node.span) for entry in selected]
        body = inner.resolve(node.body)
        if node.each.condition is not None:
            conditions.append(inner._in_world("float").resolve(node.each.condition))
        condition = conditions[0] if conditions else None
        if len(conditions) > 1:
            condition = program.Operation(node.span, "and", tuple(conditions))
        return program.Aggregate(node.span, function.id, body, runnings, condition, floating=self._world != "exact")

    def _domain_of(self, node: syntax.LoopVariable) -> program.Domain:
        row_variable = self._row_variable(node)
        if row_variable is not None:
            return row_variable
        unit = self._unit(node.domain)
        name = node.name.id
        selected = self._selection(node.domain)
        if selected is not None:
            assert not isinstance(node.domain, syntax.RangeExpr) and node.domain is not None
            self._check_hiding(node.name)
            binder = program.Binder(node.name.span, name)
            self._binders = {**self._binders, name: binder}
            entry = self.iterate_selection(binder, node.domain, selected)
            ends = (self.unknown(node.span),) * 2 if entry is None else (entry.over.low, entry.over.high)
            return program.RangeVariable(binder, *ends)
        low, high = (None, None) if unit else self._domain(node)
        if name in REBINDABLE and name not in self._binders:
            target: program.Binder | str = name
        else:
            self._check_hiding(node.name)
            target = program.Binder(node.name.span, name)
            self._binders = {**self._binders, name: target}
        if unit:
            return program.UnitVariable(target, unit)  # type: ignore[arg-type]
        return program.RangeVariable(target, low, high)  # type: ignore[arg-type]

    def _selection(self, domain: syntax.Expr | syntax.RangeExpr | None) -> SelectionSymbol | None:
        """Return the selection that a domain names; None for other domains."""
        base = domain.base if isinstance(domain, syntax.IndexExpr) else domain
        symbol = (
            self._names.get(base.id) if isinstance(base, syntax.NameExpr) and base.id not in self._binders else None
        )
        return symbol if isinstance(symbol, SelectionSymbol) else None

    def _row_variable(self, node: syntax.LoopVariable) -> program.VisibleVariable | None:
        """Return the variable over the visible keys, for a name of keys without a domain; None for other variables."""
        name = node.name.id
        if node.domain is not None or self._world == "exact" or name in self._binders:
            return None
        symbol = self._names.get(name)
        if isinstance(symbol, UnitSymbol | RangeSymbol) and symbol.is_key:
            return program.VisibleVariable(symbol.binder)
        return program.VisibleVariable("k") if name == "k" and symbol is None else None

    def _check_hiding(self, name: syntax.NameExpr) -> None:
        hidden: Span | None = None
        if name.id in self._binders:
            hidden = self._binders[name.id].span
        elif name.id in self._names:
            hidden = self._names[name.id].span
        elif name.id not in RESERVED_NAMES | FUNCTIONS:
            return
        also = (Label(hidden, "the name it hides"),) if hidden else ()
        help_ = "choose another name; a `for` may rebind only `q`, `k` and `head`"
        self._report.error("A211", f"`{name.id}` hides a name", name.span, "already taken", also=also, help=help_)

    def _domain(self, node: syntax.LoopVariable) -> tuple[program.Expr, program.Expr]:
        span = node.name.span
        match node.domain:
            case None:
                return self._whole_range(node.name)
            case syntax.RangeExpr(low=low, high=high):
                return self._in_world("float").resolve(low), self._in_world("float").resolve(high)
            case syntax.NameExpr(id="group") if "group" not in self._names and "group" not in self._binders:
                head, size = program.HeadIndexRead(span, "kv_head"), program.Size(span, "group")
                low_ = program.Operation(span, "mul", (head, size))
                return low_, program.Operation(span, "add", (low_, size))
            case domain:
                return program.Literal(span, 0), self._in_world("float").resolve(domain)

    def _whole_range(self, name: syntax.NameExpr) -> tuple[program.Expr, program.Expr]:
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


def _items(span: Span, table: program.Expr, indices: Sequence[program.Expr]) -> program.Expr:
    for index in indices:
        table = program.Item(span, table, index)
    return table


def _is_sum(node: program.Expr) -> bool:
    """Whether an expression is a floating-point `sum(… for …)`; 0 divided by an empty sum is 0."""
    while isinstance(node, program.DefinitionUse):
        node = node.definition.body
    return isinstance(node, program.Aggregate) and node.op == "sum" and node.floating
