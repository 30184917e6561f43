"""Translate expressions to Python functions of an `EvaluationFrame`, which define what the expressions mean.

Arguments of definitions are evaluated lazily, in the frame of the use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Protocol, cast

from typing_extensions import assert_never

from attnc.spec import program
from attnc.spec.checks.measure import Measures
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, Number, checked
from attnc.spec.meaning.float_arithmetic import Vector
from attnc.spec.program import Value
from attnc.spec.source import Span

_TEST_FIRST = "test for that case first: `… if condition else …`"
MAX_STEPS = 1_000_000
"""Maximum number of steps of aggregates and definitions for one value; reaching it takes some seconds."""

BEYOND = -(1 << 40)
"""The position that stands for padded keys, whose vectors are zeros."""


class EvaluationContext(Protocol):
    """The data that a frame reads: one call, one document of a call, or only the parameters."""

    def size(self, name: str, span: Span) -> int:
        """Return the value of a size."""

    def coordinate(self, position: int, node: program.Coordinate) -> int:
        """Return a coordinate of a position."""

    def in_segment(self, position: int, segment: program.TokenSegment) -> bool:
        """Whether a position lies in a segment."""

    def element(
        self, node: program.InputRead, indices: list[int], head: int, batch: int
    ) -> int | bool | float | Vector:
        """Return an element of an input, or a vector of it."""

    def vector(self, node: program.Vector, position: int, head: int, batch: int) -> Vector:
        """Return the vector of q, k or v at a position."""

    def branch(self, node: program.BranchRead, member: int | None, position: int, frame: EvaluationFrame) -> Result:
        """Return a branch's result at a position, or its weight at a frame's query and key."""

    def merged(self, node: program.MergeCall, members: Sequence[int | None], frame: EvaluationFrame) -> Result:
        """Return the output of one softmax over the keys of several branches, for a frame's query."""

    def scale(self, node: program.ScaleRead) -> float:
        """Return the factor of the scores."""

    def members(self, unit: program.Unit, frame: EvaluationFrame) -> Sequence[int]:
        """Return the positions in the unit that is bound in a frame."""

    def tokens(self, unit: program.Unit, frame: EvaluationFrame) -> Sequence[int]:
        """Return a unit's members as positions of tokens, `BEYOND` for padded keys."""

    def in_unit(self, node: program.InUnit, position: int, frame: EvaluationFrame) -> bool:
        """Whether the token at a position is in the unit that is bound in a frame."""

    def chosen(self, node: program.SelectedTest, member: int | None, item: int | None, frame: EvaluationFrame) -> bool:
        """Whether the row of a frame selected a token, the current unit, or an index of a range."""

    def chosen_size(self, node: program.SelectedCount, member: int | None, frame: EvaluationFrame) -> int:
        """Return the number of entries that the row of a frame selected."""

    def tick(self, span: Span) -> None:
        """Count one step of work."""


class RowContext(Protocol):
    """The row that a frame is in: one query of one attention, with its visible keys."""

    def seen(self, frame: EvaluationFrame) -> Iterable[EvaluationFrame]:
        """Yield a frame for each visible key."""

    def score(self, frame: EvaluationFrame, at: int | None) -> Result:
        """Return the score at a frame's key, or at the key `at`."""

    def ranking(self, frame: EvaluationFrame, name: str) -> Result:
        """Return the `rank`, `mass` or `score` of a frame's candidate, in a row of a selection."""


