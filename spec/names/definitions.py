"""Order definitions so that each is resolved after what it uses; report cycles and long chains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnc.spec import syntax
from attnc.spec.diagnostics import DiagnosticList, Label
from attnc.spec.names.scope import DefinitionSource, DefinitionSymbol, Symbol, walk
from attnc.spec.source import Span

MAX_CHAIN = 64
"""Maximum length of a chain of definitions that use each other."""

MAX_SHOWN = 8
"""Maximum number of definitions that an error about a cycle names."""

_Edge = tuple[DefinitionSource, Span]


class DefinitionOrder:
    """Walks the graph of definitions without recursion; visits each definition once."""

    def __init__(self, report: DiagnosticList) -> None:
        self._report = report
        self._depth: dict[DefinitionSource, int] = {}
        self._mentions: dict[DefinitionSource, bool] = {}
        self._edges: dict[DefinitionSource, list[_Edge]] = {}
        self.broken: set[DefinitionSource] = set()
        """Refused definitions: on a cycle, at the end of too long a chain, or too large."""
        self._excessive: set[DefinitionSource] = set()

    def under(
        self, expression: syntax.Expr, names: Mapping[str, Symbol], *, again: bool = False
    ) -> list[DefinitionSource]:
        """Return the definitions that `expression` needs, each after what it uses, without refused definitions.

        Unless `again`, a definition is returned by the first call only, except for definitions that mention `visible`.
        """
        order: list[DefinitionSource] = []
        visited = set() if again else {source for source in self._depth if not self._mentions[source]}
        for source, span in _uses(expression, names):
            self._visit(source, span, order, visited)
        return [source for source in order if source not in self.broken]

    def mentions_visible(self, source: DefinitionSource) -> bool:
        """Whether `source` reads `visible`, so that its value depends on the relation so far."""
        return self._mentions.get(source, False)

    def refuse_excessive(self, source: DefinitionSource) -> None:
        """Refuse a definition that exceeds a limit, and silently all definitions that use it."""
        self._excessive.add(source)
        self.broken.add(source)

    def uses_excessive(self, source: DefinitionSource) -> bool:
        """Whether a definition uses one that exceeds a limit."""
        return any(used in self._excessive for used, _ in self._dependencies(source))

    def _visit(
        self, root: DefinitionSource, span: Span, order: list[DefinitionSource], visited: set[DefinitionSource]
    ) -> None:
        if root in visited:
            return
        path: list[tuple[DefinitionSource, Span, Iterator[_Edge]]] = [(root, span, iter(self._dependencies(root)))]
        open_: dict[DefinitionSource, int] = {root: 0}
        while path:
            source, _, edges = path[-1]
            edge = next(edges, None)
            if edge is None:
                path.pop()
                del open_[source]
                visited.add(source)
                self._close(source)
                order.append(source)
            elif edge[0] in open_:
                self._cycle([(s, span) for s, span, _ in path[open_[edge[0]] :]], edge)
            elif edge[0] not in visited:
                open_[edge[0]] = len(path)
                path.append((*edge, iter(self._dependencies(edge[0]))))

    def _dependencies(self, source: DefinitionSource) -> list[_Edge]:
        if source not in self._edges:
            self._edges[source] = list(_uses(source.body, source.names))
        return self._edges[source]

    def _close(self, source: DefinitionSource) -> None:
        if source in self._depth:
            return
        used = [d for d, _ in self._dependencies(source)]
        depth = 1 + max((self._depth.get(d, 0) for d in used if d not in self.broken), default=0)
        self._depth[source] = depth
        self._mentions[source] = _names_visible(source.body) or any(self._mentions.get(d, False) for d in used)
        if self.uses_excessive(source):
            self.refuse_excessive(source)
        elif depth > MAX_CHAIN and source not in self.broken:
            self.refuse_excessive(source)
            self._report.error(
                "A506",
                f"`{source.name}` depends on a chain of more than {MAX_CHAIN} definitions",
                source.span,
                "the chain is too long here",
                help="inline some of the definitions, or use an aggregate with `for`",
            )

    def _cycle(self, path: list[_Edge], back: _Edge) -> None:
        members = [source for source, _ in path]
        if any(source in self.broken for source in members):
            return
        self.broken.update(members)
        round_trip = [f"`{s.name}`" for s in [*members, back[0]]]
        shown = round_trip if len(round_trip) <= MAX_SHOWN else [*round_trip[: MAX_SHOWN - 2], "…", round_trip[-1]]
        names = " → ".join(shown)
        spans = [span for _, span in path[1:]] + [back[1]]
        labels = tuple(
            Label(span, f"`{user.name}` uses `{used.name}`")
            for user, used, span in zip(members, [*members[1:], back[0]], spans, strict=True)
        )
        self._report.error(
            "A205",
            f"the definition is circular: {names}",
            members[0].span,
            "depends on itself",
            also=labels[:MAX_SHOWN],
            help="remove the cycle: `let` and `def` cannot be recursive",
        )


def _uses(expression: syntax.Expr, names: Mapping[str, Symbol]) -> Iterator[_Edge]:
    for node in walk(expression):
        if isinstance(node, syntax.NameExpr):
            symbol = names.get(node.id)
            if isinstance(symbol, DefinitionSymbol):
                yield symbol.source, node.span


def _names_visible(body: syntax.Expr) -> bool:
    return any(isinstance(node, syntax.NameExpr) and node.id == "visible" for node in walk(body))
