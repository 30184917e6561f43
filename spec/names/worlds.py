"""In which world the parts of an expression are read: exact, floating point, or that with `q` and `k` as vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from attnc.spec import syntax
from attnc.spec.names.builtins import VECTOR_FUNCTIONS
from attnc.spec.names.scope import DefinitionSource, DefinitionSymbol, Symbol, children

World = Literal["exact", "float", "vector"]
"""exact: relations. float: scores, where `q` and `k` are positions. vector: there, they are vectors."""

Part = tuple[syntax.Expr, Mapping[str, Symbol], World]
"""An expression, the names around it, and its world."""


class Worlds:
    """Finds the worlds of the definitions that an expression uses."""

    def __init__(self) -> None:
        self._vectors: dict[DefinitionSource, frozenset[str]] = {}

    def demanded(
        self, expression: syntax.Expr, names: Mapping[str, Symbol], world: World
    ) -> dict[DefinitionSource, set[World]]:
        """The worlds in which an expression uses each definition, through others too."""
        result: dict[DefinitionSource, set[World]] = {}
        stack: list[Part] = [(expression, names, world)]
        while stack:
            for source, used_in in self._uses(*stack.pop()):
                if used_in not in result.setdefault(source, set()):
                    result[source].add(used_in)
                    stack.append((source.body, source.names, used_in))
        return result

    def _uses(
        self, expression: syntax.Expr, names: Mapping[str, Symbol], world: World
    ) -> Iterator[tuple[DefinitionSource, World]]:
        stack = [(expression, world)]
        while stack:
            node, here = stack.pop()
            symbol = names.get(node.id) if isinstance(node, syntax.NameExpr) else None
            if isinstance(symbol, DefinitionSymbol):
                yield symbol.source, here
            stack.extend(self.inside(node, names, here))

    def inside(self, node: syntax.Expr, names: Mapping[str, Symbol], world: World) -> list[tuple[syntax.Expr, World]]:
        """The expressions directly inside a node, each with its world."""
        if world == "exact":
            return [(child, world) for child in children(node)]
        match node:
            case syntax.CallExpr(function=syntax.NameExpr() as function):
                found = [(function, world), *((a.value, world) for a in node.arguments)]
                return [(e, w if e is function else self.of_argument(node, e, names, w)) for e, w in found]
            case syntax.BinaryExpr(op="@", left=left, right=right):
                return [(left, "vector"), (right, "vector")]
            case syntax.IndexExpr(base=base, indices=indices):
                return [(base, world), *((i, "float") for i in indices)]
            case syntax.ConditionalExpr(then=then, condition=condition, otherwise=otherwise):
                return [(then, world), (condition, "float"), (otherwise, world)]
            case syntax.AggregateExpr(body=body):
                return [(c, world if c is body else "float") for c in children(node)]
            case syntax.ComparisonExpr() | syntax.LogicExpr() | syntax.AttributeExpr():
                return [(child, "float") for child in children(node)]
            case _:
                return [(child, world) for child in children(node)]

    def of_argument(
        self, call: syntax.CallExpr, argument: syntax.Expr, names: Mapping[str, Symbol], world: World
    ) -> World:
        """The world of an argument of a call that stands in the world of floating point."""
        name = call.function.id if isinstance(call.function, syntax.NameExpr) else ""
        symbol = names.get(name)
        if isinstance(symbol, DefinitionSymbol):
            vectors = self.vector_parameters(symbol.source)
            return "vector" if _parameter(call, argument, symbol.source) in vectors else "float"
        return "vector" if name in VECTOR_FUNCTIONS else world

    def vector_parameters(self, source: DefinitionSource) -> frozenset[str]:
        """The parameters of a definition that its body reads as vectors."""
        if source not in self._vectors:
            self._vectors[source] = frozenset()  # for the time being: a circle is refused elsewhere
            own = {b.name for b in source.parameters}
            found: set[str] = set()
            stack: list[tuple[syntax.Expr, World]] = [(source.body, "float")] if own else []
            while stack:
                node, world = stack.pop()
                if isinstance(node, syntax.NameExpr) and node.id in own and world == "vector":
                    found.add(node.id)
                stack.extend(self.inside(node, source.names, world))
            self._vectors[source] = frozenset(found)
        return self._vectors[source]


def _parameter(call: syntax.CallExpr, argument: syntax.Expr, source: DefinitionSource) -> str | None:
    """The parameter that an argument is for."""
    for i, given in enumerate(call.arguments):
        if given.value is argument:
            if given.name is not None:
                return given.name.id
            return source.parameters[i].name if i < len(source.parameters) else None
    return None