class EvaluationFrame:
    """The positions and bound names of an evaluation, with the definitions computed so far for them (`known`)."""

    __slots__ = ("around", "batch", "bound", "head", "known", "places", "row")

    def __init__(self, around: EvaluationContext, places: dict[str, int], head: int, batch: int) -> None:
        self.around = around
        self.places = places
        self.head = head
        self.batch = batch
        self.bound: Mapping[program.Binder, Meaning] = {}
        self.known: dict[program.Definition, Result] = {}
        self.row: RowContext | None = None

    def binding(self, binder: program.Binder, meaning: Meaning) -> EvaluationFrame:
        """Return a copy of the frame with one more bound name."""
        return self._with({**self.bound, binder: meaning}, self.known)

    def within(self, bound: Mapping[program.Binder, Meaning]) -> EvaluationFrame:
        """Return a copy of the frame with other bound names."""
        return self._with(bound, self.known)

    def at(self, place: str, index: int) -> EvaluationFrame:
        """Return a copy of the frame at another query, key or head."""
        frame = self._with(self.bound, {})
        if place == "head":
            frame.head = index
        else:
            frame.places = {**self.places, place: index}
        return frame

    def _with(
        self, bound: Mapping[program.Binder, Meaning], known: dict[program.Definition, Result]
    ) -> EvaluationFrame:
        frame = EvaluationFrame(self.around, self.places, self.head, self.batch)
        frame.bound, frame.known, frame.row = bound, known, self.row
        return frame

    def forgetting(self) -> EvaluationFrame:
        """Return a copy without cached definitions, because a name that they read has changed."""
        return self._with(self.bound, {})

    def in_row(self, row: RowContext | None) -> EvaluationFrame:
        """Return a copy of the frame inside a row."""
        frame = self._with(self.bound, {})
        frame.row = row
        return frame


Result = Value | float | Vector
Meaning = Callable[[EvaluationFrame], Result]
_Frames = Iterator[EvaluationFrame]
_Values = Iterator[Result]
_Leaf = (
    program.Literal
    | program.Local
    | program.ParameterRead
    | program.PositionRead
    | program.HeadIndexRead
    | program.Size
    | program.Coordinate
    | program.InSegment
    | program.ScaleRead
    | program.Infinity
    | program.RankingRead
)


