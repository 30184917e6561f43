"""Resolve the `round` block of a pattern: its units, its lets and its condition."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.builtins import FUNCTIONS, RESERVED_NAMES
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.module_scopes import declare, let_source, refuse_hiding
from attnc.spec.names.scope import DefinitionSource, DefinitionSymbol, SilentSymbol, Symbol, UnitSymbol
from attnc.spec.names.unit_resolver import EXAMPLE, resolve_unit
from attnc.spec.report import DiagnosticList
from attnc.spec.source import Span

_HOLDS = "a `round` holds one `per`, `let` lines and one `keep`"


def resolve_round(
    block: syntax.BlockStatement, names: MutableMapping[str, Symbol], resolver: Resolver, report: DiagnosticList
) -> program.RoundClause | None:
    """Return the block with its names resolved; None after an error was reported."""
    return _RoundResolver(block, names, resolver, report).resolve()


class _RoundResolver:
    def __init__(
        self,
        block: syntax.BlockStatement,
        names: MutableMapping[str, Symbol],
        resolver: Resolver,
        report: DiagnosticList,
    ) -> None:
        self._block = block
        self._resolver = resolver
        self._report = report
        self._scope: dict[str, Symbol] = {}
        self._outer_scope = names
        self._names: Mapping[str, Symbol] = ChainMap(self._scope, names)

    def resolve(self) -> program.RoundClause | None:
        self._check_statements()
        units = self._units()
        lets = list(self._lets())
        keep = self._keep()
        for source in lets:
            self._resolver.prepare(syntax.NameExpr(source.span, source.name), self._names)
            self._resolver.define(source, "exact")
        if keep is None or units is None:
            return None
        return program.RoundClause(self._block.word.span, *units, keep)

    def _check_statements(self) -> None:
        first: dict[str, Span] = {}
        for item in self._block.body.statements:
            word = item.word
            if word.id not in ("per", "let", "keep"):
                message = f"`{word.id}` does not belong in a `round`"
                self._report.error("A214", message, word.span, help=_HOLDS)
            elif word.id in first and word.id != "let":
                also = (Label(first[word.id], "first here"),)
                self._report.error(
                    "A216", f"`{word.id}` appears twice", word.span, "again here", also=also, help="keep one"
                )
            first.setdefault(word.id, word.span)

    def _missing(self, message: str, help_: str) -> None:
        self._report.error("A215", message, self._block.word.span, "incomplete", help=help_)

    # --- units -------------------------------------------------------------------------------------------------------

    def _units(self) -> tuple[program.Unit, program.Unit] | None:
        """Return the unit of queries and the unit of keys; None after an error was reported."""
        lines = [s for s in self._block.body.statements if isinstance(s, syntax.BinderClause) and s.word.id == "per"]
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
            self._scope.setdefault(binder.name.id, SilentSymbol(binder.name.span))
            return None
        unit = resolve_unit(binder, self._outer_scope, self._resolver, self._report)
        symbol = SilentSymbol(binder.name.span) if unit is None else UnitSymbol(binder.name.span, unit)
        self._declare(binder.name, symbol)
        return unit

    # --- names and condition -----------------------------------------------------------------------------------------

    def _declare(self, name: syntax.NameExpr, symbol: Symbol) -> None:
        declare(self._report, self._scope, self._outer_scope, name, symbol)

    def _lets(self) -> Iterable[DefinitionSource]:
        for item in self._block.body.statements:
            if isinstance(item, syntax.DefinitionDecl) and item.word.id == "let":
                source = let_source(item, self._names)
                self._declare(item.name, DefinitionSymbol(item.name.span, source))
                for name in item.parameters or ():
                    self._check_parameter(name)
                yield source

    def _check_parameter(self, name: syntax.NameExpr) -> None:
        if name.id in RESERVED_NAMES | FUNCTIONS:
            refuse_hiding(self._report, name)
        elif name.id in self._names:
            refuse_hiding(self._report, name, self._names[name.id].span)

    def _keep(self) -> program.Expr | None:
        clauses = [
            s for s in self._block.body.statements if isinstance(s, syntax.ClauseStatement) and s.word.id == "keep"
        ]
        if not clauses:
            help_ = "add the condition for a visible block: `keep any(visible for q in a, k in b)`"
            self._missing("this `round` has no `keep`", help_)
            return None
        line = self._resolver.resolve(clauses[0].value, self._names)
        excess = self._resolver.measures.excess(line)
        if excess:
            self._report.error("A507", f"this line {excess.message}", clauses[0].value.span, help=excess.help)
        return line
