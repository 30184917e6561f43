"""Resolve branches with a state, which process tokens one after another beside branches with keys."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace
from typing import ClassVar

from attnc.spec import program, syntax
from attnc.spec.names.dimensions import Dimensions
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.families import family_of, range_of
from attnc.spec.names.module_scopes import let_source
from attnc.spec.names.recurrence_resolver import RecurrenceResolver, stateful_lets
from attnc.spec.names.scope import BranchSymbol, DefinitionSource, DefinitionSymbol, RangeSymbol, Symbol

STATEFUL = frozenset({"state", "step", "read", "scan", "reset"})
"""The words that only a branch with a state may hold; `let` may stand beside them."""


def is_stateful(block: syntax.BlockStatement) -> bool:
    """Whether a branch has a state."""
    return any(item.word.id in STATEFUL for item in block.body.statements)


class StatefulBranch(RecurrenceResolver):
    """Resolves one `branch` with a state. Its name is declared first, so that expressions above may read it."""

    lets: ClassVar[tuple[DefinitionSource, ...]] = ()
    """No definitions: unused `let` statements of a branch with a state are not checked."""

    def __init__(
        self,
        block: syntax.BlockStatement,
        names: ChainMap[str, Symbol],
        dimensions: Dimensions,
        resolver: Resolver,
    ) -> None:
        assert block.name is not None
        super().__init__(block.name, block.body.statements, names.new_child(), dimensions, resolver)
        self._block = block

    @property
    def symbol(self) -> BranchSymbol:
        """Return the symbol of the branch's name."""
        return BranchSymbol(self.name.span, self.name.id, bool(self._block.binders), is_stateful=True)

    def recurrence(self) -> program.RecurrenceClauses:
        """Return the recurrence of the branch."""
        self._check_statements()
        family = self._family()
        stateful = stateful_lets(self._statements)
        for item in self._lines(syntax.DefinitionDecl, "let"):
            if item.name.id not in stateful:
                source = let_source(item, self._names)
                self._declare(item.name, DefinitionSymbol(item.name.span, source))
        surroundings = self._resolver.surroundings
        surroundings.recurrent = True
        try:
            return replace(self.resolve(stateful), family=family)
        finally:
            surroundings.recurrent = False

    def _family(self) -> program.KeyRange | None:
        variable = family_of(self._block, self._report)
        if variable is None:
            return None
        key_range = range_of(variable, lambda end: self._resolver.resolve(end, self._names, world="exact"))
        self._declare(variable.name, RangeSymbol(variable.name.span, key_range.binder))
        return key_range

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._statements:
            word = item.word.id
            if word not in STATEFUL and word != "let":
                message = f"`{word}` does not belong in a branch with a state"
                help_ = "it processes one token at a time, with `state`, `let`, `step`, `read`, `scan`, `reset`"
                self._report.error("A214", message, item.word.span, help=help_)
            elif word in first and word in ("read", "scan", "reset"):
                self._refuse_twice(word, item.span, first[word].span)
            first.setdefault(word, item)


__all__ = ["STATEFUL", "StatefulBranch", "is_stateful"]