class Meanings:
    """The meanings of the expressions of one pattern, given values for its parameters."""

    def __init__(self, pattern: program.Program, values: Mapping[str, Value]) -> None:
        self._values = values
        self._per_head = {p.name for p in pattern.parameters if p.per_head}
        self._measures = Measures()
        self._bodies: dict[program.Definition, Meaning] = {}
        self._names: dict[program.Unit, tuple[program.Binder, ...]] = {}
        self._known: dict[program.Expr, Meaning] = {}
        self._approximate = pattern.approximate

    def names_in(self, unit: program.Unit) -> tuple[program.Binder, ...]:
        """Return the names that a unit's value reads, such as the index of a family with a unit per member."""
        if unit not in self._names:
            self._names[unit] = tuple(self._measures.of(unit.value).free)
        return self._names[unit]

    def of(self, node: program.Expr) -> Meaning:
        """Return the meaning of an expression; each expression is translated once."""
        if node not in self._known:
            self._known[node] = self._meaning(node)
        return self._known[node]

    def _meaning(self, node: program.Expr) -> Meaning:  # noqa: C901  one case per kind
        match node:
            case program.InputRead():
                return self._input(node)
            case program.DefinitionUse():
                return self._use(node)
            case program.Operation():
                return self._operation(node)
            case program.ConditionalValue():
                condition, then, otherwise = self.of(node.condition), self.of(node.then), self.of(node.otherwise)
                return lambda frame: then(frame) if condition(frame) else otherwise(frame)
            case program.Aggregate():
                return self._aggregate(node)
            case program.ListValue(items=items):
                entries = [self.of(item) for item in items]
                return lambda frame: cast("Result", tuple(entry(frame) for entry in entries))
            case program.Item():
                return self._item(node)
            case (
                program.Vector()
                | program.ScoreRead()
                | program.SoftmaxShare()
                | program.BranchRead()
                | program.MergeCall()
            ):
                return self._attention_value(node)
            case program.InUnit() | program.SelectedTest() | program.SelectedCount():
                return self._membership(node)
            case program.StateRead():
                raise AssertionError("a state outside a recurrence")
            case _:
                return self._leaf(node)

    def _leaf(self, node: _Leaf) -> Meaning:  # noqa: C901  one case per kind
        match node:
            case program.Literal(value=value):
                return lambda frame: value
            case program.Local(binder=binder):
                return lambda frame: frame.bound[binder](frame)
            case program.ParameterRead():
                return self._parameter(node)
            case program.PositionRead(place=place):
                return lambda frame: frame.places[place]
            case program.HeadIndexRead():
                return _head_index(node)
            case program.Size(name=name, span=span):
                return lambda frame: frame.around.size(name, span)
            case program.Coordinate(place=place):
                return lambda frame: frame.around.coordinate(frame.places[place], node)
            case program.InSegment(place=place, segment=segment):
                return lambda frame: frame.around.in_segment(frame.places[place], segment)
            case program.ScaleRead():
                return lambda frame: frame.around.scale(node)
            case program.Infinity():
                return lambda frame: math.inf
            case program.RankingRead(name=name):
                return lambda frame: _row(frame).ranking(frame, name)
            case _:
                assert_never(node)

    def _membership(self, node: program.InUnit | program.SelectedTest | program.SelectedCount) -> Meaning:
        if isinstance(node, program.InUnit):
            position = self.of(node.at)
            return lambda frame: frame.around.in_unit(node, _integer(position(frame)), frame)
        member = self._index(node.member)
        if isinstance(node, program.SelectedCount):
            return lambda frame: frame.around.chosen_size(node, member(frame), frame)
        item = self._index(node.item if node.number is None else node.number)
        return lambda frame: frame.around.chosen(node, member(frame), item(frame), frame)

    def _index(self, node: program.Expr | None) -> Callable[[EvaluationFrame], int | None]:
        """Return the function that gives an integer; None where no expression is written."""
        if node is None:
            return lambda frame: None
        index = self.of(node)
        return lambda frame: _integer(index(frame))

    def _attention_value(
        self, node: program.Vector | program.ScoreRead | program.SoftmaxShare | program.BranchRead | program.MergeCall
    ) -> Meaning:
        match node:
            case program.Vector():
                return self._vector(node)
            case program.ScoreRead(at=at):
                key = self._index(at)
                return lambda frame: _row(frame).score(frame, key(frame))
            case program.SoftmaxShare():
                return self._share(node)
            case program.BranchRead():
                return self._branch(node)
            case program.MergeCall(parts=parts):
                members = [self._index(p.member) for p in parts]
                return lambda frame: frame.around.merged(node, [member(frame) for member in members], frame)

    def _vector(self, node: program.Vector) -> Meaning:
        at, place = self._index(node.at), "q" if node.tensor == "q" else "k"

        def read(frame: EvaluationFrame) -> Result:
            position = at(frame)
            position = frame.places[place] if position is None else position
            return frame.around.vector(node, position, frame.head, frame.batch)

        return read

    def _branch(self, node: program.BranchRead) -> Meaning:
        member, at = self._index(node.member), self._index(node.at)

        def read(frame: EvaluationFrame) -> Result:
            position = at(frame)
            position = frame.places["q"] if position is None else position
            return frame.around.branch(node, member(frame), position, frame)

        return read

    def _share(self, node: program.SoftmaxShare) -> Meaning:
        score = None if node.score is None else self.of(node.score)
        extra = None if node.extra is None else self.of(node.extra)

        def logit(frame: EvaluationFrame) -> float:
            value = _row(frame).score(frame, None) if score is None else score(frame)
            return float(value)  # type: ignore[arg-type]  # the checker accepts only numbers

        def share(frame: EvaluationFrame) -> Result:
            score_here = logit(frame)
            logits = [logit(inner) for inner in _row(frame).seen(frame)]
            extra_logits = () if extra is None else extra(frame)
            logits += map(float, extra_logits if isinstance(extra_logits, tuple) else (extra_logits,))
            lse = float_arithmetic.logsumexp(logits)
            return (
                0.0
                if lse == -math.inf
                else cast("Result", float_arithmetic.apply("exp", (score_here - lse,), floating=True))
            )

        return share

    # --- leaves ------------------------------------------------------------------------------------------------------

    def _parameter(self, node: program.ParameterRead) -> Meaning:
        value = self._values[node.name]
        if node.name not in self._per_head:
            return lambda frame: value
        return lambda frame: _entry(value, frame.head, node.span)

    def _input(self, node: program.InputRead) -> Meaning:
        indices = [self.of(index) for index in node.indices]

        def read(frame: EvaluationFrame) -> Result:
            at = [_integer(index(frame)) for index in indices]
            return frame.around.element(node, at, frame.head, frame.batch)

        return read

    def _item(self, node: program.Item) -> Meaning:
        table, index = self.of(node.table), self.of(node.index)
        return lambda frame: _entry(table(frame), _integer(index(frame)), node.index.span)

    # --- definitions -------------------------------------------------------------------------------------------------

    def _use(self, node: program.DefinitionUse) -> Meaning:
        definition, body = node.definition, self._body(node.definition)
        if definition.parameters:
            return self._call(node, body)
        if self._measures.of_definition(definition).free:
            return body

        def read(frame: EvaluationFrame) -> Result:
            if definition not in frame.known:
                frame.around.tick(node.span)
                frame.known[definition] = body(frame)
            return frame.known[definition]

        return read

    def _call(self, node: program.DefinitionUse, body: Meaning) -> Meaning:
        parameters = node.definition.parameters
        arguments = [self.of(argument) for argument in node.arguments]

        def call(frame: EvaluationFrame) -> Result:
            frame.around.tick(node.span)
            bound = {p: when_needed(a, frame) for p, a in zip(parameters, arguments, strict=True)}
            return body(frame.within({**frame.bound, **bound}))

        return call

    def _body(self, definition: program.Definition) -> Meaning:
        if definition not in self._bodies:
            self._bodies[definition] = self.of(definition.body)
        return self._bodies[definition]

    # --- operations --------------------------------------------------------------------------------------------------

    def _operation(self, node: program.Operation) -> Meaning:
        operands = [self.of(operand) for operand in node.operands]
        if node.op == "and":
            return lambda frame: _first(operands, frame, False)
        if node.op == "or":
            return lambda frame: _first(operands, frame, True)
        op, span, floating_point = node.op, node.span, node.floating
        if op == "solve" and self._approximate is not None:
            operands.append(self.of(self._approximate))

        def apply(frame: EvaluationFrame) -> Result:
            values = []
            for operand in operands:
                values.append(operand(frame))
            try:
                return cast("Result", float_arithmetic.apply(op, values, floating=floating_point))
            except ArithmeticFault as fault:
                raise EvaluationError("A901", str(fault), span, _TEST_FIRST) from None

        return apply

    # --- aggregates --------------------------------------------------------------------------------------------------

    def _aggregate(self, node: program.Aggregate) -> Meaning:
        ranges = [(r.target, self._domain(r)) for r in node.runnings]
        body = self.of(node.body)
        condition = self.of(node.condition) if node.condition is not None else None
        fold = _FOLDS[node.op]

        def frames(frame: EvaluationFrame, depth: int) -> _Frames:
            if depth == len(ranges):
                if condition is None or condition(frame):
                    yield frame
                return
            target, domain = ranges[depth]
            if domain is None:
                for inner in _row(frame).seen(frame):
                    frame.around.tick(node.span)
                    yield from frames(inner, depth + 1)
                return
            for i in domain(frame):
                frame.around.tick(node.span)
                inner = (
                    frame.binding(target, constantly(i)) if isinstance(target, program.Binder) else frame.at(target, i)
                )
                yield from frames(inner, depth + 1)

        if node.floating and node.op in ("sum", "mean", "max", "min"):
            return lambda frame: _floating_total([body(inner) for inner in frames(frame, 0)], node)
        return lambda frame: fold((body(inner) for inner in frames(frame, 0)), node)

    def _domain(self, variable: program.Domain) -> Callable[[EvaluationFrame], Sequence[int]] | None:
        """Return the function that gives the values of a variable; None for the visible keys of a row."""
        if isinstance(variable, program.VisibleVariable):
            return None
        if isinstance(variable, program.UnitVariable):
            unit = variable.unit
            if isinstance(variable.target, str):
                return lambda frame: frame.around.members(unit, frame)
            return lambda frame: frame.around.tokens(unit, frame)
        low, high = self.of(variable.low), self.of(variable.high)
        return lambda frame: range(_integer(low(frame)), _integer(high(frame)))


