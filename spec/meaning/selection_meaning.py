"""Selections by definition: candidates ranked one by one, ties to the earlier position."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, cast

from attnc.spec import program
from attnc.spec.checks.attention_clauses import same_keys
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.attention_rows import AttentionRow
from attnc.spec.meaning.denotation import EvaluationFrame, Meaning, Result, constantly

if TYPE_CHECKING:
    from attnc.spec.meaning.evaluate import Evaluator, SequenceView

Places = frozenset[Any]
"""Positions of keys, values of units, or numbers."""


class Selections:
    """The selections of one call; what a row chooses is worked out once."""

    def __init__(self, call: Evaluator) -> None:
        self._call = call
        self._by_name = {selection.name: selection for selection in call.program.selections}
        self._known: dict[Hashable, Places] = {}
        self._open: set[Hashable] = set()

    def holds(
        self,
        node: program.SelectedTest,
        member: int | None,
        item: int | None,
        frame: EvaluationFrame,
        view: SequenceView,
    ) -> bool:
        """Whether the row of a frame chose the token at a position, all tokens of the unit at hand, or a number."""
        if node.number is not None:
            return item in self.chosen(self._by_name[node.selection], member, frame, view)
        if node.unit is None:
            assert item is not None
            return self._has(node.selection, member, item, frame, view)
        return all(self._has(node.selection, member, j, frame, view) for j in view.members(node.unit, frame))

    def size(self, name: str, member: int | None, frame: EvaluationFrame, view: SequenceView) -> int:
        """How many places the row of a frame chose."""
        return len(self.chosen(self._by_name[name], member, frame, view))

    def _has(self, name: str, member: int | None, item: int, frame: EvaluationFrame, view: SequenceView) -> bool:
        selection = self._by_name[name]
        chosen = self.chosen(selection, member, frame, view)
        match selection.row.over:
            case None:
                return item in chosen
            case program.Unit(value=value):
                here = _of_member(selection, member, frame.at("k", item))
                return self._call.meanings.of(value)(here) in chosen
            case program.KeyRange() if selection.covers is None:
                return item in chosen
            case program.KeyRange(binder=binder):
                covers = self._call.meanings.of(selection.covers)
                here = _of_member(selection, member, frame.at("k", item))
                return any(covers(here.binding(binder, constantly(i)).forgetting()) for i in sorted(chosen))

    def chosen(
        self, selection: program.SelectionClauses, member: int | None, frame: EvaluationFrame, view: SequenceView
    ) -> Places:
        """Return the selection of a frame's row."""
        decides = self._decides(selection, frame)
        key = (selection.name, member, view, frame.batch, None if selection.by == "batch" else frame.head, decides)
        if key not in self._known:
            self._check_member(selection, member, frame)
            if key in self._open:
                name = selection.name if member is None else f"{selection.name}[{member}]"
                help_ = "ask another member, of which the index is nearer to an end: `stage[s - 1]`"
                raise EvaluationError("A205", f"what `{name}` chooses depends on itself", selection.span, help_)
            self._open.add(key)
            if selection.pairs:
                self._rank_pairs(selection, member, frame, view, key[:-1])
            else:
                row = self._row(selection, member, frame, view, decides)
                self._known[key] = _kept(self._call, [row])[0]
        return self._known[key]

    def _check_member(self, selection: program.SelectionClauses, member: int | None, frame: EvaluationFrame) -> None:
        if selection.family is None or member is None:
            return
        low, high = (self._call.meanings.of(end)(frame) for end in (selection.family.low, selection.family.high))
        if not cast("int", low) <= member < cast("int", high):
            message = f"`{selection.name}` is asked at {member}; it has selections {low} to {cast('int', high) - 1}"
            raise EvaluationError("A902", message, selection.span, "test the index first: `… if i < n else …`")

    def _decides(self, selection: program.SelectionClauses, frame: EvaluationFrame) -> Result | None:
        """The query, or the unit of queries, that decides at a frame; None for a head or a batch entry."""
        if selection.row.per:
            (unit,) = selection.row.per
            around = frame.row
            own = around.unit_like(unit) if isinstance(around, CandidateRow) else None
            return self._call.meanings.of(unit.value)(frame) if own is None else frame.bound[own.binder](frame)
        return frame.places["q"] if selection.by == "query" or selection.pairs else None

    def _row(
        self,
        selection: program.SelectionClauses,
        member: int | None,
        frame: EvaluationFrame,
        view: SequenceView,
        decides: Result | None,
    ) -> CandidateRow:
        q = decides if isinstance(decides, int) and not selection.row.per else 0
        own = view.frame(q, 0, frame.head, frame.batch)
        own = _of_member(selection, member, own)
        for unit in selection.row.per:
            own = own.binding(unit.binder, constantly(cast("Any", decides)))
        return CandidateRow(self._call, selection, view, own)

    def _rank_pairs(
        self,
        selection: program.SelectionClauses,
        member: int | None,
        frame: EvaluationFrame,
        view: SequenceView,
        key: tuple[Hashable, ...],
    ) -> None:
        """All rows at once."""
        queries = range(view.shift, view.shift + view.queries)
        rows = [self._row(selection, member, frame, view, q) for q in queries]
        for q, chosen in zip(queries, _kept(self._call, rows), strict=True):
            name: Hashable = (*key, q)
            self._known[name] = chosen


