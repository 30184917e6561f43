"""Compute selections directly from the definition: rank all candidates; equal scores are ranked by position."""

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
"""Selected entries: positions of keys, values of units, or indices of a range."""


class Selections:
    """The selections of one call; the selection of a row is computed once."""

    def __init__(self, call: Evaluator) -> None:
        self._call = call
        self._by_name = {selection.name: selection for selection in call.program.selections}
        self._selected: dict[Hashable, Places] = {}
        self._in_progress: set[Hashable] = set()

    def holds(
        self,
        node: program.SelectedTest,
        member: int | None,
        item: int | None,
        frame: EvaluationFrame,
        view: SequenceView,
    ) -> bool:
        """Whether the row of a frame selected a token, all tokens of the current unit, or an index of a range."""
        if node.number is not None:
            return item in self.chosen(self._by_name[node.selection], member, frame, view)
        if node.unit is None:
            assert item is not None
            return self._has(node.selection, member, item, frame, view)
        return all(self._has(node.selection, member, j, frame, view) for j in view.members(node.unit, frame))

    def size(self, name: str, member: int | None, frame: EvaluationFrame, view: SequenceView) -> int:
        """Return the number of entries that the row of a frame selected."""
        return len(self.chosen(self._by_name[name], member, frame, view))

    def _has(self, name: str, member: int | None, item: int, frame: EvaluationFrame, view: SequenceView) -> bool:
        selection = self._by_name[name]
        chosen = self.chosen(selection, member, frame, view)
        match selection.row.over:
            case None:
                return item in chosen
            case program.Unit(value=value):
                key_frame = _member_frame(selection, member, frame.at("k", item))
                return self._call.meanings.of(value)(key_frame) in chosen
            case program.KeyRange() if selection.covers is None:
                return item in chosen
            case program.KeyRange(binder=binder):
                covers = self._call.meanings.of(selection.covers)
                key_frame = _member_frame(selection, member, frame.at("k", item))
                return any(covers(key_frame.binding(binder, constantly(i)).forgetting()) for i in sorted(chosen))

    def chosen(
        self, selection: program.SelectionClauses, member: int | None, frame: EvaluationFrame, view: SequenceView
    ) -> Places:
        """Return the selection of a frame's row."""
        row_key = self._row_key(selection, frame)
        key = (selection.name, member, view, frame.batch, None if selection.by == "batch" else frame.head, row_key)
        if key not in self._selected:
            self._check_member(selection, member, frame)
            if key in self._in_progress:
                name = selection.name if member is None else f"{selection.name}[{member}]"
                help_ = "read a member whose index is nearer to one end of the family: `stage[s - 1]`"
                raise EvaluationError("A205", f"the selection `{name}` depends on itself", selection.span, help_)
            self._in_progress.add(key)
            if selection.pairs:
                self._rank_pairs(selection, member, frame, view, key[:-1])
            else:
                row = self._row(selection, member, frame, view, row_key)
                self._selected[key] = _kept(self._call, [row])[0]
        return self._selected[key]

    def _check_member(self, selection: program.SelectionClauses, member: int | None, frame: EvaluationFrame) -> None:
        if selection.family is None or member is None:
            return
        low, high = (self._call.meanings.of(end)(frame) for end in (selection.family.low, selection.family.high))
        if not cast("int", low) <= member < cast("int", high):
            message = f"`{selection.name}` is read at {member}; it has selections {low} to {cast('int', high) - 1}"
            raise EvaluationError("A902", message, selection.span, "test the index first: `… if i < n else …`")

    def _row_key(self, selection: program.SelectionClauses, frame: EvaluationFrame) -> Result | None:
        """Return the query or the unit of queries whose selection a frame reads; None for a head or a batch entry."""
        if selection.row.per:
            (unit,) = selection.row.per
            row = frame.row
            row_unit = row.unit_like(unit) if isinstance(row, CandidateRow) else None
            return (
                self._call.meanings.of(unit.value)(frame) if row_unit is None else frame.bound[row_unit.binder](frame)
            )
        return frame.places["q"] if selection.by == "query" or selection.pairs else None

    def _row(
        self,
        selection: program.SelectionClauses,
        member: int | None,
        frame: EvaluationFrame,
        view: SequenceView,
        row_key: Result | None,
    ) -> CandidateRow:
        q = row_key if isinstance(row_key, int) and not selection.row.per else 0
        row_frame = view.frame(q, 0, frame.head, frame.batch)
        row_frame = _member_frame(selection, member, row_frame)
        for unit in selection.row.per:
            row_frame = row_frame.binding(unit.binder, constantly(cast("Any", row_key)))
        return CandidateRow(self._call, selection, view, row_frame)

    def _rank_pairs(
        self,
        selection: program.SelectionClauses,
        member: int | None,
        frame: EvaluationFrame,
        view: SequenceView,
        key: tuple[Hashable, ...],
    ) -> None:
        """Rank the candidates of all rows together, and store the selection of each row."""
        queries = range(view.shift, view.shift + view.queries)
        rows = [self._row(selection, member, frame, view, q) for q in queries]
        for q, selected in zip(queries, _kept(self._call, rows), strict=True):
            name: Hashable = (*key, q)
            self._selected[name] = selected