def _row(frame: EvaluationFrame) -> RowContext:
    assert frame.row is not None
    return frame.row


def constantly(value: Value) -> Meaning:
    """Return the meaning of a constant."""
    return lambda frame: value


def when_needed(meaning: Meaning, outside: EvaluationFrame) -> Meaning:
    """Return the meaning that evaluates `meaning` in the frame `outside`, at most once and only if needed."""
    memo: list[Result] = []

    def read(frame: EvaluationFrame) -> Result:
        if not memo:
            memo.append(meaning(outside))
        return memo[0]

    return read


def _first(operands: list[Meaning], frame: EvaluationFrame, stop: bool) -> bool:
    for operand in operands:
        if operand(frame) is stop:
            return stop
    return not stop


def _head_index(node: program.HeadIndexRead) -> Meaning:
    match node.name:
        case "head":
            return lambda frame: frame.head
        case "batch":
            return lambda frame: frame.batch
        case "kv_head":
            return lambda frame: frame.head // frame.around.size("group", node.span)


def _entry(table: Result, index: int, span: Span) -> Result:
    if isinstance(table, float):
        return table  # an empty sum of vectors is the number 0
    assert isinstance(table, tuple)
    if not 0 <= index < len(table):
        message = f"the index {index} is out of range for a list of {len(table)}"
        raise EvaluationError("A902", message, span, "test the index first: `… if 0 <= i < n else …`")
    return table[index]


