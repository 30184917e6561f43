"""How tall an expression is once its definitions are written out, how deep its loops nest, and what it leaves free.

The limits here let every later stage recurse over a program, definitions included, without fear.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from attnc.spec import program
from attnc.spec.source import Span

MAX_HEIGHT = 200
MAX_LOOPS = 4


@dataclass(frozen=True, slots=True)
class Measure:
    """`free` holds the binders that something outside must bind, `places` those of q and k that no `for` binds."""

    height: int
    loops: int
    free: frozenset[program.Binder]
    places: frozenset[str]


@dataclass(frozen=True, slots=True)
class Excess:
    """What is too much, and the remedy."""

    message: str
    help: str


def children(node: program.Expr) -> tuple[program.Expr, ...]:
    """The expressions directly inside a node; the body of a definition is not among them."""
    match node:
        case program.InputRead(indices=indices):
            return indices
        case program.DefinitionUse(arguments=arguments):
            return arguments
        case program.Operation(operands=operands):
            return operands
        case program.Choice(condition=condition, then=then, otherwise=otherwise):
            return (condition, then, otherwise)
        case program.Aggregate(body=body, runnings=runnings, condition=condition_):
            ends = tuple(e for r in runnings for e in range_ends(r))
            return (*ends, body) if condition_ is None else (*ends, body, condition_)
        case program.Table(items=items):
            return items
        case program.Item(table=table, index=index):
            return (table, index)
        case _:
            return ()


def range_ends(running: program.Running | program.Members) -> tuple[program.Expr, ...]:
    """The expressions of a domain."""
    return (running.low, running.high) if isinstance(running, program.Running) else ()


def first_use(node: program.Expr, place: str, measures: Measures) -> Span | None:
    """Where an expression first reads a place that no `for` in it binds; a use of a definition is one place."""
    if place not in measures.of(node).places:
        return None
    if isinstance(node, program.Aggregate):
        for running in node.runnings:
            for end in range_ends(running):
                if place in measures.of(end).places:
                    return first_use(end, place, measures)
            if running.target == place:
                return None
    found = (first_use(child, place, measures) for child in children(node))
    return next((span for span in found if span is not None), node.span)


def inputs_read(roots: Iterable[program.Expr]) -> set[program.Input]:
    """The inputs that expressions read, through definitions too."""
    found: set[program.Input] = set()
    seen: set[program.Definition] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        stack.extend(children(node))
        if isinstance(node, program.InputRead):
            found.add(node.input)
        elif isinstance(node, program.DefinitionUse) and node.definition not in seen:
            seen.add(node.definition)
            stack.append(node.definition.body)
    return found


class Measures:
    """Measures of definitions, each taken once."""

    def __init__(self) -> None:
        self._known: dict[program.Definition, Measure] = {}

    def of(self, node: program.Expr) -> Measure:
        """The measure of an expression."""
        inner = [self.of(child) for child in children(node)]
        height = 1 + max((m.height for m in inner), default=0)
        loops = max((m.loops for m in inner), default=0)
        free = frozenset[program.Binder]().union(*(m.free for m in inner))
        places = frozenset[str]().union(*(m.places for m in inner))
        match node:
            case program.Local(binder=binder):
                free = frozenset({binder})
            case (
                program.Vector(place=place)
                | program.Place(place=place)
                | program.Coordinate(place=place)
                | program.InSegment(place=place)
            ):
                places = frozenset({place})
            case program.Aggregate(runnings=runnings):
                loops += len(runnings)
                free -= {r.target for r in runnings if isinstance(r.target, program.Binder)}
                free |= {r.unit.binder for r in runnings if isinstance(r, program.Members)}
                places = self._free_places(node)
            case program.DefinitionUse(definition=definition):
                body = self.of_definition(definition)
                height, loops = height + body.height, loops + body.loops
                free, places = free | body.free, places | body.places
        return Measure(height, loops, free, places)

    def _free_places(self, node: program.Aggregate) -> frozenset[str]:
        """The places that an aggregate leaves free: a range does not see the places that it or later ones bind."""
        free, bound = frozenset[str](), set[str]()
        for running in node.runnings:
            for end in range_ends(running):
                free |= self.of(end).places - bound
            if isinstance(running.target, str):
                bound.add(running.target)
        inside = (node.body,) if node.condition is None else (node.body, node.condition)
        return free.union(*(self.of(part).places - bound for part in inside))

    def of_definition(self, definition: program.Definition) -> Measure:
        """The measure of a definition's body; its own parameters are not free."""
        if definition not in self._known:
            body = self.of(definition.body)
            self._known[definition] = replace(body, free=body.free - set(definition.parameters))
        return self._known[definition]

    def excess(self, node: program.Expr) -> Excess | None:
        """What makes an expression too much to handle, or None."""
        measure = self.of(node)
        if measure.height > MAX_HEIGHT:
            message = f"is {measure.height} levels deep with its definitions written out; the limit is {MAX_HEIGHT}"
            return Excess(message, "use an aggregate with `for`, or fewer definitions of definitions")
        if measure.loops > MAX_LOOPS:
            message = f"nests {measure.loops} `for` variables; the limit is {MAX_LOOPS}"
            return Excess(message, "join the ranges, or find a closed form")
        return None
