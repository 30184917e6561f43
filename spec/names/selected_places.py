"""Names that run over what a row chose: `s in spans`, with `k in s` and `s.score`."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.spec import program
from attnc.spec.source import Span


@dataclass(frozen=True, slots=True, eq=False)
class SelectedPlace:
    """A place of a selection over a range, as a name: its number. `member`: which selection of a family."""

    selection: program.SelectionClauses
    over: program.KeyRange
    binder: program.Binder
    member: program.Expr | None
    by_query: bool

    def is_chosen(self, span: Span) -> program.Expr:
        """Whether the row at hand chose it."""
        number = program.Local(span, self.binder)
        return program.SelectedTest(span, self.selection.name, None, None, self.member, self.by_query, number)

    def holds(self, span: Span) -> program.Expr | None:
        """Whether the key at hand is one that it stands for; None where it stands for none."""
        covers = self.selection.covers
        return None if covers is None else self._of(span, "covers", covers)

    def score(self, span: Span) -> program.Expr:
        """Its score."""
        assert isinstance(self.selection.row.weights, program.Expr)
        return self._of(span, "score", self.selection.row.weights)

    def _of(self, span: Span, name: str, body: program.Expr) -> program.Expr:
        """A clause of the selection, with this place for its own."""
        family = self.selection.family
        names = (self.over.binder, *(() if family is None else (family.binder,)))
        given: tuple[program.Expr, ...] = (program.Local(span, self.binder),)
        given += () if self.member is None else (self.member,)
        return program.DefinitionUse(span, program.Definition(body.span, name, names, body), given)


__all__ = ["SelectedPlace"]
