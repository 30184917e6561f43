"""Bound the numbers in a relation, to find clauses with one value for every pair, whatever the lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count

from attnc.runtime.verifying.call_cases import takes_more_queries
from attnc.spec import program
from attnc.spec.checks.measure import below
from attnc.spec.errors import EvaluationError
from attnc.spec.exact_operations import COMPARISONS, EXACT_OPERATIONS
from attnc.spec.meaning.denotation import EvaluationFrame, Meanings, constantly
from attnc.spec.meaning.parameter_values import parameters_alone
from attnc.spec.program import BoundProgram, Expr, Value

Number = Fraction | float
"""An exact number, or an infinity."""

JUNCTIONS = ("and", "or", "not")
_WHOLE = frozenset(name for name, item in EXACT_OPERATIONS.items() if item.gives == "int")
_WHOLE_OF_WHOLE = ("mod", "abs", "min", "max", "mul", "clamp")
_PLAIN = (
    *(program.Literal, program.ParameterRead, program.Operation, program.ConditionalValue, program.Aggregate),
    *(program.Local, program.ListValue, program.Item, program.DefinitionUse),
)
_BELOW = {"k": "keys", "head": "heads", "kv_head": "kv_heads"}
"""For each index, the size that the index is less than."""


_NUMBERS = count()


@dataclass(frozen=True, slots=True)
class BoundScope:
    """The arguments of the definitions around an expression."""

    arguments: Mapping[program.Binder, tuple[Expr, BoundScope]] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def calling(self, arguments: Mapping[program.Binder, Expr]) -> BoundScope:
        """Return the scope of the body of a definition that is called with these arguments."""
        return BoundScope({**self.arguments, **{binder: (node, self) for binder, node in arguments.items()}})


@dataclass(frozen=True, slots=True)
class LinearBound:
    """A constant plus multiples of atoms: indices, sizes, and opaque expressions with bounds."""

    constant: Fraction
    terms: Mapping[object, Fraction] = field(default_factory=dict)

    def plus(self, other: LinearBound, times: Fraction) -> LinearBound:
        """Return the sum with `times` the other form."""
        terms = dict(self.terms)
        for atom, factor in other.terms.items():
            terms[atom] = terms.get(atom, Fraction(0)) + factor * times
        return LinearBound(self.constant + other.constant * times, {a: f for a, f in terms.items() if f})


class Bounds:
    """Bounds of the expressions of a bound program."""

    def __init__(self, bound: BoundProgram, *, more_queries: bool = True) -> None:
        """`more_queries`: calls may have more queries than keys, if the pattern accepts such calls."""
        self._bound = bound
        uneven = more_queries and takes_more_queries(bound)
        self._below = {"q": "queries" if uneven else "keys", **_BELOW}
        """The size that each index is less than; `q` counts rows where a call may have more queries than keys."""
        self._from_end = uneven and bound.program.align == "end"
        self._ranges: dict[object, tuple[Number, Number]] = {}
        self._whole: set[object] = set()
        self._scopes: dict[tuple[program.DefinitionUse, int], BoundScope] = {}
        self._forms: dict[tuple[Expr, int], LinearBound] = {}
        self._meanings = Meanings(bound.program, bound.values)
        self._units = {unit.binder: unit.value for unit in _units(bound.program)}
        self._numbered = {item.binder: item for item in _ranges(bound.program)}
        lists = {p.name: bound.values[p.name] for p in bound.program.parameters if p.per_head}
        self._per_head = {name for name, x in lists.items() if isinstance(x, tuple) and len(set(x)) > 1}

    def truth(self, node: Expr, scope: BoundScope) -> bool | None:
        """Return the value of a condition if it is the same for every pair, else None."""
        match node:
            case program.Literal(value=bool() as value):
                return value
            case program.Operation(op="not", operands=(part,)):
                truth_of_part = self.truth(part, scope)
                return None if truth_of_part is None else not truth_of_part
            case program.Operation(op="and" | "or" as op, operands=parts):
                stop = op == "or"
                values = [self.truth(part, scope) for part in parts]
                return stop if stop in values else None if None in values else not stop
            case program.Operation(op=op, operands=(a, b)) if op in COMPARISONS:
                return self._comparison_truth(op, a, b, scope)
            case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
                truth_of_part = self.truth(condition, scope)
                sides = {self.truth(part, scope) for part in ((then,) if truth_of_part else (otherwise,))}
                if truth_of_part is None:
                    sides = {self.truth(then, scope), self.truth(otherwise, scope)}
                return sides.pop() if len(sides) == 1 else None
            case program.DefinitionUse(definition=definition):
                return self.truth(definition.body, self.inside(node, scope))
            case program.Local(binder=binder) if binder in scope.arguments:
                return self.truth(*scope.arguments[binder])
            case _:
                constant = self._constant(node, scope)
                return constant if isinstance(constant, bool) else None

    def reason(self, node: Expr, scope: BoundScope) -> str:
        """Return why a condition has one value for every pair; empty where it may have both values."""
        value = self.truth(node, scope)
        if value is None:
            return ""
        word = "true" if value else "false"
        if self.is_constant(node, scope):
            return f"always {word}: the parameters alone decide"
        return f"always {word}: the ranges of indices and sizes decide"

    def is_constant(self, node: Expr, scope: BoundScope) -> bool:
        """Whether the parameters alone determine a condition."""
        match node:
            case program.Operation(op=op, operands=(a, b)) if op in COMPARISONS:
                return not (self._linear(a, scope).terms or self._linear(b, scope).terms)
            case program.Operation(op="and" | "or" | "not", operands=parts):
                return all(self.is_constant(part, scope) for part in parts)
            case program.DefinitionUse(definition=definition):
                inner = self.inside(node, scope)
                return self.is_constant(definition.body, inner)
            case program.Local(binder=binder) if binder in scope.arguments:
                return self.is_constant(*scope.arguments[binder])
            case _:
                return isinstance(node, program.Literal) or self._constant(node, scope) is not None

    def inside(self, node: program.DefinitionUse, scope: BoundScope) -> BoundScope:
        """Return the scope of a definition's body; each use has one scope, so that equal numbers share a name."""
        parameters = node.definition.parameters
        if not parameters:
            return scope
        if (node, scope.number) not in self._scopes:
            self._scopes[node, scope.number] = scope.calling(dict(zip(parameters, node.arguments, strict=True)))
        return self._scopes[node, scope.number]

    def integer(self, node: Expr) -> int | None:
        """Return the value of an integer expression of parameters, None for any other expression."""
        value = self._constant(node, BoundScope())
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _comparison_truth(self, op: str, a: Expr, b: Expr, scope: BoundScope) -> bool | None:
        low, high = self._range_of(self._linear(a, scope).plus(self._linear(b, scope), Fraction(-1)))
        match op:
            case "lt":
                return True if high < 0 else False if low >= 0 else None
            case "le":
                return True if high <= 0 else False if low > 0 else None
            case "gt":
                return True if low > 0 else False if high <= 0 else None
            case "ge":
                return True if low >= 0 else False if high < 0 else None
        if low > 0 or high < 0:
            return op == "ne"
        return op == "eq" if low == high == 0 else None

    # --- ranges ------------------------------------------------------------------------------------------------------

    def _range_of(self, form: LinearBound) -> tuple[Number, Number]:
        return -self._upper_bound(LinearBound(Fraction(0)).plus(form, Fraction(-1))), self._upper_bound(form)

    def _upper_bound(self, form: LinearBound) -> Number:
        """Return an upper bound of a form, given that each index is less than its size."""
        terms, total = dict(form.terms), form.constant
        for index, size in self._below.items():
            amount = min(terms.get(index, Fraction(0)), -terms.get(size, Fraction(0)))
            if amount > 0:
                terms[index] -= amount
                terms[size] += amount
                total -= amount
        result: Number = total
        for atom, factor in terms.items():
            if factor:
                low, high = self._ranges[atom]
                result = result + float(factor) * high if factor > 0 else result + float(factor) * low
        return result

    def _range(self, node: Expr, scope: BoundScope) -> tuple[Number, Number]:
        return self._range_of(self._linear(node, scope))

    def _atom(self, name: object, low: Number, high: Number = math.inf, *, whole: bool = True) -> LinearBound:
        self._ranges[name] = (low, high)
        if whole:
            self._whole.add(name)
        return LinearBound(Fraction(0), {name: Fraction(1)})

    def _opaque(
        self, node: Expr, scope: BoundScope, low: Number = -math.inf, high: Number = math.inf, *, whole: bool = False
    ) -> LinearBound:
        return self._atom((node, scope.number), low, high, whole=whole)

    def _is_whole(self, form: LinearBound) -> bool:
        """Whether a form takes only whole values."""
        factors = (form.constant, *form.terms.values())
        return all(f.denominator == 1 for f in factors) and form.terms.keys() <= self._whole

    # --- linear forms ------------------------------------------------------------------------------------------------

    def _linear(self, node: Expr, scope: BoundScope) -> LinearBound:
        key = (node, scope.number)
        if key not in self._forms:
            self._forms[key] = self._form(node, scope)
        return self._forms[key]

    def _form(self, node: Expr, scope: BoundScope) -> LinearBound:  # noqa: C901  one case a kind
        match node:
            case program.PositionRead(place=place):
                padded = place == "k" and self._bound.program.pads
                return self._opaque(node, scope) if padded else self._position(place)
            case program.HeadIndexRead(name=name):
                return self._atom(name, Fraction(0))
            case program.Size(name=name) if name not in self._bound.lengths:
                return self._atom(name, Fraction(1))
            case program.Coordinate(segment=segment, axis=axis):
                return self._coordinate(node, segment.axes[axis], scope)
            case program.Local(binder=binder) if binder in scope.arguments:
                return self._linear(*scope.arguments[binder])
            case program.Local(binder=binder) if binder in self._units:
                return self._atom(binder, *self._range(self._units[binder], BoundScope()))
            case program.Local(binder=binder) if binder in self._numbered:
                item = self._numbered[binder]
                (low, _), (_, high) = (self._range(end, BoundScope()) for end in (item.low, item.high))
                return self._atom(binder, low, high - 1)
            case program.DefinitionUse(definition=definition):
                return self._linear(definition.body, self.inside(node, scope))
            case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
                truth = self.truth(condition, scope)
                if truth is not None:
                    return self._linear(then if truth else otherwise, scope)
                (a, b), (c, d) = self._range(then, scope), self._range(otherwise, scope)
                return self._opaque(node, scope, min(a, c), max(b, d))
            case program.Operation():
                return self._operation(node, scope)
            case program.Aggregate(op="count"):
                return self._opaque(node, scope, Fraction(0))
            case _:
                value = self._constant(node, scope)
                if isinstance(value, int | Fraction) and not isinstance(value, bool):
                    return LinearBound(Fraction(value))
                return self._opaque(node, scope)

    def _position(self, place: str) -> LinearBound:
        index = self._atom(place, Fraction(0))
        if place != "q" or not self._from_end:
            return index
        first = self._atom("keys", Fraction(1)).plus(self._atom("queries", Fraction(1)), Fraction(-1))
        return index.plus(first, Fraction(1))

    def _coordinate(self, node: program.Coordinate, axis: program.SegmentAxis, scope: BoundScope) -> LinearBound:
        if self._bound.program.pads:
            return self._opaque(node, scope)
        extent = None if isinstance(axis.extent, program.Size) else self._constant(axis.extent, scope)
        high: Number = Fraction(extent - 1) if isinstance(extent, int) else math.inf
        return self._atom((node.place, axis), Fraction(0), high)

    def _operation(self, node: program.Operation, scope: BoundScope) -> LinearBound:
        forms = [self._linear(operand, scope) for operand in node.operands]
        one = Fraction(1)
        match node.op:
            case "add":
                return forms[0].plus(forms[1], one)
            case "sub":
                return forms[0].plus(forms[1], -one)
            case "neg":
                return LinearBound(Fraction(0)).plus(forms[0], -one)
            case "mul" if not forms[0].terms:
                return LinearBound(Fraction(0)).plus(forms[1], forms[0].constant)
            case "mul" if not forms[1].terms:
                return LinearBound(Fraction(0)).plus(forms[0], forms[1].constant)
        constant = self._constant(node, scope)
        if isinstance(constant, int | Fraction) and not isinstance(constant, bool):
            return LinearBound(Fraction(constant))
        whole = node.op in _WHOLE or (node.op in _WHOLE_OF_WHOLE and all(map(self._is_whole, forms)))
        return self._opaque(node, scope, *self._result_range(node.op, forms), whole=whole)

    def _result_range(self, op: str, forms: list[LinearBound]) -> tuple[Number, Number]:
        ranges = [self._range_of(form) for form in forms]
        low, high = ranges[0] if ranges else (-math.inf, math.inf)
        divisor = forms[1].constant if len(forms) == 2 and not forms[1].terms else None
        match op:
            case "abs":
                if low > 0 or high < 0:
                    return (low, high) if low > 0 else (-high, -low)
                return Fraction(0), max(high, -low)
            case "min":
                return min(a for a, _ in ranges), min(b for _, b in ranges)
            case "max":
                return max(a for a, _ in ranges), max(b for _, b in ranges)
            case "mod" if divisor is not None and divisor > 0:
                upper = divisor - 1 if divisor.denominator == 1 and self._is_whole(forms[0]) else divisor
                return Fraction(0), upper
            case "floordiv" if divisor is not None and divisor > 0:
                return _floored(low, divisor), _floored(high, divisor)
            case "floordiv" if ranges[1][0] >= 1 and low >= 0:
                return Fraction(0), high
            case "clamp":
                return ranges[1][0], ranges[2][1]
        operation = EXACT_OPERATIONS.get(op)
        return (-math.inf if operation is None or not operation.is_natural else Fraction(0)), math.inf

    def _constant(self, node: Expr, scope: BoundScope) -> Value | None:
        """Return the value of an expression of parameters only, None for any other expression."""
        arguments: dict[program.Binder, Value] = {}
        for part in below([node]):
            if not self._is_plain(part):
                return None
            if isinstance(part, program.Local) and part.binder in scope.arguments:
                value = self._constant(*scope.arguments[part.binder])
                if value is None:
                    return None
                arguments[part.binder] = value
        frame = EvaluationFrame(parameters_alone(self._bound.lengths), {}, 0, 0)
        for binder, value in arguments.items():
            frame = frame.binding(binder, constantly(value))
        try:
            result = self._meanings.of(node)(frame)
        except (EvaluationError, KeyError):  # KeyError: a name that is bound outside the expression
            return None
        return result if isinstance(result, int | Fraction | bool | tuple) else None

    def _is_plain(self, node: Expr) -> bool:
        """Whether a node, its children aside, reads parameters only."""
        match node:
            case program.Size(name=name):
                return name in self._bound.lengths
            case program.ParameterRead(name=name):
                return name not in self._per_head
            case program.Aggregate(runnings=runnings):
                return all(
                    isinstance(r, program.RangeVariable) and isinstance(r.target, program.Binder) for r in runnings
                )
            case _:
                return isinstance(node, _PLAIN)


def _units(pattern: program.Program) -> Iterator[program.Unit]:
    """Yield the units of tokens that expressions can name."""
    for attend in (*pattern.attends, *(item.row for item in pattern.selections)):
        yield from attend.units
    if pattern.round is not None:
        yield from (pattern.round.q, pattern.round.k)


def _ranges(pattern: program.Program) -> Iterator[program.KeyRange]:
    """Yield the ranges whose numbers expressions can name: of keys that are not tokens, and of branches."""
    for attend in (*pattern.attends, *(item.row for item in pattern.selections)):
        for item in (attend.over, attend.stack, attend.family):
            if isinstance(item, program.KeyRange) and not item.parts:
                yield item


def is_condition(node: Expr) -> bool:
    """Whether an expression is a condition by its form."""
    if isinstance(node, program.SelectedTest | program.InUnit | program.InSegment):
        return True
    return isinstance(node, program.Operation) and node.op in (*JUNCTIONS, *COMPARISONS)


def _floored(value: Number, divisor: Fraction) -> Number:
    return value if isinstance(value, float) and math.isinf(value) else Fraction(math.floor(value / divisor))
