"""`select` blocks: who decides, over what, by which score, and what is kept; every name resolved."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping
from typing import Literal as OneOf

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.attention_resolver import Clauses
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.families import family_names, joined
from attnc.spec.names.module_scopes import declare, declare_lets
from attnc.spec.names.name_resolver import Part, Selecting
from attnc.spec.names.scope import (
    DefinitionSource,
    PartSymbol,
    RangeSymbol,
    SelectionSymbol,
    SilentSymbol,
    Symbol,
)
from attnc.spec.names.worlds import World
from attnc.spec.report import DiagnosticList

_WORDS = ("per", "over", "covers", "let", "score", "from", "keep", "always")
_HOLDS = "a `select` holds `per`, `over`, `covers`, `let`, `score`, `from`, `keep`, `always`"

By = OneOf["query", "head", "batch"]


class SelectResolver:
    """One `select`. Its name is declared first, so that it may stand after what asks it."""

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
        self._statements = block.body.statements
        self._own: dict[str, Symbol] = {}
        self._outer = names
        maps = names.maps if isinstance(names, ChainMap) else [names]
        self._names: ChainMap[str, Symbol] = ChainMap(self._own, *maps)
        self._resolver = resolver
        self._report = report
        self._clauses = Clauses(self._statements, self._own, names, resolver, report)
        self._lets: list[DefinitionSource] = []
        self._per: tuple[program.Unit, ...] = ()
        self._by: By = "query"
        self._pairs = False
        self._of_queries = False
        self._key: program.Binder | OneOf["q", "k"] = "k"
        self._known_ranges: tuple[program.KeyRange, ...] | None = None

    @property
    def symbol(self) -> SelectionSymbol:
        """The symbol of the selection's name."""
        over = next(iter(self._lines("over")), None)
        together = any(_is_bare(b, "head") or _is_bare(b, "batch") for line in self._lines("per") for b in line.binders)
        pairs = over is not None and len(over.binders) > 1 and _is_bare(over.binders[0], "q")
        covers = any(item.word.id == "covers" for item in self._statements)
        is_range = over is not None and isinstance(over.binders[-1], syntax.LoopVariable) and over.binders[-1].domain
        return SelectionSymbol(
            self.name.span,
            self.name.id,
            len(self._block.binders),
            self._ranges,
            is_numbered=bool(is_range) and not covers,
            by_query=pairs or not together,
        )

    def spare(self) -> list[DefinitionSource]:
        """Its own lets."""
        return self._lets

    def selection(self) -> program.SelectionClauses | None:
        """The selection; None, and a report, where something is missing."""
        self._check_statements()
        family = self._family()
        self._lets = declare_lets(self._report, self._statements, self._own, self._outer, self._names)
        over = self._over()
        self._key = over.binder if over is not None else "q" if self._of_queries else "k"
        self._who()
        score = self._one("score", "float", "score")
        candidates = self._one("from", "exact", "from")
        keep = self._one("keep", "float", "keep")
        always = self._one("always", "exact", "always")
        covers = self._one("covers", "exact", "always")
        if score is None or keep is None:
            word = "score" if score is None else "keep"
            how = {"score": "score dot(q, k)", "keep": "keep rank < 16"}[word]
            help_ = f"say {'what ranks' if word == 'score' else 'how many stay'}: `{how}`"
            message = f"`{self.name.id}` has no `{word}`"
            self._report.error("A215", message, self.name.span, "incomplete", help=help_)
            return None
        self._check_covers(over, covers)
        if isinstance(over, program.KeyRange) and over.by_query and (self._by != "query" or self._per):
            help_ = "give all the same range, and say in `from` which of it one may choose"
            self._report.error("A406", "a range that differs from query to query", over.span, help=help_)
        row = program.AttentionClauses(
            self.name.span,
            self.name.id,
            () if candidates is None else (candidates,),
            over=over,
            per=self._per,
            family=family,
            weights=score,
        )
        return program.SelectionClauses(
            self.name.span, self.name.id, row, self._by, self._pairs, covers, keep, always, self._of_queries
        )

    # --- places ------------------------------------------------------------------------------------------------------

    def _over(self) -> program.Unit | program.KeyRange | None:
        for line in self._lines("over"):
            binders = list(line.binders)
            if len(binders) == 2 and _is_bare(binders[0], "q"):
                self._pairs = True
                binders = binders[1:]
            if len(binders) > 1:
                return self._clauses.keys(line, binders)
            self._of_queries = _is_bare(binders[0], "q")
            of_tokens = self._of_queries or _is_bare(binders[0], "k")
            return None if of_tokens else self._clauses.place(binders[0])
        return None

    def _who(self) -> None:
        """Who decides: units of queries, a head, a batch entry, or each query."""
        for line in self._lines("per"):
            for binder in line.binders:
                if isinstance(binder, syntax.UnitDecl):
                    self._unit(binder)
                elif _is_bare(binder, "q"):
                    pass
                elif _is_bare(binder, "head") or _is_bare(binder, "batch"):
                    self._by = "head" if binder.name.id == "head" else "batch"
                else:
                    help_ = "write `per q`, a unit of queries `per a = q // block`, `per head` or `per batch`"
                    self._report.error("A221", "nobody to decide", binder.span, "not of queries", help=help_)
        if self._pairs and self._by == "query":
            help_ = "say of which: `per head`, or `per batch`"
            self._report.error("A215", "pairs are ranked for all queries together", self.name.span, help=help_)
        if self._of_queries and self._by == "query":
            help_ = "say of which: `per head`, or `per batch`"
            self._report.error("A215", "queries are chosen from all of some", self.name.span, help=help_)
        if self._per and self._by != "query":
            help_ = "a unit of queries decides for its own head already"
            self._report.error("A216", f"a unit and `{self._by}` decide", self._per[0].span, help=help_)

    def _unit(self, binder: syntax.UnitDecl) -> None:
        unit = self._clauses.unit(binder, "q", is_key=False)
        if unit is not None:
            self._per += (unit,)
        if len(self._per) > 1:
            help_ = "make one list of them: `a = [q.y // 8, q.x // 8]`"
            self._report.error("A216", "two units of queries", binder.span, "again here", help=help_)

    def _check_covers(self, over: program.Unit | program.KeyRange | None, covers: program.Expr | None) -> None:
        if covers is not None and not isinstance(over, program.KeyRange):
            help_ = "leave it out: a key, or a unit, stands for its own tokens"
            self._report.error("A215", "`covers` says which keys a number stands for", covers.span, help=help_)

    # --- clauses -----------------------------------------------------------------------------------------------------

    def _one(self, word: str, world: World, part: Part) -> program.Expr | None:
        around = self._resolver.surroundings
        for clause in (s for s in self._statements if isinstance(s, syntax.ClauseStatement) and s.word.id == word):
            around.selecting = Selecting(part, self._key)
            try:
                result = self._resolver.resolve(clause.value, self._names, world=world)
            finally:
                around.selecting = None
            excess = self._resolver.measures.excess(result)
            if excess:
                self._report.error("A507", f"this line {excess.message}", clause.value.span, help=excess.help)
            return result
        return None

    def _lines(self, word: str) -> list[syntax.BinderClause]:
        return [s for s in self._statements if isinstance(s, syntax.BinderClause) and s.word.id == word]

    def _ranges(self) -> tuple[program.KeyRange, ...]:
        """The ranges of a family's names, resolved when they are first asked for."""
        if self._known_ranges is None:
            around = self._resolver.surroundings
            clause, around.selecting = around.selecting, None
            self._known_ranges = tuple(map(self._clauses.range, family_names(self._block, self._report)))
            around.selecting = clause
        return self._known_ranges

    def _family(self) -> program.KeyRange | None:
        ranges = self._ranges()
        if not ranges:
            for binder in self._block.binders:
                declare(self._report, self._own, self._outer, binder.name, SilentSymbol(binder.name.span))
            return None
        result = ranges[0]
        symbols: list[Symbol] = [RangeSymbol(ranges[0].binder.span, ranges[0].binder)]
        if len(ranges) > 1:
            result, names = joined(self.name.span, ranges)
            symbols = [PartSymbol(own.span, own) for own in names]
        for binder, symbol in zip(self._block.binders, symbols, strict=True):
            declare(self._report, self._own, self._outer, binder.name, symbol)
        return result

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._statements:
            word = item.word.id
            if word not in _WORDS:
                help_ = "what is not kept is not chosen: `from`" if word == "visible" else _HOLDS
                self._report.error("A214", f"`{word}` does not belong in a `select`", item.word.span, help=help_)
                self._silence(item)
            elif word in first and word != "let":
                also = (Label(first[word].span, "first here"),)
                self._report.error(
                    "A216", f"`{word}` is said twice", item.span, "again here", also=also, help="keep one"
                )
            first.setdefault(word, item)

    def _silence(self, item: syntax.Statement) -> None:
        if isinstance(item, syntax.DefinitionDecl | syntax.Declaration):
            self._own.setdefault(item.name.id, SilentSymbol(item.name.span))


def _is_bare(binder: syntax.Binder, name: str) -> bool:
    """Whether a binder is one of the names that places have, by itself."""
    return isinstance(binder, syntax.LoopVariable) and binder.domain is None and binder.name.id == name


__all__ = ["SelectResolver"]
