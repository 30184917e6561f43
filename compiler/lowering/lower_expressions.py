"""Lowering of exact expressions. A definition's q, k and head are those of the place where the definition is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.ir.rewrite import substitute, variables
from attnc.compiler.lowering import rational as exact
from attnc.compiler.lowering.lower_units import Loop, Token, UnitMembers
from attnc.compiler.lowering.lowered_operations import (
    Lowered,
    applied,
    as_index,
    as_indices,
    as_number,
    as_value,
    constant,
    counted,
    element,
    entry,
    floating,
    in_binary64,
    is_binary64,
    is_decay,
    is_floating,
    loop_total,
    nest,
    number_of,
    rounded_to_int,
    selected,
    unsupported,
)
from attnc.compiler.lowering.rational import Number, Rational
from attnc.spec import program as checked
from attnc.spec.source import Span


@dataclass(frozen=True)
class LoweringScope:
    """The values of positions, the head and bound names at a point of the program."""

    q: Index = field(default_factory=lambda: fold.place("q"))
    k: Index = field(default_factory=lambda: fold.place("k"))
    head: Index = field(default_factory=lambda: fold.head_index("head"))
    names: tuple[tuple[checked.Binder, Lowered], ...] = ()
    coordinates: tuple[tuple[str, tuple[Index, ...]], ...] = ()
    """The coordinates of q or k, where they are known directly and need no division of the position."""

    def bind(self, binder: checked.Binder, value: Lowered) -> LoweringScope:
        """The scope inside which `binder` stands for `value`."""
        return replace(self, names=(*((b, v) for b, v in self.names if b is not binder), (binder, value)))

    def at(
        self, place: checked.PlaceName, position: Index, coordinates: tuple[Index, ...] | None = None
    ) -> LoweringScope:
        """The scope in which the query or key is at a position, with its coordinates if they are known directly."""
        others = tuple(item for item in self.coordinates if item[0] != place)
        known = others if coordinates is None else (*others, (place, coordinates))
        if place == "q":
            return replace(self, q=position, coordinates=known)
        return replace(self, k=position, coordinates=known)

    def position(self, place: checked.PlaceName) -> Index:
        """Return the position of the query or key."""
        return self.q if place == "q" else self.k

    def lookup(self, binder: checked.Binder) -> Lowered:
        """Return the value of a bound name."""
        return next(v for b, v in reversed(self.names) if b is binder)


@dataclass
class Lowering:
    """A run of the lowering, which also collects origins of nodes. `left_open`: parameters that become sizes."""

    parameters: Mapping[str, checked.Value]
    per_head: frozenset[str]
    left_open: frozenset[str] = frozenset()
    lengths: Mapping[str, int] = field(default_factory=dict)
    """The sizes of dimensions that lists of parameters define, by name."""
    tensors: dict[checked.Input, ir.Tensor] = field(default_factory=dict)
    made: dict[str, ir.Tensor] = field(default_factory=dict)
    """The tensors that a call derives from its inputs, by name."""
    segments: dict[checked.TokenSegment, ir.Segment] = field(default_factory=dict)
    units: dict[checked.Unit, UnitMembers] = field(default_factory=dict)
    states: dict[checked.StateClause, ir.Value] = field(default_factory=dict)
    """Each state's current version, at the line that is being lowered."""
    origins: dict[Index, Span] = field(default_factory=dict)
    steps: int | None = None
    """The number of steps of every `solve`, None for exact solves."""
    _memo: dict[tuple[object, ...], Lowered] = field(default_factory=dict)
    _serial: int = 0

    # --- by expected form ---

    def truth(self, expr: checked.Expr, scope: LoweringScope) -> Index:
        """Lower a condition."""
        return as_index(self.lower(expr, scope))

    def value(self, expr: checked.Expr, scope: LoweringScope) -> ir.Value:
        """Lower a floating-point number or vector."""
        return as_value(self.lower(expr, scope))

    def number(self, expr: checked.Expr, scope: LoweringScope) -> Number:
        """Lower an integer or rational."""
        return as_number(self.lower(expr, scope))

    def integer(self, expr: checked.Expr, scope: LoweringScope) -> Index:
        """Lower an integer; a rational that the checker accepts as an integer is rounded down."""
        return exact.floor(self.number(expr, scope))

    # --- by node ---

    def lower(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:
        """Lower any expression, and record its source position as the origin of the node."""
        value = self._lower(expr, scope)
        for node in (value.num, value.den) if isinstance(value, Rational) else (value,):
            if isinstance(node, ir.Node):
                self.origins.setdefault(cast("Index", node), expr.span)
        return value

    def _lower(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:  # noqa: C901  one case a node kind
        match expr:
            case checked.Literal():
                return constant(expr.value)
            case checked.Local():
                return scope.lookup(expr.binder)
            case checked.ParameterRead():
                return self._parameter(expr, scope)
            case checked.PositionRead():
                return scope.position(expr.place)
            case checked.HeadIndexRead():
                return _head(expr.name, scope)
            case checked.Size(name=name):
                return fold.const(self.lengths[name]) if name in self.lengths else fold.extent(name)
            case checked.Coordinate():
                return self._coordinate(expr, scope)
            case checked.InSegment():
                return self._in_segment(expr, scope)
            case checked.InputRead():
                return self._input(expr, scope)
            case checked.DefinitionUse():
                return self._definition(expr, scope)
            case checked.Operation():
                return self._operation(expr, scope)
            case checked.ConditionalValue():
                return self._choice(expr, scope)
            case checked.Aggregate():
                return self._aggregate(expr, scope)
            case checked.ListValue():
                return tuple(self.lower(item, scope) for item in expr.items)
            case checked.Item():
                return self._item(expr, scope)
            case checked.ScaleRead():
                return value_nodes.scale()
            case checked.StateRead(state=state):
                return self.states[state]
            case _:
                return self.lower_attention_read(expr, scope)

    def lower_attention_read(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:
        """Lower an expression that only the clauses of an attention may hold."""
        raise AssertionError(f"{type(expr).__name__} in a relation")

    def lower_row_aggregate(self, expr: checked.Aggregate, scope: LoweringScope) -> Lowered:
        """Lower an aggregate over the keys of a row."""
        raise AssertionError("an aggregate over the keys of a row in a relation")

    def context(self) -> object:
        """Return what a definition's value depends on besides the scope."""
        return None

    def _parameter(self, expr: checked.ParameterRead, scope: LoweringScope) -> Lowered:
        if expr.name in self.left_open:
            return fold.extent(expr.name)
        value = self.parameters[expr.name]
        if expr.name in self.per_head:
            assert isinstance(value, tuple)
            return entry(value, scope.head)
        return constant(value)

    def _coordinate(self, expr: checked.Coordinate, scope: LoweringScope) -> Index:
        coordinates = dict(scope.coordinates).get(expr.place)
        if coordinates is not None:
            return coordinates[expr.axis]
        segment = self.segments[expr.segment]
        stride = fold.product(tuple(extent for _, extent in segment.axes[expr.axis + 1 :]))
        name, extent = segment.axes[expr.axis]
        position = scope.position(expr.place)
        return fold.coord(position, segment.offset, stride, extent if expr.axis else None, name)

    def _in_segment(self, expr: checked.InSegment, scope: LoweringScope) -> Index:
        segment = self.segments[expr.segment]
        if len(self.segments) == 1:
            return fold.truth(True)
        place = fold.sub(scope.position(expr.place), segment.offset)
        return fold.conjunction(fold.nonnegative(place), fold.less(place, segment.length))

    def _input(self, expr: checked.InputRead, scope: LoweringScope) -> Index | ir.Value:
        tensor = self._tensor(expr.input)
        written = iter(expr.indices)
        indices = []
        for dim in tensor.dims:
            if isinstance(dim, str) and dim in ("batch", "head", "kv_head"):
                indices.append(_head(dim, scope))
                continue
            index = next(written, None)
            if index is None:  # a vector over the remaining dimensions
                break
            indices.append(self.integer(index, scope))
        if tensor.is_floating:
            return value_nodes.element(tensor, tuple(indices))
        return fold.lookup(tensor, tuple(indices))

    def _tensor(self, item: checked.Input) -> ir.Tensor:
        """The tensor of an input, or the tensor of its ranks."""
        if item.ranks_of is None:
            return self.tensors[item]
        self.check_sorts(item.name, item.span)
        source = self.tensors[item.ranks_of]
        return self.derive_tensor(item.name, source.dims, ir.Made(source.name, "ranks"))

    def check_sorts(self, what: str, span: Span) -> None:
        """Raise SpecError where tokens may not be sorted."""

    def derive_tensor(self, name: str, dims: tuple[str | int, ...], how: ir.Made) -> ir.Tensor:
        """Declare an integer tensor that a call derives from an input, as `how` says."""
        self.made[name] = ir.intern(ir.Tensor(name, "int", dims, made=how))
        return self.made[name]

    def _definition(self, expr: checked.DefinitionUse, scope: LoweringScope) -> Lowered:
        definition = expr.definition
        inner = scope
        for binder, argument in zip(definition.parameters, expr.arguments, strict=True):
            inner = inner.bind(binder, self.lower(argument, scope))
        key = (definition, inner, self.context())
        if key not in self._memo:
            self._memo[key] = self.lower(definition.body, inner)
        return self._memo[key]

    def _choice(self, expr: checked.ConditionalValue, scope: LoweringScope) -> Lowered:
        condition = self.truth(expr.condition, scope)
        if isinstance(condition, ir.Truth):
            return self.lower(expr.then if condition.value else expr.otherwise, scope)
        return selected(condition, self.lower(expr.then, scope), self.lower(expr.otherwise, scope))

    def _item(self, expr: checked.Item, scope: LoweringScope) -> Lowered:
        table = self.lower(expr.table, scope)
        index = self.integer(expr.index, scope)
        if value_nodes.is_value(table):
            return value_nodes.pick(table, index)
        assert isinstance(table, tuple)
        return element(table, index, expr.span)

    # --- operations ---

    def _operation(self, expr: checked.Operation, scope: LoweringScope) -> Lowered:
        if expr.op in ("and", "or", "not"):
            return self._logic(expr, scope)
        operands = tuple(self.lower(operand, scope) for operand in expr.operands)
        if expr.op in ("floor", "ceil") and value_nodes.is_value(operands[0]):
            return rounded_to_int(expr.op, operands[0], expr.span)
        if expr.op == "eye":
            return value_nodes.eye(as_index(operands[0]))
        if expr.op == "solve":
            return value_nodes.solve(as_value(operands[0]), as_value(operands[1]), self.steps)
        if expr.op == "part":
            number, part_count = (number_of(as_index(operand)) for operand in operands[1:])
            return value_nodes.part(as_value(operands[0]), number, part_count)
        if is_floating(expr.op, operands) or (expr.floating and is_decay(expr.op, operands)):
            return floating(expr.op, tuple(map(as_value, operands)))
        if is_binary64(expr.op, operands):
            return in_binary64(expr.op, operands, expr.span)
        return applied(expr.op, tuple(as_number(operand) for operand in operands), expr.span)

    def _logic(self, expr: checked.Operation, scope: LoweringScope) -> Index:
        if expr.op == "not":
            return fold.negation(self.truth(expr.operands[0], scope))
        stop = expr.op == "or"
        nodes = []
        for operand in expr.operands:
            node = self.truth(operand, scope)
            nodes.append(node)
            if isinstance(node, ir.Truth) and node.value == stop:
                break
        return fold.disjunction(*nodes) if stop else fold.conjunction(*nodes)

    # --- aggregates ---

    def _aggregate(self, expr: checked.Aggregate, scope: LoweringScope) -> Lowered:
        if isinstance(expr.runnings[0], checked.VisibleVariable):
            return self.lower_row_aggregate(expr, scope)
        closed = self._stretch_aggregate(expr, scope)
        if closed is not None:
            return closed
        loops: list[Loop] = []
        conditions = []
        for running in expr.runnings:
            token = self._token(running, scope)
            loops.extend(token.loops)
            conditions.append(token.condition)
            scope = _rebind(scope, running.target, token)
        if expr.condition is not None:
            conditions.append(self.truth(expr.condition, scope))
        body = self.lower(expr.body, scope)
        if value_nodes.is_value(body) or isinstance(body, float):
            return loop_total(expr.op, as_value(body), fold.conjunction(*conditions), loops)
        return self._reduced(expr, body, fold.conjunction(*conditions), loops)

    def _stretch_aggregate(self, expr: checked.Aggregate, scope: LoweringScope) -> Index | None:
        """The size, first or last token of a unit that is a stretch, without a loop; None for other aggregates."""
        running = expr.runnings[0]
        if len(expr.runnings) > 1 or expr.condition is not None or not isinstance(running, checked.UnitVariable):
            return None
        is_place = isinstance(expr.body, checked.PositionRead) and expr.body.place == running.target
        is_one = isinstance(expr.body, checked.Literal) and expr.body.value == 1
        token = self._token(running, scope)
        if len(token.loops) > 1 or not ((is_place and expr.op in ("min", "max")) or (is_one and expr.op == "sum")):
            return None
        variable, low, high = token.loops[0]
        if is_one:
            return fold.sub(high, low)
        end = low if expr.op == "min" else fold.add(high, fold.const(-1))
        return substitute(token.position, {variable: end})

    def _token(self, running: checked.Domain, scope: LoweringScope) -> Token:
        """Return the token that a loop variable stands for, with its range."""
        assert not isinstance(running, checked.VisibleVariable)
        name = running.target if isinstance(running.target, str) else running.target.name
        if isinstance(running, checked.UnitVariable):
            numbers = as_indices(scope.lookup(running.unit.binder))
            return self.units[running.unit].token(numbers, lambda: self.variable(name))
        variable = self.variable(name)
        low, high = self.integer(running.low, scope), self.integer(running.high, scope)
        return Token(((variable, low, high),), variable, fold.truth(True), None)

    def variable(self, name: str) -> ir.Var:
        """Return a new variable; its serial is negative, below the serials of finished aggregates."""
        self._serial -= 1
        return fold.var(name, self._serial)

    def _reduced(self, expr: checked.Aggregate, body: Lowered, condition: Index, loops: list[Loop]) -> Lowered:
        match expr.op:
            case "any" | "all":
                return nest(expr.op, as_index(body), condition, loops)
            case "count":
                return nest("sum", fold.choice(as_index(body), fold.const(1), fold.const(0)), condition, loops)
            case "mean":
                total = self._summed("sum", expr.span, counted(body), condition, loops)
                number = nest("sum", fold.const(1), condition, loops)
                empty = fold.zero(number)
                return exact.choice(empty, fold.const(0), exact.div(total, fold.maximum(number, fold.const(1))))
            case _:
                return self._summed(expr.op, expr.span, body, condition, loops)

    def _summed(self, op: str, span: Span, body: Lowered, condition: Index, loops: list[Loop]) -> Number:
        assert op in ("sum", "min", "max")
        body = as_number(body)
        reduce_op = "sum" if op == "sum" else "min" if op == "min" else "max"
        denominator = exact.den(body)
        if variables(denominator) & {variable for variable, _, _ in loops}:
            unsupported(span, f"`{op}` of fractions whose denominators change with its variable")
        total = nest(reduce_op, exact.num(body), condition, loops)
        return total if isinstance(denominator, ir.Const) and denominator.value == 1 else exact.div(total, denominator)


def _rebind(scope: LoweringScope, target: checked.Binder | str, token: Token) -> LoweringScope:
    match target:
        case "q" | "k":
            return scope.at(target, token.position, token.coordinates)
        case "head":
            return replace(scope, head=token.position)
        case checked.Binder():
            return scope.bind(target, token.position)
        case _:
            raise AssertionError(target)


def _head(name: str, scope: LoweringScope) -> Index:
    if name == "kv_head":
        return fold.floordiv(scope.head, fold.extent("group"))
    return scope.head if name == "head" else fold.head_index("batch")
