"""Resolve branches with a state, which process tokens one after another beside branches with keys."""

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
"""The words that only a branch with a state may hold; `let` may stand beside them."""


def is_stateful(block: syntax.BlockStatement) -> bool:
    """Whether a branch has a state."""
    return any(item.word.id in STATEFUL for item in block.body.statements)


class StatefulBranch:
    """Resolves one `branch` with a state. Its name is declared first, so that expressions above may read it."""

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
        self._scope: dict[str, Symbol] = {}
        self._outer_scope = names
        maps = names.maps if isinstance(names, ChainMap) else [names]
        self._names: ChainMap[str, Symbol] = ChainMap(self._scope, *maps)
        self._dimensions = dimensions
        self._resolver = resolver
        self._report = report

    @property
    def symbol(self) -> BranchSymbol:
        """Return the symbol of the branch's name."""
        return BranchSymbol(self.name.span, self.name.id, bool(self._block.binders), is_stateful=True)

    def recurrence(self) -> program.RecurrenceClauses:
        """Return the recurrence of the branch."""
        self._check_statements()
        statements = self._block.body.statements
        family = self._family()
        stateful = stateful_lets(statements)
        for item in statements:
            if isinstance(item, syntax.DefinitionDecl) and item.word.id == "let" and item.name.id not in stateful:
                source = let_source(item, self._names)
                self._declare(item.name, DefinitionSymbol(item.name.span, source))
        surroundings = self._resolver.surroundings
        surroundings.recurrent = True
        try:
            recurrent = RecurrenceResolver(
                self.name, statements, self._names, self._declare, self._dimensions, self._resolver, self._report
            )
            return replace(recurrent.resolve(stateful), family=family)
        finally:
            surroundings.recurrent = False

    def _family(self) -> program.KeyRange | None:
        variable = family_of(self._block, self._report)
        if variable is None:
            return None
        key_range = range_of(variable, lambda end: self._resolver.resolve(end, self._names, world="exact"))
        self._declare(variable.name, RangeSymbol(variable.name.span, key_range.binder))
        return key_range

    def spare(self) -> list[DefinitionSource]:
        """Return no definitions: unused `let` statements of a branch with a state are not checked."""
        return []

    def _declare(self, name: syntax.NameExpr, symbol: Symbol) -> None:
        declare(self._report, self._scope, self._outer_scope, name, symbol)

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._block.body.statements:
            word = item.word.id
            if word not in STATEFUL and word != "let":
                message = f"`{word}` does not belong in a branch with a state"
                help_ = "it processes one token at a time, with `state`, `let`, `step`, `read`, `scan`, `reset`"
                self._report.error("A214", message, item.word.span, help=help_)
            elif word in first and word in ("read", "scan", "reset"):
                also = (Label(first[word].span, "first here"),)
                message = f"`{word}` appears twice"
                self._report.error("A216", message, item.span, "again here", also=also, help="keep one")
            first.setdefault(word, item)


__all__ = ["STATEFUL", "StatefulBranch", "is_stateful"]
