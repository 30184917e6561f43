"""Resolve `select` blocks: rows, candidates, score, and the conditions of what is kept."""

from __future__ import annotations

from collections import ChainMap
from typing import Literal as OneOf

from attnc.spec import program, syntax
from attnc.spec.names.attention_resolver import Clauses
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.families import family_names, joined
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

_WORDS = ("per", "over", "covers", "let", "score", "from", "keep", "always")
_HOLDS = "a `select` holds `per`, `over`, `covers`, `let`, `score`, `from`, `keep`, `always`"

By = OneOf["query", "head", "batch"]


class SelectResolver(Clauses):
    """Resolves one `select`. Its name is declared first, so that expressions above the block may read it."""

    def __init__(
        self,
        block: syntax.BlockStatement,
        names: ChainMap[str, Symbol],
        resolver: Resolver,
    ) -> None:
        super().__init__(block.body.statements, names.new_child(), resolver)
        assert block.name is not None
        self.name = block.name
        self.lets: list[DefinitionSource] = []
        self._block = block
        self._by: By = "query"
        self._pairs = False
        self._of_queries = False
        self._key: program.Binder | OneOf["q", "k"] = "k"
        self._family_ranges: tuple[program.KeyRange, ...] | None = None

    @property
    def symbol(self) -> SelectionSymbol:
        """Return the symbol of the selection's name."""
        over = next(iter(self._lines(syntax.BinderClause, "over")), None)
        together = any(
            _is_bare(b, "head") or _is_bare(b, "batch")
            for line in self._lines(syntax.BinderClause, "per")
            for b in line.binders
        )
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

    def selection(self) -> program.SelectionClauses | None:
        """Return the selection; None after an error about a missing clause was reported."""
        self._check_statements()
        family = self._family()
        self.lets = self._declare_lets()
        over = self._candidates()
        self._key = over.binder if over is not None else "q" if self._of_queries else "k"
        self._rows()
        score = self._part("score", "float", "score")
        candidates = self._part("from", "exact", "from")
        keep = self._part("keep", "float", "keep")
        always = self._part("always", "exact", "always")
        covers = self._part("covers", "exact", "always")
        if score is None or keep is None:
            word = "score" if score is None else "keep"
            example = {"score": "score dot(q, k)", "keep": "keep rank < 16"}[word]
            help_ = f"add {'what ranks the candidates' if word == 'score' else 'which candidates stay'}: `{example}`"
            message = f"`{self.name.id}` has no `{word}`"
            self._report.error("A215", message, self.name.span, "incomplete", help=help_)
            return None
        self._check_covers(over, covers)
        if isinstance(over, program.KeyRange) and over.by_query and (self._by != "query" or self._per):
            help_ = "use one range for all queries, and restrict the candidates with `from`"
            message = "this range differs from query to query, and the queries select together"
            self._report.error("A406", message, over.span, help=help_)
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

    def _candidates(self) -> program.Unit | program.KeyRange | None:
        for line in self._lines(syntax.BinderClause, "over"):
            binders = list(line.binders)
            if len(binders) == 2 and _is_bare(binders[0], "q"):
                self._pairs = True
                binders = binders[1:]
            if len(binders) > 1:
                return self.keys(line, binders)
            self._of_queries = _is_bare(binders[0], "q")
            is_plain = self._of_queries or _is_bare(binders[0], "k")
            return None if is_plain else self.place(binders[0])
        return None

    def _rows(self) -> None:
        """Resolve `per`: a row is a unit of queries, a head, a batch entry, or by default a query."""
        for line in self._lines(syntax.BinderClause, "per"):
            for binder in line.binders:
                if isinstance(binder, syntax.UnitDecl):
                    self._unit(binder)
                elif _is_bare(binder, "q"):
                    pass
                elif _is_bare(binder, "head") or _is_bare(binder, "batch"):
                    self._by = "head" if binder.name.id == "head" else "batch"
                else:
                    help_ = "write `per q`, a unit of queries `per a = q // block`, `per head` or `per batch`"
                    message = "`per` must name the rows of the selection"
                    self._report.error("A221", message, binder.span, "not a row", help=help_)
        if self._pairs and self._by == "query":
            help_ = "add `per head`, or `per batch`"
            message = "a ranking of pairs of queries and keys needs `per head` or `per batch`"
            self._report.error("A215", message, self.name.span, help=help_)
        if self._of_queries and self._by == "query":
            help_ = "add `per head`, or `per batch`"
            message = "a selection of queries needs `per head` or `per batch`"
            self._report.error("A215", message, self.name.span, help=help_)
        if self._per and self._by != "query":
            help_ = f"remove `{self._by}`: a unit of queries selects separately in each head already"
            message = f"`per` has both a unit and `{self._by}`"
            self._report.error("A216", message, self._per[0].span, help=help_)

    def _unit(self, binder: syntax.UnitDecl) -> None:
        unit = self.unit(binder, "q", is_key=False)
        if unit is not None:
            self._per += (unit,)
        if len(self._per) > 1:
            help_ = "combine them in one list: `a = [q.y // 8, q.x // 8]`"
            self._report.error("A216", "two units of queries", binder.span, "again here", help=help_)

    def _check_covers(self, over: program.Unit | program.KeyRange | None, covers: program.Expr | None) -> None:
        if covers is not None and not isinstance(over, program.KeyRange):
            help_ = "remove it: a key or a unit covers its own tokens"
            self._report.error("A215", "`covers` needs a range in `over`", covers.span, help=help_)

    # --- clauses -----------------------------------------------------------------------------------------------------

    def _part(self, word: str, world: World, part: Part) -> program.Expr | None:
        surroundings = self._resolver.surroundings
        for clause in self._clauses(word):
            surroundings.selecting = Selecting(part, self._key)
            try:
                return self._resolve(clause.value, world)[0]
            finally:
                surroundings.selecting = None
        return None

    def _ranges(self) -> tuple[program.KeyRange, ...]:
        """Return the ranges of a family's names, resolved at the first call."""
        if self._family_ranges is None:
            surroundings = self._resolver.surroundings
            clause, surroundings.selecting = surroundings.selecting, None
            self._family_ranges = tuple(map(self.range, family_names(self._block, self._report)))
            surroundings.selecting = clause
        return self._family_ranges

    def _family(self) -> program.KeyRange | None:
        ranges = self._ranges()
        if not ranges:
            for binder in self._block.binders:
                self._declare(binder.name, SilentSymbol(binder.name.span))
            return None
        result = ranges[0]
        symbols: list[Symbol] = [RangeSymbol(ranges[0].binder.span, ranges[0].binder)]
        if len(ranges) > 1:
            result, names = joined(self.name.span, ranges)
            symbols = [PartSymbol(definition.span, definition) for definition in names]
        for binder, symbol in zip(self._block.binders, symbols, strict=True):
            self._declare(binder.name, symbol)
        return result

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._statements:
            word = item.word.id
            if word not in _WORDS:
                help_ = "state the candidates with `from`" if word == "visible" else _HOLDS
                self._report.error("A214", f"`{word}` does not belong in a `select`", item.word.span, help=help_)
                self._silence(item)
            elif word in first and word != "let":
                self._refuse_twice(word, item.span, first[word].span)
            first.setdefault(word, item)

    def _silence(self, item: syntax.Statement) -> None:
        if isinstance(item, syntax.DefinitionDecl | syntax.Declaration):
            self._names.maps[0].setdefault(item.name.id, SilentSymbol(item.name.span))


def _is_bare(binder: syntax.Binder, name: str) -> bool:
    """Whether a binder is `name` without a range: `q`, `k`, `head` or `batch`."""
    return isinstance(binder, syntax.LoopVariable) and binder.domain is None and binder.name.id == name
