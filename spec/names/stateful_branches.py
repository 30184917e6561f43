"""Branches with a state: tokens one after another, beside branches with keys."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import replace

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.dimensions import Dimensions
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.families import family_of, range_of
from attnc.spec.names.module_scopes import declare, let_source
from attnc.spec.names.recurrence_resolver import RecurrenceResolver, stateful_lets
from attnc.spec.names.scope import BranchSymbol, DefinitionSource, DefinitionSymbol, RangeSymbol, Symbol
from attnc.spec.report import DiagnosticList

STATEFUL = frozenset({"state", "step", "read", "scan", "reset"})
"""The words that make a branch one with a state; `let` may stand beside them."""


def is_stateful(block: syntax.BlockStatement) -> bool:
    """Whether a branch has a state."""
    return any(item.word.id in STATEFUL for item in block.body.statements)


class StatefulBranch:
    """One `branch` with a state. Its names are declared first, as those of other branches."""

    def __init__(
        self,
        block: syntax.BlockStatement,
        names: MutableMapping[str, Symbol],
        dimensions: Dimensions,
        resolver: Resolver,
        report: DiagnosticList,
    ) -> None:
        assert block.name is not None
        self.name = block.name
        self._block = block
        self._own: dict[str, Symbol] = {}
        self._outer = names
        maps = names.maps if isinstance(names, ChainMap) else [names]
        self._names: ChainMap[str, Symbol] = ChainMap(self._own, *maps)
        self._dimensions = dimensions
        self._resolver = resolver
        self._report = report

    @property
    def symbol(self) -> BranchSymbol:
        """The symbol of the branch's name."""
        return BranchSymbol(self.name.span, self.name.id, bool(self._block.binders), is_stateful=True)

    def recurrence(self) -> program.RecurrenceClauses:
        """The recurrence that it is."""
        self._check_statements()
        statements = self._block.body.statements
        family = self._family()
        stateful = stateful_lets(statements)
        for item in statements:
            if isinstance(item, syntax.DefinitionDecl) and item.word.id == "let" and item.name.id not in stateful:
                source = let_source(item, self._names)
                self._declare(item.name, DefinitionSymbol(item.name.span, source))
        around = self._resolver.surroundings
        around.recurrent = True
        try:
            recurrent = RecurrenceResolver(
                self.name, statements, self._names, self._declare, self._dimensions, self._resolver, self._report
            )
            return replace(recurrent.resolve(stateful), family=family)
        finally:
            around.recurrent = False

    def _family(self) -> program.KeyRange | None:
        running = family_of(self._block, self._report)
        if running is None:
            return None
        key_range = range_of(running, lambda end: self._resolver.resolve(end, self._names, world="exact"))
        self._declare(running.name, RangeSymbol(running.name.span, key_range.binder))
        return key_range

    def spare(self) -> list[DefinitionSource]:
        """Lets that may be unused: they are read with the lines, or not at all."""
        return []

    def _declare(self, name: syntax.NameExpr, symbol: Symbol) -> None:
        declare(self._report, self._own, self._outer, name, symbol)

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._block.body.statements:
            word = item.word.id
            if word not in STATEFUL and word != "let":
                message = f"`{word}` does not belong in a branch with a state"
                help_ = "such a branch has one token at a time: `state`, `let`, `step`, `read`, `scan`, `reset`"
                self._report.error("A214", message, item.word.span, help=help_)
            elif word in first and word in ("read", "scan", "reset"):
                also = (Label(first[word].span, "first here"),)
                message = f"`{word}` is said twice"
                self._report.error("A216", message, item.span, "again here", also=also, help="keep one")
            first.setdefault(word, item)


__all__ = ["STATEFUL", "StatefulBranch", "is_stateful"]
