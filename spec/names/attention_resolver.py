"""The clauses of an attention, of a pattern's body or a branch's: places, relation, score, weights, value."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import TypeVar

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.expression_resolver import ExpressionResolver, Resolver
from attnc.spec.names.families import family_of, joined, range_of
from attnc.spec.names.module_scopes import declare, declare_lets
from attnc.spec.names.scope import (
    BranchSymbol,
    DefinitionSource,
    PartSymbol,
    RangeSymbol,
    SelectionSymbol,
    SilentSymbol,
    Symbol,
    UnitSymbol,
)
from attnc.spec.names.unit_resolver import resolve_unit
from attnc.spec.names.worlds import World
from attnc.spec.report import DiagnosticList
from attnc.spec.source import Span

_T = TypeVar("_T")

PLAIN = ("visible", "score", "weights", "value", "over", "per", "let")
"""The clauses that the body of a branch may hold."""

_OWN = "it is said once, in the pattern's own body"
_WHERE = {
    **dict.fromkeys(("align", "documents", "require", "preset", "input", "learned", "tokens", "pad"), _OWN),
    **dict.fromkeys(("combine", "branch", "select", "round", "approximate"), _OWN),
    **dict.fromkeys(("covers", "from", "keep", "always"), "it belongs in a `select`"),
    "return": "it belongs in a `def`",
}


class Clauses:
    """Resolves the clauses of one body; its expressions see its `own` names and those of `outer`."""

    def __init__(
        self,
        statements: tuple[syntax.Statement, ...],
        own: dict[str, Symbol],
        outer: Mapping[str, Symbol],
        resolver: Resolver,
        report: DiagnosticList,
    ) -> None:
        self._statements = statements
        self._own = own
        self._names: Mapping[str, Symbol] = ChainMap(own, *_maps(outer))
        self._outer = outer
        self._resolver = resolver
        self._report = report

    def attend(self, name: str, at: Span, defaults: program.AttentionClauses | None = None) -> program.AttentionClauses:
        """The attention; what the body does not say is as in `defaults`. Places must be declared (`places`) before."""
        old = defaults or program.AttentionClauses(at, name, ())
        visible = self.relation()
        return replace(
            old,
            span=at,
            name=name,
            visible=visible,
            over=self._over or old.over,
            per=self._per or old.per,
            stack=self._stack or old.stack,
            score=self._one("score", "float") or old.score,
            weights=self._weights() or old.weights,
            value=self._one("value", "vector") or old.value,
        )

    # --- places ------------------------------------------------------------------------------------------------------

    _over: program.Unit | program.KeyRange | None = None
    _per: tuple[program.Unit, ...] = ()
    _stack: program.KeyRange | None = None

    def places(self) -> None:
        """Read `over` and `per`, and give their names a meaning."""
        for line in self._lines(syntax.BinderClause, "over"):
            self._over = self.key(line.binders[0]) if len(line.binders) == 1 else self.keys(line, line.binders)
        for line in self._lines(syntax.BinderClause, "per"):
            for binder in line.binders:
                self._row(binder)

    def key(self, binder: syntax.Binder) -> program.Unit | program.KeyRange | None:
        """Return the keys of a row as `over` declares them."""
        if isinstance(binder, syntax.UnitDecl):
            return self.unit(binder, "k", is_key=True)
        return self._range(binder, is_key=True)

    def place(self, binder: syntax.Binder) -> program.Unit | program.KeyRange | None:
        """Return the candidates of a `select` as `over` declares them; a range may differ from query to query."""
        if isinstance(binder, syntax.UnitDecl):
            return self.unit(binder, "k", is_key=True)
        return self._range(binder, is_key=True, by_query=True)

    def keys(self, line: syntax.BinderClause, binders: Sequence[syntax.Binder]) -> program.KeyRange | None:
        """Keys with several names, as one range of numbers that the names are parts of, the last the fastest."""
        parts = [self._ends(binder) for binder in binders]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            for binder in binders:
                self._declare(binder.name, SilentSymbol(binder.name.span))
            return None
        whole, names = joined(line.span, found)
        for binder, definition in zip(binders, names, strict=True):
            self._declare(binder.name, PartSymbol(binder.name.span, definition))
        return whole

    def _row(self, binder: syntax.Binder) -> None:
        if isinstance(binder, syntax.UnitDecl):
            unit = self.unit(binder, "q", is_key=False)
            self._per += () if unit is None else (unit,)
        elif isinstance(binder, syntax.LoopVariable) and binder.domain is None and binder.name.id == "q":
            return
        elif self._stack is not None:
            help_ = "a row is a query, and perhaps one range: `per q, i in 0 .. dk`"
            self._report.error("A216", "two ranges of rows", binder.span, "again here", help=help_)
        else:
            self._stack = self._range(binder, is_key=False)

    def unit(self, binder: syntax.UnitDecl, place: str, *, is_key: bool) -> program.Unit | None:
        """A unit of queries or of keys, whose name gets its meaning."""
        unit = resolve_unit(binder, self._names, self._resolver, self._report)
        if unit is not None and unit.place != place:
            words = ("`over` are of keys", "k // block") if is_key else ("`per` are of queries", "q // block")
            help_ = f"write `{binder.name.id} = {words[1]}`"
            self._report.error("A221", f"the units of {words[0]}", binder.value.span, "the other place", help=help_)
            unit = None
        symbol = SilentSymbol(binder.name.span) if unit is None else UnitSymbol(binder.name.span, unit, is_key)
        self._declare(binder.name, symbol)
        return unit

    def _range(self, binder: syntax.Binder, *, is_key: bool, by_query: bool = False) -> program.KeyRange | None:
        result = self._ends(binder, by_query=by_query)
        symbol = None if result is None else RangeSymbol(binder.name.span, result.binder, is_key)
        self._declare(binder.name, SilentSymbol(binder.name.span) if symbol is None else symbol)
        return result

    def _ends(self, binder: syntax.Binder, *, by_query: bool = False) -> program.KeyRange | None:
        """A name with a range that is the same for all tokens, or for those that a query may choose."""
        span = binder.span
        if not isinstance(binder, syntax.LoopVariable) or binder.domain is None:
            help_ = "give it a range: `l in 0 .. depth`; or make it a unit: `b = k // block`"
            self._report.error("A210", f"`{binder.name.id}` runs over nothing", span, "over what?", help=help_)
            return None
        result = self.range(binder)
        places = self._resolver.measures.of(result.high).places | self._resolver.measures.of(result.low).places
        if by_query and places & {"q", "k"} == {"q"}:
            return replace(result, by_query=True)
        if places & {"q", "k"}:
            unit = f"{binder.name.id} = {binder.domain.span.text}"
            help_ = f"a unit is written with `=`: `{unit}`; a range is the same for all queries"
            self._report.error("A406", "a range that differs from token to token", binder.span, help=help_)
            return None
        return result

    def range(self, item: syntax.LoopVariable) -> program.KeyRange:
        """A name with its range."""
        return range_of(item, lambda end: self._resolve(end, "exact"))

    # --- clauses -----------------------------------------------------------------------------------------------------

    def relation(self) -> tuple[program.Expr, ...]:
        """The lines of the relation, each of which the next ones may name `visible`."""
        lines = self._resolver.surroundings.visible
        first = len(lines)
        for clause in self._lines(syntax.ClauseStatement, "visible"):
            lines.append(self._resolve(clause.value, "exact"))
        return tuple(lines[first:])

    def _one(self, word: str, world: World) -> program.Expr | None:
        for clause in self._lines(syntax.ClauseStatement, word):
            return self._resolve(clause.value, world)
        return None

    def _weights(self) -> program.SoftmaxClause | program.Expr | None:
        result = self._one("weights", "float")
        if isinstance(result, program.SoftmaxShare) and result.score is None:
            return program.SoftmaxClause(result.span, result.extra)
        return result

    def _resolve(self, value: syntax.Expr, world: World) -> program.Expr:
        result = self._resolver.resolve(value, self._names, world=world)
        excess = self._resolver.measures.excess(result)
        if excess:
            self._report.error("A507", f"this line {excess.message}", value.span, help=excess.help)
            return program.Literal(value.span, True) if world == "exact" else program.ScaleRead(value.span)
        return result

    def _lines(self, kind: type[_T], word: str) -> Iterable[_T]:
        found = (s for s in self._statements if s.word.id == word)
        return [s for s in found if isinstance(s, kind)]

    def _declare(self, name: syntax.NameExpr, symbol: Symbol) -> None:
        declare(self._report, self._own, self._outer, name, symbol)


class Branch:
    """One `branch`: its names are declared first, so that it may stand before what it reads."""

    def __init__(
        self,
        block: syntax.BlockStatement,
        names: MutableMapping[str, Symbol],
        resolver: Resolver,
        report: DiagnosticList,
    ) -> None:
        assert block.name is not None
        self.name = block.name
        self._block = block
        self._own: dict[str, Symbol] = {}
        self._outer = names
        self._names: ChainMap[str, Symbol] = ChainMap(self._own, *_maps(names))
        self._resolver = resolver
        self._report = report
        self._lets: list[DefinitionSource] = []

    @property
    def symbol(self) -> BranchSymbol:
        """The symbol of the branch's name."""
        return BranchSymbol(self.name.span, self.name.id, bool(self._block.binders))

    def attend(self, defaults: program.AttentionClauses) -> program.AttentionClauses:
        """The attention of the branch; the pattern's clauses are its defaults."""
        self._check_statements()
        statements = self._block.body.statements
        clauses = Clauses(statements, self._own, self._outer, self._resolver, self._report)
        family, chosen = self._family(clauses)
        self._lets = declare_lets(self._report, statements, self._own, self._outer, self._names)
        clauses.places()
        around = self._resolver.surroundings
        before = list(around.visible)
        found = clauses.attend(self.name.id, self.name.span, defaults)
        around.visible[:] = before
        return replace(found, family=family, visible=(*chosen, *found.visible))

    def spare(self) -> list[DefinitionSource]:
        """Its own lets."""
        return self._lets

    def _family(self, clauses: Clauses) -> tuple[program.KeyRange | None, tuple[program.Expr, ...]]:
        """The range of a family, and what says that a member is there."""
        first = family_of(self._block, self._report)
        if first is None:
            return None, ()
        base = first.domain.base if isinstance(first.domain, syntax.IndexExpr) else first.domain
        symbol = self._names.get(base.id) if isinstance(base, syntax.NameExpr) else None
        if not isinstance(symbol, SelectionSymbol):
            found = clauses.range(first)
            declare(self._report, self._own, self._outer, first.name, RangeSymbol(first.name.span, found.binder))
            return found, ()
        assert isinstance(first.domain, syntax.NameExpr | syntax.IndexExpr)
        binder = program.Binder(first.name.span, first.name.id)
        names = ExpressionResolver(self._resolver, self._names, {})
        place = names.chosen_place(binder, first.domain, symbol)
        known = SilentSymbol(first.name.span) if place is None else RangeSymbol(first.name.span, binder)
        declare(self._report, self._own, self._outer, first.name, known)
        if place is None:
            return None, ()
        found = replace(place.over, span=first.span, binder=binder)
        return found, (place.is_chosen(first.span),)

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._block.body.statements:
            word = item.word.id
            if word not in PLAIN:
                help_ = _WHERE.get(word, "a branch holds `visible`, `score`, `weights`, `value`, `over`, `per`, `let`")
                self._report.error("A214", f"`{word}` does not belong in a `branch`", item.word.span, help=help_)
            elif word in first and word not in ("visible", "let"):
                also = (Label(first[word].span, "first here"),)
                self._report.error(
                    "A216", f"`{word}` is said twice", item.span, "again here", also=also, help="keep one"
                )
            first.setdefault(word, item)


def _maps(names: Mapping[str, Symbol]) -> list[MutableMapping[str, Symbol]]:
    return list(names.maps) if isinstance(names, ChainMap) else [names]  # type: ignore[list-item]  # a dict
