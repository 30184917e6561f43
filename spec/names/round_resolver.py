"""Resolve the `round` block of a pattern: its units, its lets and its condition."""

from __future__ import annotations

from collections import ChainMap

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.bodies import EXAMPLE, BodyResolver, resolve_unit
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.scope import SilentSymbol, Symbol, UnitSymbol
from attnc.spec.source import Span

_HOLDS = "a `round` holds one `per`, `let` lines and one `keep`"


class RoundResolver(BodyResolver):
    """Resolves the `round` block of a pattern."""

    def __init__(self, block: syntax.BlockStatement, names: ChainMap[str, Symbol], resolver: Resolver) -> None:
        super().__init__(block.body.statements, names.new_child(), resolver)
        self._block = block

    def resolve(self) -> program.RoundClause | None:
        """Return the block with its names resolved; None after an error was reported."""
        self._check_statements()
        units = self._units()
        lets = self._declare_lets()
        keep = self._keep()
        for source in lets:
            self._resolver.prepare(syntax.NameExpr(source.span, source.name), self._names)
            self._resolver.define(source, "exact")
        if keep is None or units is None:
            return None
        return program.RoundClause(self._block.word.span, *units, keep)

    def _check_statements(self) -> None:
        first: dict[str, Span] = {}
        for item in self._statements:
            word = item.word
            if word.id not in ("per", "let", "keep"):
                message = f"`{word.id}` does not belong in a `round`"
                self._report.error("A214", message, word.span, help=_HOLDS)
            elif word.id in first and word.id != "let":
                self._refuse_twice(word.id, word.span, first[word.id])
            first.setdefault(word.id, word.span)

    def _missing(self, message: str, help_: str) -> None:
        self._report.error("A215", message, self._block.word.span, "incomplete", help=help_)

    # --- units -------------------------------------------------------------------------------------------------------

    def _units(self) -> tuple[program.Unit, program.Unit] | None:
        """Return the unit of queries and the unit of keys; None after an error was reported."""
        lines = self._lines(syntax.BinderClause, "per")
        if not lines:
            self._missing("this `round` has no `per`", f"add the units of queries and keys: {EXAMPLE}")
            return None
        units: dict[str, program.Unit] = {}
        error_count = len(self._report.diagnostics)
        for binder in lines[0].binders:
            unit = self._unit(binder)
            if unit is not None and unit.place in units:
                also = (Label(units[unit.place].span, "first here"),)
                message = f"two units of `{unit.place}`"
                help_ = f"combine them in one list: `{unit.binder.name} = [{unit.place}.y // 8, {unit.place}.x // 8]`"
                self._report.error("A216", message, unit.span, "again here", also=also, help=help_)
            elif unit is not None:
                units[unit.place] = unit
        missing = [place for place in ("q", "k") if place not in units]
        if missing and len(self._report.diagnostics) == error_count:
            self._missing(
                f"this `round` has no unit of `{missing[0]}`", f"name a unit of queries and a unit of keys: {EXAMPLE}"
            )
        return None if missing else (units["q"], units["k"])

    def _unit(self, binder: syntax.Binder) -> program.Unit | None:
        if not isinstance(binder, syntax.UnitDecl):
            message = f"`{binder.name.id}` is not a unit"
            self._report.error("A215", message, binder.span, "no `=`", help=f"write units as {EXAMPLE}")
            self._names.maps[0].setdefault(binder.name.id, SilentSymbol(binder.name.span))
            return None
        unit = resolve_unit(binder, self._names.parents, self._resolver)
        symbol = SilentSymbol(binder.name.span) if unit is None else UnitSymbol(binder.name.span, unit)
        self._declare(binder.name, symbol)
        return unit

    def _keep(self) -> program.Expr | None:
        clauses = self._clauses("keep")
        if not clauses:
            help_ = "add the condition for a visible block: `keep any(visible for q in a, k in b)`"
            self._missing("this `round` has no `keep`", help_)
            return None
        return self._resolve(clauses[0].value)[0]
