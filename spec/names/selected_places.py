"""Names that iterate over a selection, `s in spans`, with `k in s` and `s.score`."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.spec import program
from attnc.spec.source import Span


@dataclass(frozen=True, slots=True, eq=False)
class SelectedPlace:
    """A name that iterates over a selection from a range; its value is the index of the selected entry.

    `member` is the index of the selection in its family.
    """

    selection: program.SelectionClauses
    over: program.KeyRange
    binder: program.Binder
    member: program.Expr | None
    by_query: bool

    def is_selected(self, span: Span) -> program.Expr:
        """Return the test whether the current row selected the entry."""
        number = program.Local(span, self.binder)
        return program.SelectedTest(span, self.selection.name, None, None, self.member, self.by_query, number)

    def holds(self, span: Span) -> program.Expr | None:
        """Return the test whether the entry covers the current key; None for a selection without `covers`."""
        covers = self.selection.covers
        return None if covers is None else self._clause(span, "covers", covers)

    def score(self, span: Span) -> program.Expr:
        """Return the score of the entry."""
        assert isinstance(self.selection.row.weights, program.Expr)
        return self._clause(span, "score", self.selection.row.weights)

    def _clause(self, span: Span, name: str, body: program.Expr) -> program.Expr:
        """Return a clause of the selection, evaluated for this entry."""
        family = self.selection.family
        parameters = (self.over.binder, *(() if family is None else (family.binder,)))
        arguments: tuple[program.Expr, ...] = (program.Local(span, self.binder),)
        arguments += () if self.member is None else (self.member,)
        return program.DefinitionUse(span, program.Definition(body.span, name, parameters, body), arguments)


__all__ = ["SelectedPlace"]
