"""Find the world in which each part of an expression is resolved: exact, floating point, or vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from attnc.spec import syntax
from attnc.spec.names.builtins import VECTOR_FUNCTIONS
from attnc.spec.names.scope import DefinitionSource, DefinitionSymbol, Symbol, children

World = Literal["exact", "float", "vector"]
"""The way of resolving an expression.

exact: relations. float: scores and values, where `q` and `k` are positions. vector: scores and values, where `q` and
`k` are vectors.
"""

Part = tuple[syntax.Expr, Mapping[str, Symbol], World]
"""An expression, the names around it, and its world."""


class Worlds:
    """Finds the worlds of the definitions that an expression uses."""

    def __init__(self) -> None:
        self._vectors: dict[DefinitionSource, frozenset[str]] = {}

    def demanded(
        self, expression: syntax.Expr, names: Mapping[str, Symbol], world: World
    ) -> dict[DefinitionSource, set[World]]:
        """Return the worlds in which an expression uses each definition, directly or through other definitions."""
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
            node, node_world = stack.pop()
            symbol = names.get(node.id) if isinstance(node, syntax.NameExpr) else None
            if isinstance(symbol, DefinitionSymbol):
                yield symbol.source, node_world
            stack.extend(self.inside(node, names, node_world))

    def inside(self, node: syntax.Expr, names: Mapping[str, Symbol], world: World) -> list[tuple[syntax.Expr, World]]:
        """Return the expressions directly inside a node, each with its world."""
        if world == "exact":
            return [(child, world) for child in children(node)]
        match node:
            case syntax.CallExpr(function=syntax.NameExpr() as function):
                parts = [(function, world), *((a.value, world) for a in node.arguments)]
                return [(e, w if e is function else self.argument_world(node, e, names, w)) for e, w in parts]
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

    def argument_world(
        self, call: syntax.CallExpr, argument: syntax.Expr, names: Mapping[str, Symbol], world: World
    ) -> World:
        """Return the world of an argument of a call that is not exact."""
        name = call.function.id if isinstance(call.function, syntax.NameExpr) else ""
        symbol = names.get(name)
        if isinstance(symbol, DefinitionSymbol):
            vectors = self.vector_parameters(symbol.source)
            return "vector" if _parameter(call, argument, symbol.source) in vectors else "float"
        return "vector" if name in VECTOR_FUNCTIONS else world

    def vector_parameters(self, source: DefinitionSource) -> frozenset[str]:
        """Return the parameters of a definition that its body reads as vectors."""
        if source not in self._vectors:
            self._vectors[source] = frozenset()  # guards against recursion; cycles are reported by `DefinitionOrder`
            parameters = {b.name for b in source.parameters}
            vectors: set[str] = set()
            stack: list[tuple[syntax.Expr, World]] = [(source.body, "float")] if parameters else []
            while stack:
                node, world = stack.pop()
                if isinstance(node, syntax.NameExpr) and node.id in parameters and world == "vector":
                    vectors.add(node.id)
                stack.extend(self.inside(node, source.names, world))
            self._vectors[source] = frozenset(vectors)
        return self._vectors[source]


def _parameter(call: syntax.CallExpr, argument: syntax.Expr, source: DefinitionSource) -> str | None:
    """Return the name of the parameter that an argument is bound to; None if there are too many arguments."""
    for i, call_argument in enumerate(call.arguments):
        if call_argument.value is argument:
            if call_argument.name is not None:
                return call_argument.name.id
            return source.parameters[i].name if i < len(source.parameters) else None
    return None