def _of_member(selection: program.SelectionClauses, member: int | None, frame: EvaluationFrame) -> EvaluationFrame:
    """A frame in which the name of a family's range is the member at hand."""
    if selection.family is None or member is None:
        return frame
    return frame.binding(selection.family.binder, constantly(member)).forgetting()


class CandidateRow(AttentionRow):
    """The candidates of one row: an attention to them, whose weights are their scores."""

    def __init__(
        self, call: Evaluator, selection: program.SelectionClauses, view: SequenceView, frame: EvaluationFrame
    ) -> None:
        self.selection = selection
        self.ranks: dict[Any, tuple[int, float]] = {}
        super().__init__(call, selection.row, view, frame)
        self.scores = dict(zip(map(self.name_of, self.keys), self.weights(), strict=True))

    def _places(self, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
        if isinstance(self.selection.row.over, program.Unit):
            for value in sorted(self._view.units(self.selection.row.over, frame)):
                yield self._with_key(frame, value)
            return
        if not self.selection.of_queries:
            yield from super()._places(frame)
            return
        for query in range(self._view.shift, self._view.shift + self._view.queries):
            yield frame.at("q", query)

    def name_of(self, frame: EvaluationFrame) -> Any:
        """Return the identity of a candidate."""
        return frame.places["q"] if self.selection.of_queries else super().name_of(frame)

    def _with_key(self, frame: EvaluationFrame, key: Any) -> EvaluationFrame:
        return frame.at("q", key) if self.selection.of_queries else super()._with_key(frame, key)

    def _sees(self, frame: EvaluationFrame) -> bool:
        return all(self._call.meanings.of(line)(frame) for line in self._attend.visible)

    def ranking(self, frame: EvaluationFrame, name: str) -> Result:
        """`rank`, `mass` or `score` of a frame's candidate."""
        place = self.name_of(frame)
        if name == "score":
            result: float = self.scores[place]
            return result
        rank, mass = self.ranks[place]
        return rank if name == "rank" else mass

    def unit_like(self, unit: program.Unit) -> program.Unit | None:
        """The unit of queries that decides here, where it is written as another one is."""
        return next((own for own in self._attend.per if same_keys(own, unit)), None)

    def always(self) -> Iterator[Any]:
        """The places that are chosen besides."""
        if self.selection.always is None:
            return
        meaning: Meaning = self._call.meanings.of(self.selection.always)
        for place in self._places(self._frame):
            self._call.steps = 0
            if meaning(place):
                yield self.name_of(place)


def _kept(call: Evaluator, rows: list[CandidateRow]) -> list[Places]:
    """Return the selections of rows whose candidates are ranked together."""
    found = [(score, row, place) for row in rows for place, score in row.scores.items()]
    order = sorted(range(len(found)), key=lambda i: (math.isnan(found[i][0]), -found[i][0], i))
    mass = 0.0
    for rank, i in enumerate(order):
        score, row, place = found[i]
        row.ranks[place] = (rank, mass)
        mass += score
    chosen = []
    for row in rows:
        keep = call.meanings.of(row.selection.keep)
        kept = set(row.always())
        for key in row.keys:
            call.steps = 0
            if keep(key):
                kept.add(row.name_of(key))
        chosen.append(frozenset(kept))
    return chosen


__all__ = ["CandidateRow", "Selections"]