def _integer(value: Result) -> int:
    if isinstance(value, float) and value.is_integer():  # an empty floating-point sum is 0.0
        return int(value)
    assert isinstance(value, int) and not isinstance(value, bool)
    return value


def _sum(values: _Values, node: program.Aggregate) -> Number:
    total: Number = 0
    for value in values:
        total = _added(total, value, node)
    return total


def _added(total: Number, value: Result, node: program.Aggregate) -> Number:
    assert not isinstance(value, tuple)
    try:
        return checked(total + value)
    except ArithmeticFault as fault:
        raise EvaluationError("A901", str(fault), node.span, "use a shorter range, or smaller terms") from None


def _mean(values: _Values, node: program.Aggregate) -> Number:
    total: Number = 0
    count = 0
    for value in values:
        total, count = _added(total, value, node), count + 1
    assert not isinstance(total, float)
    return Fraction(total, count) if count else 0


def _floating_total(values: list[Result], node: program.Aggregate) -> Result:
    """Return an aggregate of values: exact if there are values and all of them are exact, else floating point."""
    if values and not any(isinstance(value, float | tuple | float_arithmetic.ScaledFloat) for value in values):
        return _FOLDS[node.op](iter(values), node)
    return cast("Result", float_arithmetic.total(node.op, values))


def _extreme(better: Callable[[Iterator[Number]], Number]) -> Callable[[_Values, program.Aggregate], Number]:
    def fold(values: _Values, node: program.Aggregate) -> Number:
        try:
            return better(values)  # type: ignore[arg-type]
        except ValueError:
            help_ = "make sure that the range is not empty"
            raise EvaluationError("A901", f"`{node.op}` of an empty range is undefined", node.span, help_) from None

    return fold


_FOLDS: dict[str, Callable[[_Values, program.Aggregate], Number]] = {
    "sum": _sum,
    "mean": _mean,
    "max": _extreme(max),
    "min": _extreme(min),
    "any": lambda values, node: any(values),
    "all": lambda values, node: all(values),
    "count": lambda values, node: sum(1 for value in values if value),
}
