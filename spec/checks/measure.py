"""Measure an expression with its definitions expanded: height, operations, nested loops and free variables.

The limits keep programs small enough for every later stage to recurse over them, definitions included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from attnc.spec import program
from attnc.spec.source import Span

MAX_HEIGHT = 200
MAX_LOOPS = 6
MAX_OPERATIONS = 10_000
"""Maximum number of operations of one expression, counting a definition once per use."""
_COUNTED = 1 << 40
"""Counts of operations saturate here."""


@dataclass(frozen=True, slots=True)
class Measure:
    """The measure of an expression with its definitions expanded.

    `free` holds the binders that the expression does not bind itself; `places` holds those of `q`, `k` and `key` that
    no `for` inside binds, where `key` is the current key, token or not. `operations` counts operations, and `uses`
    counts the reads of each free binder.
    """

    height: int
    loops: int
    free: frozenset[program.Binder]
    places: frozenset[str]
    operations: int = 0
    uses: Mapping[program.Binder, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Excess:
    """A limit that an expression exceeds, and the remedy."""

    message: str
    help: str


def children(node: program.Expr) -> tuple[program.Expr, ...]:
    """Return the expressions directly inside a node; the body of a used definition is not a child."""
    match node:
        case program.InputRead(indices=indices):
            return indices
        case program.DefinitionUse(arguments=arguments):
            return arguments
        case program.Operation(operands=operands):
            return operands
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            return (condition, then, otherwise)
        case program.Aggregate(body=body, runnings=runnings, condition=condition_):
            ends = tuple(e for r in runnings for e in range_ends(r))
            return (*ends, body) if condition_ is None else (*ends, body, condition_)
        case program.ListValue(items=items):
            return items
        case program.Item(table=table, index=index):
            return (table, index)
        case _:
            return _attention_children(node)


def _attention_children(node: program.Expr) -> tuple[program.Expr, ...]:
    match node:
        case program.Vector(at=at) | program.ScoreRead(at=at):
            return () if at is None else (at,)
        case program.SoftmaxShare(score=score, extra=extra):
            return tuple(e for e in (score, extra) if e is not None)
        case program.BranchRead(member=member, at=at):
            return tuple(e for e in (member, at) if e is not None)
        case program.MergeCall(parts=parts):
            return parts
        case program.InUnit(at=at):
            return (at,)
        case program.SelectedTest(item=item, member=member, number=number):
            return tuple(e for e in (item, number, member) if e is not None)
        case program.SelectedCount(member=member):
            return () if member is None else (member,)
        case _:  # states and leaves
            return ()


def range_ends(variable: program.Domain) -> tuple[program.Expr, ...]:
    """Return the two ends of a range variable; nothing for other variables."""
    return (variable.low, variable.high) if isinstance(variable, program.RangeVariable) else ()


def first_use(node: program.Expr, place: str, measures: Measures) -> Span | None:
    """Return where an expression first reads a place that no `for` inside binds; None where it never does.

    A read inside a definition is reported at the use of the definition.
    """
    if place not in measures.of(node).places:
        return None
    if isinstance(node, program.Aggregate):
        for variable in node.runnings:
            for end in range_ends(variable):
                if place in measures.of(end).places:
                    return first_use(end, place, measures)
            if place in binds(variable):
                return None
    uses = (first_use(child, place, measures) for child in children(node))
    return next((span for span in uses if span is not None), node.span)


def binds(variable: program.Domain) -> set[str]:
    """Return the positions that a variable of an aggregate binds."""
    places: set[str] = {variable.target} if isinstance(variable.target, str) else set()
    return places | {"key"} if isinstance(variable, program.VisibleVariable) else places


def below(roots: Iterable[program.Expr]) -> Iterator[program.Expr]:
    """Yield every subexpression of `roots`, including the body of each used definition once."""
    seen: set[program.Definition] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(children(node))
        if isinstance(node, program.DefinitionUse) and node.definition not in seen:
            seen.add(node.definition)
            stack.append(node.definition.body)


def inputs_read(roots: Iterable[program.Expr]) -> set[program.Input]:
    """Return the inputs that expressions read, also through definitions; `order(h)` reads `h`."""
    read = {node.input for node in below(roots) if isinstance(node, program.InputRead)}
    return {item if item.ranks_of is None else item.ranks_of for item in read}


def selections_read(roots: Iterable[program.Expr]) -> set[str]:
    """Return the names of the selections that expressions read, also through definitions."""
    return {node.selection for node in below(roots) if isinstance(node, program.SelectedTest | program.SelectedCount)}


def expressions(attend: program.AttentionClauses) -> Iterator[program.Expr]:
    """Yield the expressions of an attention."""
    yield from attend.visible
    for unit in attend.units:
        yield unit.value
    for item in (attend.over, attend.stack, attend.family):
        if isinstance(item, program.KeyRange):
            yield from (item.low, item.high)
    weights = attend.weights.extra if isinstance(attend.weights, program.SoftmaxClause) else attend.weights
    yield from (e for e in (attend.score, weights, attend.value) if e is not None)


def expressions_of_selection(item: program.SelectionClauses) -> Iterator[program.Expr]:
    """Yield the expressions of a selection."""
    yield from expressions(item.row)
    yield from (e for e in (item.covers, item.keep, item.always) if e is not None)


def recurrences_of(pattern: program.Program) -> tuple[program.RecurrenceClauses, ...]:
    """Return the recurrence of a recurrent pattern, or the branches with a state of another pattern."""
    return pattern.stateful if pattern.recurrence is None else (pattern.recurrence,)


def lines_of(item: program.RecurrenceClauses) -> list[program.Expr]:
    """Return the expressions of a recurrence."""
    ranges = [x.repeat for x in item.lines if isinstance(x, program.StepClause)] + [item.family]
    ends = [end for key_range in ranges if key_range is not None for end in (key_range.low, key_range.high)]
    return [*(x.value for x in item.lines), *ends, *(e for e in (item.scan, item.reset) if e is not None)]


def _implied(
    node: program.Vector | program.ScoreRead | program.SoftmaxShare | program.BranchRead | program.MergeCall,
) -> set[str]:
    """Return the positions that a node reads implicitly."""
    match node:
        case program.Vector():
            return set() if node.place is None else {node.place}
        case program.ScoreRead(at=at):
            return {"q", "key"} if at is None else {"q"}
        case program.SoftmaxShare():
            return {"q", "key"}
        case program.BranchRead(part="weight"):
            return {"q", "key"}
        case program.BranchRead(at=at):
            return {"q"} if at is None else set()
        case _:
            return {"q"}


class Measures:
    """Computes and caches measures of expressions and definitions.

    `decided` names the selections whose result does not depend on the query; reading them does not read `q`.
    """

    def __init__(self, decided: frozenset[str] = frozenset()) -> None:
        self._decided = decided
        self._definitions: dict[program.Definition, Measure] = {}
        self._nodes: dict[program.Expr, Measure] = {}

    def of(self, node: program.Expr) -> Measure:
        """Return the measure of an expression."""
        result = self._nodes.get(node)
        if result is None:
            result = self._nodes[node] = self._measure(node)
        return result

    def _measure(self, node: program.Expr) -> Measure:
        inner = [self.of(child) for child in children(node)]
        height = 1 + max((m.height for m in inner), default=0)
        loops = max((m.loops for m in inner), default=0)
        free = frozenset[program.Binder]().union(*(m.free for m in inner))
        places = frozenset[str]().union(*(m.places for m in inner))
        match node:
            case program.Local(binder=binder):
                free = frozenset({binder})
            case (
                program.Vector()
                | program.ScoreRead()
                | program.SoftmaxShare()
                | program.BranchRead()
                | program.MergeCall()
            ):
                places |= _implied(node)
            case program.InUnit(unit=unit):
                free |= {unit.binder}
            case program.SelectedTest(selection=selection, unit=unit, by_query=by_query):
                places |= {"q"} if by_query and selection not in self._decided else set()
                free |= frozenset() if unit is None else {unit.binder}
            case program.SelectedCount(selection=selection, by_query=by_query):
                places |= {"q"} if by_query and selection not in self._decided else set()
            case program.RankingRead():
                places |= {"key"}
            case program.PositionRead(place=place) | program.Coordinate(place=place) | program.InSegment(place=place):
                places = frozenset({place})
            case program.Aggregate(runnings=runnings):
                loops += len(runnings)
                free -= {r.target for r in runnings if isinstance(r.target, program.Binder)}
                free |= {r.unit.binder for r in runnings if isinstance(r, program.UnitVariable)}
                places = self._free_places(node)
            case program.DefinitionUse(definition=definition):
                body = self.of_definition(definition)
                height, loops = height + body.height, loops + body.loops
                free, places = free | body.free, places | body.places
        operations, uses = self._expanded(node, inner)
        return Measure(height, loops, free, places, operations, uses)

    def _expanded(self, node: program.Expr, inner: list[Measure]) -> tuple[int, Mapping[program.Binder, int]]:
        """Return the operations and the uses of each binder of an expression with its definitions expanded."""
        if isinstance(node, program.Local):
            return 0, {node.binder: 1}
        reads = [1] * len(inner)
        operations, uses = (1 if inner else 0), Counter[program.Binder]()
        if isinstance(node, program.DefinitionUse):
            body = self.of(node.definition.body)
            operations = body.operations
            uses.update({b: n for b, n in body.uses.items() if b not in node.definition.parameters})
            reads = [body.uses.get(parameter, 0) for parameter in node.definition.parameters]
        for count, measure in zip(reads, inner, strict=True):
            operations += count * measure.operations
            uses.update({binder: count * n for binder, n in measure.uses.items()})
        return min(operations, _COUNTED), {binder: min(n, _COUNTED) for binder, n in uses.items()}

    def _free_places(self, node: program.Aggregate) -> frozenset[str]:
        """Return the positions that an aggregate leaves free; the ends of a range see only the variables before it."""
        free, bound = frozenset[str](), set[str]()
        for variable in node.runnings:
            for end in range_ends(variable):
                free |= self.of(end).places - bound
            bound |= binds(variable)
        inside = (node.body,) if node.condition is None else (node.body, node.condition)
        return free.union(*(self.of(part).places - bound for part in inside))

    def of_definition(self, definition: program.Definition) -> Measure:
        """Return the measure of a definition's body, in which the definition's parameters are not free."""
        if definition not in self._definitions:
            body = self.of(definition.body)
            self._definitions[definition] = replace(body, free=body.free - set(definition.parameters))
        return self._definitions[definition]

    def excess(self, node: program.Expr) -> Excess | None:
        """Return the limit that an expression exceeds, or None."""
        measure = self.of(node)
        if measure.height > MAX_HEIGHT:
            message = f"is {measure.height} levels deep with its definitions expanded; the limit is {MAX_HEIGHT}"
            return Excess(message, "use an aggregate with `for`, or fewer definitions of definitions")
        if measure.operations > MAX_OPERATIONS:
            number = f"{measure.operations:,}" if measure.operations < _COUNTED else f"more than {_COUNTED:,}"
            message = f"has {number} operations with its definitions expanded; the limit is {MAX_OPERATIONS:,}"
            return Excess(message, "let each definition use the one before it only once, or find a closed form")
        if measure.loops > MAX_LOOPS:
            message = f"nests {measure.loops} `for` variables; the limit is {MAX_LOOPS}"
            return Excess(message, "merge the ranges, or find a closed form")
        return None
