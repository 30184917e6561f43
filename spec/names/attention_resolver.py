"""Resolve the clauses of an attention, in the body of a pattern or a branch: rows, keys, relation, score, value."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from attnc.spec import program, syntax
from attnc.spec.names.bodies import BodyResolver, resolve_unit
from attnc.spec.names.expression_resolver import ExpressionResolver, Resolver
from attnc.spec.names.families import family_of, joined, range_of
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
from attnc.spec.names.worlds import World
from attnc.spec.source import Span

_T = TypeVar("_T")

PLAIN = ("visible", "score", "weights", "value", "over", "per", "let")
"""The clauses that the body of a branch may hold."""

_PATTERN_BODY = "it belongs in the pattern's own body"
_HOME_OF = {
    **dict.fromkeys(("align", "documents", "require", "preset", "input", "learned", "tokens", "pad"), _PATTERN_BODY),
    **dict.fromkeys(("combine", "branch", "select", "round", "approximate"), _PATTERN_BODY),
    **dict.fromkeys(("covers", "from", "keep", "always"), "it belongs in a `select`"),
    "return": "it belongs in a `def`",
}


class Clauses(BodyResolver):
    """Resolves the clauses of an attention in one body."""

    def attend(self, name: str, at: Span, defaults: program.AttentionClauses | None = None) -> program.AttentionClauses:
        """Return the attention; `defaults` gives missing clauses. Call `places` before, to declare rows and keys."""
        base = defaults or program.AttentionClauses(at, name, ())
        visible = self.relation()
        return replace(
            base,
            span=at,
            name=name,
            visible=visible,
            over=self._over or base.over,
            per=self._per or base.per,
            stack=self._stack or base.stack,
            score=self._clause("score", "float") or base.score,
            weights=self._weights() or base.weights,
            value=self._clause("value", "vector") or base.value,
        )

    # --- places ------------------------------------------------------------------------------------------------------

    _over: program.Unit | program.KeyRange | None = None
    _per: tuple[program.Unit, ...] = ()
    _stack: program.KeyRange | None = None

    def places(self) -> None:
        """Resolve `over` and `per`, and declare their names."""
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
        """Return keys with several names as one flat range, the last name varying fastest."""
        parts = [self._key_range(binder) for binder in binders]
        ranges = [part for part in parts if part is not None]
        if len(ranges) < len(parts):
            for binder in binders:
                self._declare(binder.name, SilentSymbol(binder.name.span))
            return None
        flat, names = joined(line.span, ranges)
        for binder, definition in zip(binders, names, strict=True):
            self._declare(binder.name, PartSymbol(binder.name.span, definition))
        return flat

    def _row(self, binder: syntax.Binder) -> None:
        if isinstance(binder, syntax.UnitDecl):
            unit = self.unit(binder, "q", is_key=False)
            self._per += () if unit is None else (unit,)
        elif isinstance(binder, syntax.LoopVariable) and binder.domain is None and binder.name.id == "q":
            return
        elif self._stack is not None:
            help_ = "use at most one range: `per q, i in 0 .. dk`"
            self._report.error("A216", "`per` has two ranges", binder.span, "again here", help=help_)
        else:
            self._stack = self._range(binder, is_key=False)

    def unit(self, binder: syntax.UnitDecl, place: str, *, is_key: bool) -> program.Unit | None:
        """Return a unit of queries or keys, and declare its name; None where it is of the wrong place."""
        unit = resolve_unit(binder, self._names, self._resolver)
        if unit is not None and unit.place != place:
            clause, tokens = ("over", "keys") if is_key else ("per", "queries")
            help_ = f"write `{binder.name.id} = {'k' if is_key else 'q'} // block`"
            message = f"`{clause}` needs units of {tokens}"
            self._report.error("A221", message, binder.value.span, f"not a unit of {tokens}", help=help_)
            unit = None
        symbol = SilentSymbol(binder.name.span) if unit is None else UnitSymbol(binder.name.span, unit, is_key)
        self._declare(binder.name, symbol)
        return unit

    def _range(self, binder: syntax.Binder, *, is_key: bool, by_query: bool = False) -> program.KeyRange | None:
        result = self._key_range(binder, by_query=by_query)
        symbol = None if result is None else RangeSymbol(binder.name.span, result.binder, is_key)
        self._declare(binder.name, SilentSymbol(binder.name.span) if symbol is None else symbol)
        return result

    def _key_range(self, binder: syntax.Binder, *, by_query: bool = False) -> program.KeyRange | None:
        """Return a name with its range, which may depend on the query only with `by_query`."""
        span = binder.span
        if not isinstance(binder, syntax.LoopVariable) or binder.domain is None:
            help_ = "give it a range: `l in 0 .. depth`; or make it a unit: `b = k // block`"
            self._report.error("A210", f"`{binder.name.id}` has no range", span, "over what?", help=help_)
            return None
        result = self.range(binder)
        places = self._resolver.measures.of(result.high).places | self._resolver.measures.of(result.low).places
        if by_query and places & {"q", "k"} == {"q"}:
            return replace(result, by_query=True)
        if places & {"q", "k"}:
            unit = f"{binder.name.id} = {binder.domain.span.text}"
            help_ = f"write `{unit}` for a unit; a range must be the same for all queries"
            self._report.error("A406", "this range differs from token to token", binder.span, help=help_)
            return None
        return result

    def range(self, item: syntax.LoopVariable) -> program.KeyRange:
        """Return a name with its range."""
        return range_of(item, self._line)

    # --- clauses -----------------------------------------------------------------------------------------------------

    def relation(self) -> tuple[program.Expr, ...]:
        """Return the lines of the relation; a line may read the lines before it as `visible`."""
        lines = self._resolver.surroundings.visible
        first = len(lines)
        for clause in self._clauses("visible"):
            lines.append(self._line(clause.value))
        return tuple(lines[first:])

    def _clause(self, word: str, world: World) -> program.Expr | None:
        for clause in self._clauses(word):
            return self._line(clause.value, world)
        return None

    def _weights(self) -> program.SoftmaxClause | program.Expr | None:
        result = self._clause("weights", "float")
        if isinstance(result, program.SoftmaxShare) and result.score is None:
            return program.SoftmaxClause(result.span, result.extra)
        return result

    def _line(self, value: syntax.Expr, world: World = "exact") -> program.Expr:
        result, fits = self._resolve(value, world)
        refused = program.Literal(value.span, True) if world == "exact" else program.ScaleRead(value.span)
        return result if fits else refused


class Branch(Clauses):
    """Resolves one `branch`. Its name is declared first, so that expressions above the branch may read it."""

    def __init__(self, block: syntax.BlockStatement, names: ChainMap[str, Symbol], resolver: Resolver) -> None:
        super().__init__(block.body.statements, names.new_child(), resolver)
        assert block.name is not None
        self.name = block.name
        self.lets: list[DefinitionSource] = []
        self._block = block

    @property
    def symbol(self) -> BranchSymbol:
        """Return the symbol of the branch's name."""
        return BranchSymbol(self.name.span, self.name.id, bool(self._block.binders))

    def attention(self, defaults: program.AttentionClauses) -> program.AttentionClauses:
        """Return the attention of the branch; the pattern's clauses are its defaults."""
        self._check_statements()
        family, membership = self._family()
        self.lets = self._declare_lets()
        self.places()
        surroundings = self._resolver.surroundings
        relation_so_far = list(surroundings.visible)
        attention = self.attend(self.name.id, self.name.span, defaults)
        surroundings.visible[:] = relation_so_far
        return replace(attention, family=family, visible=(*membership, *attention.visible))

    def _family(self) -> tuple[program.KeyRange | None, tuple[program.Expr, ...]]:
        """Return the range of a family, and the conditions under which a member exists."""
        variable = family_of(self._block, self._report)
        if variable is None:
            return None, ()
        base = variable.domain.base if isinstance(variable.domain, syntax.IndexExpr) else variable.domain
        symbol = self._names.get(base.id) if isinstance(base, syntax.NameExpr) else None
        if not isinstance(symbol, SelectionSymbol):
            key_range = self.range(variable)
            self._declare(variable.name, RangeSymbol(variable.name.span, key_range.binder))
            return key_range, ()
        assert isinstance(variable.domain, syntax.NameExpr | syntax.IndexExpr)
        binder = program.Binder(variable.name.span, variable.name.id)
        expressions = ExpressionResolver(self._resolver, self._names, {})
        entry = expressions.iterate_selection(binder, variable.domain, symbol)
        name_symbol = SilentSymbol(variable.name.span) if entry is None else RangeSymbol(variable.name.span, binder)
        self._declare(variable.name, name_symbol)
        if entry is None:
            return None, ()
        key_range = replace(entry.over, span=variable.span, binder=binder)
        return key_range, (entry.is_selected(variable.span),)

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._statements:
            word = item.word.id
            if word not in PLAIN:
                help_ = _HOME_OF.get(
                    word, "a branch holds `visible`, `score`, `weights`, `value`, `over`, `per`, `let`"
                )
                self._report.error("A214", f"`{word}` does not belong in a `branch`", item.word.span, help=help_)
            elif word in first and word not in ("visible", "let"):
                self._refuse_twice(word, item.span, first[word].span)
            first.setdefault(word, item)
