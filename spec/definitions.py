"""The order in which definitions are resolved: what they use first. Cycles and long chains are refused here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnc.spec import syntax
from attnc.spec.diagnostics import Label
from attnc.spec.report import Report
from attnc.spec.scope import DefinitionSource, DefinitionSymbol, Symbol, walk
from attnc.spec.source import Span

MAX_CHAIN = 64
"""How many definitions may lean on one another in a row."""

_Edge = tuple[DefinitionSource, Span]


class DefinitionOrder:
    """Walks the graph of definitions without recursion, each one once."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._depth: dict[DefinitionSource, int] = {}
        self._mentions: dict[DefinitionSource, bool] = {}
        self.broken: set[DefinitionSource] = set()
        """Definitions on a cycle or too deep in a chain."""

    def under(self, expression: syntax.Expr, names: Mapping[str, Symbol]) -> list[DefinitionSource]:
        """The definitions that `expression` needs, what they use first; refused ones are left out."""
        order: list[DefinitionSource] = []
        seen: set[DefinitionSource] = set()
        for source, span in _uses(expression, names):
            self._visit(source, span, order, seen)
        return [source for source in order if source not in self.broken]

    def mentions_visible(self, source: DefinitionSource) -> bool:
        """Whether the relation so far enters the meaning of `source`."""
        return self._mentions.get(source, False)

    def _visit(
        self, root: DefinitionSource, at: Span, order: list[DefinitionSource], seen: set[DefinitionSource]
    ) -> None:
        if root in seen:
            return
        path: list[tuple[DefinitionSource, Span, Iterator[_Edge]]] = [(root, at, _dependencies(root))]
        open_: dict[DefinitionSource, int] = {root: 0}
        while path:
            source, _, edges = path[-1]
            edge = next(edges, None)
            if edge is None:
                path.pop()
                del open_[source]
                seen.add(source)
                self._close(source)
                order.append(source)
            elif edge[0] in open_:
                self._cycle([(s, span) for s, span, _ in path[open_[edge[0]] :]], edge)
            elif edge[0] not in seen:
                open_[edge[0]] = len(path)
                path.append((*edge, _dependencies(edge[0])))

    def _close(self, source: DefinitionSource) -> None:
        if source in self._depth:
            return
        used = [d for d, _ in _dependencies(source)]
        depth = 1 + max((self._depth.get(d, 0) for d in used if d not in self.broken), default=0)
        self._depth[source] = depth
        self._mentions[source] = _names_visible(source.body) or any(self._mentions.get(d, False) for d in used)
        if depth > MAX_CHAIN and source not in self.broken:
            self.broken.add(source)
            self._report.error(
                "A506",
                f"`{source.name}` leans on a chain of more than {MAX_CHAIN} definitions",
                source.span,
                "the chain is too long here",
                help="write some of the definitions out, or use an aggregate with `for`",
            )

    def _cycle(self, path: list[_Edge], back: _Edge) -> None:
        members = [source for source, _ in path]
        if any(source in self.broken for source in members):
            return
        self.broken.update(members)
        names = " → ".join(f"`{s.name}`" for s in [*members, back[0]])
        spans = [span for _, span in path[1:]] + [back[1]]
        labels = tuple(
            Label(span, f"`{user.name}` uses `{used.name}`")
            for user, used, span in zip(members, [*members[1:], back[0]], spans, strict=True)
        )
        self._report.error(
            "A205",
            f"the definition is circular: {names}",
            members[0].span,
            "its meaning would depend on itself",
            also=labels,
            help="a `let` and a `def` are abbreviations and never recurse",
        )


def _dependencies(source: DefinitionSource) -> Iterator[_Edge]:
    return iter(list(_uses(source.body, source.names)))


def _uses(expression: syntax.Expr, names: Mapping[str, Symbol]) -> Iterator[_Edge]:
    for node in walk(expression):
        if isinstance(node, syntax.Name):
            symbol = names.get(node.id)
            if isinstance(symbol, DefinitionSymbol):
                yield symbol.source, node.span


def _names_visible(body: syntax.Expr) -> bool:
    return any(isinstance(node, syntax.Name) and node.id == "visible" for node in walk(body))