def _member_frame(selection: program.SelectionClauses, member: int | None, frame: EvaluationFrame) -> EvaluationFrame:
    """Return a frame in which the index of a family is bound to `member`."""
    if selection.family is None or member is None:
        return frame
    return frame.binding(selection.family.binder, constantly(member)).forgetting()


class CandidateRow(AttentionRow):
    """The candidates of one row, as an attention whose keys are the candidates and whose weights are their scores."""

    def __init__(
        self, call: Evaluator, selection: program.SelectionClauses, view: SequenceView, frame: EvaluationFrame
    ) -> None:
        self.selection = selection
        self.ranks: dict[Any, tuple[int, float]] = {}
        super().__init__(call, selection.row, view, frame)
        self.scores = dict(zip(map(self.name_of, self.keys), self.weights(), strict=True))

    def _all_keys(self, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
        if isinstance(self.selection.row.over, program.Unit):
            for value in sorted(self._view.units(self.selection.row.over, frame)):
                yield self._with_key(frame, value)
            return
        if not self.selection.of_queries:
            yield from super()._all_keys(frame)
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
        """Return the `rank`, `mass` or `score` of a frame's candidate."""
        candidate = self.name_of(frame)
        if name == "score":
            result: float = self.scores[candidate]
            return result
        rank, mass = self.ranks[candidate]
        return rank if name == "rank" else mass

    def unit_like(self, unit: program.Unit) -> program.Unit | None:
        """Return the row's unit of queries with the same expression as `unit`; None if there is none."""
        return next((row_unit for row_unit in self._attend.per if same_keys(row_unit, unit)), None)

    def always(self) -> Iterator[Any]:
        """Yield the entries that `always` selects, whatever their score."""
        if self.selection.always is None:
            return
        meaning: Meaning = self._call.meanings.of(self.selection.always)
        for candidate in self._all_keys(self._frame):
            self._call.steps = 0
            if meaning(candidate):
                yield self.name_of(candidate)


def _kept(call: Evaluator, rows: list[CandidateRow]) -> list[Places]:
    """Return the selections of rows whose candidates are ranked together."""
    candidates = [(score, row, candidate) for row in rows for candidate, score in row.scores.items()]
    order = sorted(range(len(candidates)), key=lambda i: (math.isnan(candidates[i][0]), -candidates[i][0], i))
    mass = 0.0
    for rank, i in enumerate(order):
        score, row, candidate = candidates[i]
        row.ranks[candidate] = (rank, mass)
        mass += score
    selections = []
    for row in rows:
        keep = call.meanings.of(row.selection.keep)
        kept = set(row.always())
        for key in row.keys:
            call.steps = 0
            if keep(key):
                kept.add(row.name_of(key))
        selections.append(frozenset(kept))
    return selections
