"""Evaluate a bound program for given sizes and inputs: visibility, outputs, states. Defines the language's meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, cast

from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.attention_rows import AttentionRows, Heads
from attnc.spec.meaning.denotation import BEYOND, MAX_STEPS, EvaluationFrame, Meanings, Result, constantly
from attnc.spec.meaning.parameter_values import check_steps
from attnc.spec.meaning.recurrence_meaning import RecurrentRuns
from attnc.spec.meaning.selection_meaning import Selections
from attnc.spec.meaning.tensors import Tensors, TokenLayout
from attnc.spec.program import BoundProgram, Value
from attnc.spec.source import Span


class Evaluator:
    """The reference evaluation of one call: a bound program with sizes and inputs.

    `queries` and `keys` are lengths; `inputs` maps each input's name to a nested sequence (or anything with `tolist`)
    of the declared dimensions; `sizes` gives `dk`, `dv` and other dimensions that no input shows. Raises
    `EvaluationError` for sizes and inputs that do not fit, and where a `require` on sizes does not hold.
    """

    def __init__(
        self,
        bound: BoundProgram,
        *,
        queries: int,
        keys: int,
        heads: int = 1,
        kv_heads: int = 1,
        inputs: Mapping[str, object] | None = None,
        **sizes: int,
    ) -> None:
        self.bound = bound
        self.program = bound.program
        self.meanings = self.meanings_of(bound)
        self.steps = 0
        self.vectors: Mapping[str, Heads] = {}
        self.factor = 1.0
        self.rows = AttentionRows(self)
        self.selections = Selections(self)
        self._check_sizes(queries, keys, heads, kv_heads)
        self.sizes = {"heads": heads, "kv_heads": kv_heads, "group": heads // kv_heads, **sizes}
        self.sizes |= bound.lengths
        self.tensors = Tensors(self, queries, keys, inputs or {})
        self.whole = SequenceView(self, queries, keys, 0, 0)
        self._runs: dict[int, list[SequenceView]] = {}
        self._lines = [self.meanings.of(line) for line in self.program.visible]
        self._rounding = Rounding(self.program.round, self.meanings) if self.program.round else None
        self._check_requirements()

    def meanings_of(self, bound: BoundProgram) -> Meanings:
        """Return the meanings of a program's expressions; a subclass may override this to observe them."""
        return Meanings(bound.program, bound.values)

    @property
    def queries(self) -> int:
        """Return the number of query rows."""
        return self.whole.queries

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.whole.keys

    def visible(self, q: int, k: int, *, head: int = 0, batch: int = 0) -> bool:
        """Whether the query of row `q` sees key `k`, or a unit that contains it, in at least one attention."""
        return any(self._visible_by_attention(q, k, head, batch))

    def seen_by(self, q: int, k: int, *, head: int = 0, batch: int = 0) -> list[bool]:
        """Return for each attention whether the query of row `q` sees key `k`."""
        return list(self._visible_by_attention(q, k, head, batch))

    def _visible_by_attention(self, q: int, k: int, head: int, batch: int) -> Iterator[bool]:
        view = self.view(q, k, batch)
        if view is None:
            return
        position = k - view.first_key
        frame = view.frame(q + self.whole.shift - view.first_key, view.padded(position), head, batch)
        for attend in self.program.attends:
            yield self._sees(attend, view, frame)

    def _sees(self, attend: program.AttentionClauses, view: SequenceView, frame: EvaluationFrame) -> bool:
        """Whether an attention, or a member of its family, sees a frame's key or the unit that contains it."""
        if isinstance(attend.over, program.KeyRange):
            return False
        for unit in attend.units:
            frame = frame.binding(unit.binder, self.meanings.of(unit.value))
        lines = attend.visible if attend.over is None else (*self.program.visible, *attend.visible)
        for member_frame in self._members(attend, frame):
            self.steps = 0
            if attend.over is None and not self.holds(view, member_frame):
                continue
            if all(self.meanings.of(line)(member_frame) for line in lines):
                return True
        return False

    def _members(self, attend: program.AttentionClauses, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
        """Yield a frame for each member of a family; the frame itself for a single attention."""
        if attend.family is None:
            yield frame
            return
        low, high = (cast("int", self.meanings.of(end)(frame)) for end in (attend.family.low, attend.family.high))
        for member in range(low, high):
            yield frame.binding(attend.family.binder, constantly(member))

    def holds(self, view: SequenceView, frame: EvaluationFrame) -> bool:
        """Whether the pattern's shared relation holds for a frame's query and key."""
        if self._rounding is not None:
            return self._rounding.keeps(view, frame)
        return all(line(frame) for line in self._lines)

    def mask(self, *, head: int = 0, batch: int = 0) -> list[list[bool]]:
        """Return `visible` for every row and key, as a list per row."""
        return [[self.visible(q, k, head=head, batch=batch) for k in range(self.keys)] for q in range(self.queries)]

    def value(self, node: program.Expr, *, q: int = 0, k: int = 0, head: int = 0, batch: int = 0) -> Result:
        """Return the value of an expression at row `q` and key `k`, which must belong to the same document."""
        view = self.view(q, k, batch) or self.whole
        self.steps = 0
        frame = view.frame(q + self.whole.shift - view.first_key, view.padded(k - view.first_key), head, batch)
        return self.meanings.of(node)(frame)

    def attend(
        self, q: Heads, k: Heads, v: Heads, *, scale: float | None = None, only: Sequence[int] | None = None
    ) -> tuple[Heads, list[list[list[float]]]]:
        """Return (out, lse) of a call: q [batch][head][row][dk], k and v [batch][kv head][key][d].

        A row without visible keys has out 0 and lse -inf, even with `extra`; lse is NaN for weights that are not a
        softmax. `only` lists the rows to compute; None stands for all rows.
        """
        self.give(q, k, v, scale=scale)
        rows, row_numbers = self.rows, range(self.queries) if only is None else only
        results = [[[rows.result(b, h, i) for i in row_numbers] for h in range(len(q[b]))] for b in range(len(q))]
        return (
            [[[out for out, _ in head] for head in batch] for batch in results],
            [[[lse for _, lse in head] for head in batch] for batch in results],
        )

    def give(self, q: Heads, k: Heads, v: Heads, *, scale: float | None = None) -> None:
        """Set the vectors of the call, which selections may read, and through selections also `visible`."""
        self.vectors = {"q": q, "k": k, "v": v}
        self.factor = len(q[0][0][0]) ** -0.5 if scale is None else scale
        self.rows = AttentionRows(self)
        self.selections = Selections(self)

    def recur(
        self, q: Heads, k: Heads, v: Heads, *, scale: float | None = None, states: Mapping[str, object] | None = None
    ) -> tuple[list[list[list[tuple[float, ...]]]], dict[str, list[list[object]]]]:
        """Return (out, final states) of a recurrence; states are nested lists [batch][head]… by name.

        `states`: the states before the first token; None for the start values.
        """
        assert self.program.recurrence is not None
        self.vectors = {"q": q, "k": k, "v": v}
        self.factor = len(q[0][0][0]) ** -0.5 if scale is None else scale
        runs = RecurrentRuns(self, self.program.recurrence)
        names = [state.name for state in self.program.recurrence.states]
        last: dict[str, list[list[object]]] = {name: [[] for _ in q] for name in names}
        outs = []
        for b, heads in enumerate(q):
            outs.append(list[list[tuple[float, ...]]]())
            for h in range(len(heads)):
                start = None if states is None else {name: cast("Any", states[name])[b][h] for name in names}
                out, final = runs.run(b, h, start)
                outs[b].append(out)
                for name in names:
                    last[name][b].append(final[name])
        return outs, last

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_sizes(self, queries: int, keys: int, heads: int, kv_heads: int) -> None:
        span = self.program.span
        if kv_heads < 1 or heads % kv_heads:
            message = f"{heads} query heads are not a multiple of {kv_heads} key heads"
            raise EvaluationError(
                "A904", message, span, "use a number of query heads that is a multiple of the number of key heads"
            )
        if self.program.needs_align and self.program.align is None and queries != keys:
            message = f"{queries} queries and {keys} keys need `align`, which the pattern does not set"
            raise EvaluationError("A905", message, span, "add `align end` (or `align start`) to the pattern")
        for parameter in self.program.parameters:
            value = self.bound.values[parameter.name]
            if parameter.per_head and isinstance(value, tuple) and len(value) != heads:
                message = f"`{parameter.name}` has {len(value)} entries, expected one for each of {heads} heads"
                raise EvaluationError("A904", message, parameter.span, "give one entry for each query head")

    def _check_requirements(self) -> None:
        for requirement in self.program.requirements:
            if requirement.stage == "call" and not self.meanings.of(requirement.condition)(
                self.whole.frame(0, 0, 0, 0)
            ):
                text = " ".join(requirement.condition.span.text.split())
                message = f"this call does not fulfil `require {text}`"
                raise EvaluationError("A906", message, requirement.span, f"call with sizes for which `{text}` holds")

    # --- documents ---------------------------------------------------------------------------------------------------

    def view(self, row: int, key: int, batch: int) -> SequenceView | None:
        """Return the sequence that row and key share: the whole call, one document, or None."""
        documents = self.program.documents
        if documents is None:
            return self.whole
        position = row + self.whole.shift
        if not 0 <= position < self.keys:
            message = f"row {row} is at position {position}, outside the {self.keys} tokens"
            raise EvaluationError("A907", message, documents.span, "call with as many queries as tokens, or fewer")
        return next((view for view in self.views(batch) if view.holds(position) and view.holds(key)), None)

    def views(self, batch: int) -> list[SequenceView]:
        """Return the documents of a batch entry, or the whole call if the pattern has no documents."""
        documents = self.program.documents
        if documents is None:
            return [self.whole]
        if batch not in self._runs:
            self._runs[batch] = self._documents(documents, batch)
        return self._runs[batch]

    def _documents(self, documents: program.Input, batch: int) -> list[SequenceView]:
        ids = self.tensors.row(documents, batch)
        starts = [i for i in range(self.keys) if i == 0 or ids[i] != ids[i - 1]]
        started: set[int] = set()
        for start in starts:
            if ids[start] in started:
                message = f"document {ids[start]} is not contiguous: it starts again at token {start}"
                raise EvaluationError("A907", message, documents.span, "sort the tokens by document")
            started.add(ids[start])
        return [self._document(a, b) for a, b in zip(starts, [*starts[1:], self.keys], strict=True)]

    def _document(self, start: int, end: int) -> SequenceView:
        shift = self.whole.shift
        rows = range(max(start - shift, 0), min(end - shift, self.queries))
        return SequenceView(self, len(rows), end - start, rows.start, start)


class SequenceView:
    """A sequence whose tokens see only each other: the whole call, or one document. Positions are local."""

    def __init__(self, call: Evaluator, queries: int, keys: int, first_row: int, first_key: int) -> None:
        self._call = call
        self.queries = queries
        self.keys = keys
        self.first_row = first_row
        self.first_key = first_key
        self.shift = keys - queries if call.program.align == "end" else 0
        self._units: dict[tuple[object, ...], dict[Result, list[int]]] = {}

    def frame(self, q: int, k: int, head: int, batch: int) -> EvaluationFrame:
        """Return the frame of a pair of local positions."""
        return EvaluationFrame(self, {"q": q, "k": k}, head, batch)

    def holds(self, position: int) -> bool:
        """Whether a position of the call belongs to the sequence."""
        return self.first_key <= position < self.first_key + self.keys

    @cached_property
    def layout(self) -> TokenLayout:
        """The positions and extents of the segments in the sequence."""
        return TokenLayout(self._call.program.segments, self.keys, self._extent)

    def _extent(self, node: program.Expr) -> int:
        value = self._call.meanings.of(node)(self.frame(0, 0, 0, 0))
        assert isinstance(value, int)
        return value

    def size(self, name: str, span: Span) -> int:
        """Return the value of a size."""
        if name == "queries":
            return self.queries
        if name == "keys":
            return self.keys
        if name in self.layout.run_time:
            return self.layout.run_time[name]
        if name not in self._call.sizes:
            raise EvaluationError("A904", f"the size `{name}` is unknown", span, f"give `{name}=…`")
        return self._call.sizes[name]

    @cached_property
    def pads(self) -> dict[int, range]:
        """The range of key coordinates along each padded axis, by axis number."""
        return {pad.axis: range(self._extent(pad.low), self._extent(pad.high)) for pad in self._call.program.pads}

    @cached_property
    def ranges(self) -> list[range]:
        """The range of key coordinates along each axis of a pattern with padding."""
        (segment,) = self._call.program.segments
        return [self.pads.get(i, range(n)) for i, n in enumerate(self.layout.extents(segment))]

    @property
    def places(self) -> int:
        """Return the number of keys, including padded keys."""
        return prod(map(len, self.ranges)) if self._call.program.pads else self.keys

    def padded(self, position: int) -> int:
        """Return the index of a token among the keys including padded keys."""
        if not self._call.program.pads:
            return position
        padded_index = 0
        (segment,) = self._call.program.segments
        extents = self.layout.extents(segment)
        for i, axis in enumerate(self.ranges):
            stride = prod(extents[i + 1 :])
            padded_index = padded_index * len(axis) + position // stride % extents[i] - axis.start
        return padded_index

    def token(self, place: int) -> int | None:
        """Return the token of a key, given its index among the keys including padded keys; None for a padded key."""
        if not self._call.program.pads:
            return place
        position = 0
        (segment,) = self._call.program.segments
        extents = self.layout.extents(segment)
        for i in range(len(self.ranges)):
            coordinate = self._along(place, i)
            if not 0 <= coordinate < extents[i]:
                return None
            position = position * extents[i] + coordinate
        return position

    def _along(self, place: int, axis: int) -> int:
        stride = prod(len(r) for r in self.ranges[axis + 1 :])
        return self.ranges[axis].start + place // stride % len(self.ranges[axis])

    def coordinate(self, position: int, node: program.Coordinate) -> int:
        """Return a coordinate of a local position; with padding, of a key's index including padded keys."""
        if node.place == "k" and self._call.program.pads:
            return self._along(position, node.axis)
        return self.layout.coordinate(position, node)

    def in_segment(self, position: int, segment: program.TokenSegment) -> bool:
        """Whether a local position lies in a segment."""
        return position in self.layout.stretch(segment)

    def vector(self, node: program.Vector, position: int, head: int, batch: int) -> tuple[float, ...]:
        """Return the vector at a local position; zeros for a padded key."""
        if node.tensor not in self._call.vectors:
            help_ = "call `attend` with q, k and v first"
            raise EvaluationError("A909", "this reads vectors, and the call has none yet", node.span, help_)
        if node.tensor == "q":
            rows = self._call.vectors["q"][batch][head]
            return tuple(rows[self._checked(position - self.shift, self.queries, node) + self.first_row])
        rows = self._call.vectors[node.tensor][batch][head // self._call.sizes["group"]]
        token = position if node.at is not None else self.token(position)
        if token is None or token == BEYOND:
            return (0.0,) * len(rows[0])
        return tuple(rows[self._checked(token, self.keys, node) + self.first_key])

    def _checked(self, index: int, length: int, node: program.Vector) -> int:
        if not 0 <= index < length:
            message = f"`{node.tensor}` is read at index {index}, out of range for {length} tokens"
            raise EvaluationError("A902", message, node.span, "test the position first: `… if 0 <= i < n else …`")
        return index

    def branch(self, node: program.BranchRead, member: int | None, position: int, frame: EvaluationFrame) -> Result:
        """Return a branch's result at a local position, or its weight at a frame's query and key."""
        rows, row = self._call.rows, position - self.shift + self.first_row
        if node.part == "weight":
            return rows.weight(node.branch, member, frame, row)
        out, lse = rows.of(node.branch, member, frame.batch, frame.head, row)
        return out if node.part == "out" else lse

    def merged(self, node: program.MergeCall, members: Sequence[int | None], frame: EvaluationFrame) -> Result:
        """Return the output of one softmax over the keys of several branches, for a frame's query."""
        row = frame.places["q"] - self.shift + self.first_row
        return cast("Result", self._call.rows.merged(node, members, frame.batch, frame.head, row)[0])

    def scale(self, node: program.ScaleRead) -> float:
        """Return the scale of the call."""
        return self._call.factor

    def element(
        self, node: program.InputRead, indices: list[int], head: int, batch: int
    ) -> int | bool | float | tuple[float, ...]:
        """Return an element of an input; indices into `token`, `key` and `query` dimensions are local positions."""
        offsets = {"token": self.first_key, "key": self.first_key, "query": self.first_row - self.shift}
        limits = {"token": (0, self.keys), "key": (0, self.keys), "query": (self.shift, self.shift + self.queries)}
        return self._call.tensors.element(node, indices, head, batch, offsets, limits)

    def members(self, unit: program.Unit, frame: EvaluationFrame) -> Sequence[int]:
        """Return the local positions of the tokens in the unit that is bound in a frame."""
        return self.units(unit, frame).get(frame.bound[unit.binder](frame), ())

    def tokens(self, unit: program.Unit, frame: EvaluationFrame) -> Sequence[int]:
        """Return a unit's members as positions of tokens, `BEYOND` for padded keys."""
        result = self.members(unit, frame)
        if unit.place == "q" or not self._call.program.pads:
            return result
        tokens = map(self.token, result)
        return [BEYOND if token is None else token for token in tokens]

    def units(self, unit: program.Unit, frame: EvaluationFrame) -> Mapping[Result, Sequence[int]]:
        """Return the local positions of each value of a unit."""
        names = self._call.meanings.names_in(unit)
        key = (unit, frame.head, frame.batch, *(frame.bound[binder](frame) for binder in names))
        if key not in self._units:
            self._units[key] = self._grouped(unit, frame)
        return self._units[key]

    def _grouped(self, unit: program.Unit, frame: EvaluationFrame) -> dict[Result, list[int]]:
        meaning = self._call.meanings.of(unit.value)
        positions = range(self.shift, self.shift + self.queries) if unit.place == "q" else range(self.places)
        groups: dict[Result, list[int]] = {}
        for position in positions:
            groups.setdefault(meaning(frame.at(unit.place, position)), []).append(position)
        return groups

    def in_unit(self, node: program.InUnit, position: int, frame: EvaluationFrame) -> bool:
        """Whether the token at a local position is in the unit that is bound in a frame."""
        unit = node.unit
        return self._call.meanings.of(unit.value)(frame.at(unit.place, position)) == frame.bound[unit.binder](frame)

    def chosen(self, node: program.SelectedTest, member: int | None, item: int | None, frame: EvaluationFrame) -> bool:
        """Whether the row of a frame selected a token, the current unit, or an index of a range."""
        return self._call.selections.holds(node, member, item, frame, self)

    def chosen_size(self, node: program.SelectedCount, member: int | None, frame: EvaluationFrame) -> int:
        """Return the number of entries that the row of a frame selected."""
        return self._call.selections.size(node.selection, member, frame, self)

    def tick(self, span: Span) -> None:
        """Count one step of work."""
        self._call.steps += 1
        check_steps(self._call.steps, MAX_STEPS, span)


class Rounding:
    """The `round` of a pattern; its condition is evaluated once for each pair of units."""

    def __init__(self, item: program.RoundClause, meanings: Meanings) -> None:
        self._item = item
        self._units = (meanings.of(item.q.value), meanings.of(item.k.value))
        self._keep = meanings.of(item.keep)
        self._decided: dict[tuple[object, ...], bool] = {}

    def keeps(self, view: SequenceView, frame: EvaluationFrame) -> bool:
        """Whether the block that contains a frame's query and key is visible."""
        values = [_unit_value(unit(frame)) for unit in self._units]
        key = (view, *values, frame.head, frame.batch)
        if key not in self._decided:
            for unit, value in zip((self._item.q, self._item.k), values, strict=True):
                frame = frame.binding(unit.binder, constantly(value))
            self._decided[key] = bool(self._keep(frame))
        return self._decided[key]


def _unit_value(value: Result) -> Value:
    assert not isinstance(value, float)
    return cast("Value", value)
