"""Resolve the statements of one body: declared names, lines by word, words that appear twice, and units of tokens."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import TypeVar

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.module_scopes import declare, let_source, refuse_taken
from attnc.spec.names.scope import DefinitionSource, DefinitionSymbol, Symbol
from attnc.spec.names.worlds import World
from attnc.spec.source import Span

_T = TypeVar("_T")


class BodyResolver:
    """Resolves one body, whose expressions read `names`; the first map of `names` takes what the body declares."""

    def __init__(
        self, statements: tuple[syntax.Statement, ...], names: ChainMap[str, Symbol], resolver: Resolver
    ) -> None:
        self._statements = statements
        self._names = names
        self._resolver = resolver
        self._report = resolver.report

    def _lines(self, kind: type[_T], word: str) -> list[_T]:
        """Return the statements of one kind that begin with `word`."""
        statements = (s for s in self._statements if s.word.id == word)
        return [s for s in statements if isinstance(s, kind)]

    def _clauses(self, word: str) -> list[syntax.ClauseStatement]:
        return self._lines(syntax.ClauseStatement, word)

    def _declare(self, name: syntax.NameExpr, symbol: Symbol) -> None:
        declare(self._report, self._names, name, symbol)

    def _declare_lets(self) -> list[DefinitionSource]:
        """Declare the `let` statements, before resolving any expression that may use them."""
        sources = []
        for item in self._lines(syntax.DefinitionDecl, "let"):
            source = let_source(item, self._names)
            self._declare(item.name, DefinitionSymbol(item.name.span, source))
            sources.append(source)
            for name in item.parameters or ():
                refuse_taken(self._report, name, self._names)
        return sources

    def _resolve(
        self, value: syntax.Expr, world: World = "exact", names: ChainMap[str, Symbol] | None = None
    ) -> tuple[program.Expr, bool]:
        """Return the node of a line, and whether it stays within the limits of an expression; report it otherwise."""
        result = self._resolver.resolve(value, self._names if names is None else names, world=world)
        excess = self._resolver.measures.excess(result)
        if excess:
            self._report.error("A507", f"this line {excess.message}", value.span, help=excess.help)
        return result, not excess

    def _refuse_twice(self, word: str, span: Span, first: Span) -> None:
        also = (Label(first, "first here"),)
        self._report.error("A216", f"`{word}` appears twice", span, "again here", also=also, help="keep one")


EXAMPLE = "`per a = q // block, b = k // block`"


def resolve_unit(binder: syntax.UnitDecl, names: Mapping[str, Symbol], resolver: Resolver) -> program.Unit | None:
    """Return the unit; None after an error about a value that is not of queries only or of keys only."""
    report = resolver.report
    error_count = len(report.diagnostics)
    value = resolver.resolve(binder.value, names)
    places = resolver.measures.of(value).places
    if len(report.diagnostics) > error_count:
        return None
    if len(places) != 1:
        label = "depends on both" if places else "depends on neither"
        message = "a unit must depend on queries only, or on keys only"
        report.error("A221", message, binder.value.span, label, help=f"write units as {EXAMPLE}")
        return None
    place: program.PlaceName = "q" if "q" in places else "k"
    return program.Unit(binder.span, program.Binder(binder.name.span, binder.name.id), place, value)
