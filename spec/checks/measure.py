"""How tall an expression is once its definitions are written out, how deep its loops nest, and what it leaves free.

The limits here let every later stage recurse over a program, definitions included, without fear.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc.spec import program

MAX_HEIGHT = 200
MAX_LOOPS = 4


@dataclass(frozen=True, slots=True)
class Measure:
    """`free` holds the binders that something outside must bind."""

    height: int
    loops: int
    free: frozenset[program.Binder]


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
            ends = tuple(e for r in runnings for e in (r.low, r.high))
            return (*ends, body) if condition_ is None else (*ends, body, condition_)
        case program.Table(items=items):
            return items
        case program.Item(table=table, index=index):
            return (table, index)
        case _:
            return ()


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
        match node:
            case program.Local(binder=binder):
                free = frozenset({binder})
            case program.Aggregate(runnings=runnings):
                loops += len(runnings)
                free -= {r.target for r in runnings if isinstance(r.target, program.Binder)}
            case program.DefinitionUse(definition=definition):
                body = self.of_definition(definition)
                height, loops, free = height + body.height, loops + body.loops, free | body.free
        return Measure(height, loops, free)

    def of_definition(self, definition: program.Definition) -> Measure:
        """The measure of a definition's body; its own parameters are not free."""
        if definition not in self._known:
            body = self.of(definition.body)
            self._known[definition] = Measure(body.height, body.loops, body.free - set(definition.parameters))
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
