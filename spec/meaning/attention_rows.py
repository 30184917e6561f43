"""Compute rows of attention directly from the definition, one key after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.denotation import EvaluationFrame, Meaning, Result, constantly, when_needed
from attnc.spec.meaning.recurrence_meaning import RecurrentRuns

if TYPE_CHECKING:
    from attnc.spec.meaning.evaluate import Evaluator, SequenceView

Heads = list[list[list[list[float]]]]
"""Vectors as nested lists [batch][head][token][entry]."""

Output = tuple[Any, float]
"""The output of a row, a vector or a number, and its log-sum-exp."""


class AttentionRows:
    """The rows of one call; each row is computed once."""

    def __init__(self, call: Evaluator) -> None:
        self._call = call
        self._attends = {attend.name: attend for attend in call.program.attends}
        self._stateful = {item.name: item for item in call.program.stateful}
        self._recurrent_outputs: dict[tuple[str, int | None, int, int], list[tuple[float, ...]]] = {}
        self._outputs: dict[tuple[str, int | None, int, int, int], Output] = {}

    def result(self, batch: int, head: int, row: int) -> tuple[list[float], float]:
        """Return (out, lse) of a row of the pattern."""
        combine = self._call.program.combine
        if combine is None:
            (attend,) = self._attends.values()
            out, lse = self.of(attend.name, None, batch, head, row)
            return list(map(float, out)), lse
        _, frame = self.frame(batch, head, row)
        if isinstance(combine, program.MergeCall):
            members = [None if p.member is None else self._call.meanings.of(p.member)(frame) for p in combine.parts]
            out, lse = self.merged(combine, members, batch, head, row)  # type: ignore[arg-type]  # integers
            return list(map(float, out)), lse
        out = self._call.meanings.of(combine)(frame)
        lse = math.nan
        if isinstance(combine, program.BranchRead) and combine.part == "out" and combine.at is None:
            member = None if combine.member is None else self._call.meanings.of(combine.member)(frame)
            lse = self.of(combine.branch, member, batch, head, row)[1]  # type: ignore[arg-type]  # an integer
        if not isinstance(out, tuple):  # an empty sum of vectors is the number 0
            out = (out,) * len(self._call.vectors["v"][0][0][0])
        return list(map(float, cast("Any", out))), lse

    def frame(self, batch: int, head: int, row: int) -> tuple[SequenceView, EvaluationFrame]:
        """Return the sequence that a row belongs to, the call or a document, and the frame of the row's query."""
        whole = self._call.whole
        documents = self._call.program.documents
        view = whole if documents is None else self._call.view(row, row + whole.shift, batch)
        assert view is not None
        return view, view.frame(row + whole.shift - view.first_key, 0, head, batch)

    def of(self, name: str, member: int | None, batch: int, head: int, row: int) -> Output:
        """Return (out, lse) of a row of an attention, or of a branch with a state, whose lse is NaN."""
        if name in self._stateful:
            return self._recurrent_output(name, member, batch, head, row), math.nan
        key = (name, member, batch, head, row)
        if key not in self._outputs:
            self._outputs[key] = self._row(self._attends[name], member, batch, head, row).output()
        return self._outputs[key]

    def _recurrent_output(self, name: str, member: int | None, batch: int, head: int, row: int) -> tuple[float, ...]:
        key, branch = (name, member, batch, head), self._stateful[name]
        if branch.family is not None and member is not None:
            self._check_member(branch, branch.family, member, self.frame(batch, head, row)[1])
        if key not in self._recurrent_outputs:
            self._recurrent_outputs[key], _ = RecurrentRuns(self._call, branch, member).run(batch, head, None)
        return self._recurrent_outputs[key][row]

    def weight(self, name: str, member: int | None, frame: EvaluationFrame, row: int) -> float:
        """Return the weight that an attention gives to the key of a frame; 0 for an invisible key."""
        weighted = self._row(self._attends[name], member, frame.batch, frame.head, row)
        assert isinstance(frame.row, AttentionRow)
        key = frame.row.name_of(frame)
        return next(
            (w for inner, w in zip(weighted.keys, weighted.weights(), strict=True) if weighted.name_of(inner) == key),
            0.0,
        )

    def merged(self, node: program.MergeCall, members: Sequence[int | None], batch: int, head: int, row: int) -> Output:
        """Return (out, lse) of one softmax over the keys of several branches."""
        parts = [self.of(p.branch, m, batch, head, row) for p, m in zip(node.parts, members, strict=True)]
        lse = float_arithmetic.logsumexp([part for _, part in parts])
        shares = [0.0 if lse == -math.inf else math.exp(part - lse) for _, part in parts]
        outs = [out if isinstance(out, tuple) else (out,) for out, _ in parts]
        return tuple(
            math.fsum(s * float(x) for s, x in zip(shares, xs, strict=True)) for xs in zip(*outs, strict=True)
        ), lse

    def _row(
        self, attend: program.AttentionClauses, member: int | None, batch: int, head: int, row: int
    ) -> AttentionRow:
        view, frame = self.frame(batch, head, row)
        if attend.family is not None and member is not None:
            self._check_member(attend, attend.family, member, frame)
            frame = frame.binding(attend.family.binder, constantly(member))
        for unit in attend.per:
            frame = frame.binding(unit.binder, when_needed(self._call.meanings.of(unit.value), frame))
        return AttentionRow(self._call, attend, view, frame)

    def _check_member(
        self,
        attend: program.AttentionClauses | program.RecurrenceClauses,
        family: program.KeyRange,
        member: int,
        frame: EvaluationFrame,
    ) -> None:
        low, high = (cast("int", self._call.meanings.of(end)(frame)) for end in (family.low, family.high))
        if not low <= member < high:
            message = f"`{attend.name}` is read at {member}; it has branches {low} to {high - 1}"
            raise EvaluationError("A902", message, attend.span, "test the index first: `… if i < n else …`")


class AttentionRow:
    """One row of one attention: a query and its visible keys."""

    def __init__(
        self, call: Evaluator, attend: program.AttentionClauses, view: SequenceView, frame: EvaluationFrame
    ) -> None:
        self._call = call
        self._attend = attend
        self._view = view
        self._frame = frame.in_row(self)
        self.keys = [key for key in self._all_keys(self._frame) if self._sees(key)]

    def seen(self, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
        """Yield a copy of a frame for each visible key of the row."""
        for key in self.keys:
            call = self._call
            call.steps += 1
            yield self._with_key(frame, self.name_of(key))

    def name_of(self, frame: EvaluationFrame) -> Any:
        """Return the identity of a frame's key."""
        over = self._attend.over
        return frame.places["k"] if over is None else frame.bound[over.binder](frame)

    def _with_key(self, frame: EvaluationFrame, key: Any) -> EvaluationFrame:
        over = self._attend.over
        return frame.at("k", key) if over is None else frame.binding(over.binder, constantly(key)).forgetting()

    def _all_keys(self, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
        match self._attend.over:
            case None:
                for key in range(self._view.places):
                    yield frame.at("k", key)
            case program.Unit() as unit:
                for value in self._view.units(unit, frame):
                    yield self._with_key(frame, value)
            case program.KeyRange(low=low, high=high):
                ends = [self._call.meanings.of(end)(frame) for end in (low, high)]
                for key in range(*ends):  # type: ignore[arg-type]  # integers
                    yield self._with_key(frame, key)

    def _sees(self, frame: EvaluationFrame) -> bool:
        if self._attend.over is None and not self._call.holds(self._view, frame):
            return False
        lines = (
            self._attend.visible if self._attend.over is None else (*self._call.program.visible, *self._attend.visible)
        )
        return all(self._call.meanings.of(line)(frame) for line in lines)

    # --- scores and weights ------------------------------------------------------------------------------------------

    def score(self, frame: EvaluationFrame, at: int | None) -> Result:
        """Return the score at a frame's key, or at the key `at`."""
        if at is not None:
            frame = self._with_key(frame, self._view.padded(at) if self._attend.over is None else at)
        if self._attend.score is not None:
            return self._call.meanings.of(self._attend.score)(frame)
        q = program.Vector(self._attend.span, "q")
        k = program.Vector(self._attend.span, "k")
        a, b = (self._call.meanings.of(vector)(frame) for vector in (q, k))
        return self._call.factor * float(float_arithmetic.apply("dot", (a, b), floating=True))

    def ranking(self, frame: EvaluationFrame, name: str) -> Result:
        """Raise: an attention ranks no candidates."""
        raise AssertionError(f"`{name}` outside a selection")

    def _scores(self) -> list[float]:
        return [float(self._evaluate(lambda frame: self.score(frame, None), key)) for key in self.keys]

    def _evaluate(self, meaning: Meaning, frame: EvaluationFrame) -> Any:
        """Return one value; the step count starts anew."""
        self._call.steps = 0
        return meaning(frame)

    def weights(self) -> list[float]:
        """Return the weight of each visible key."""
        weights = self._attend.weights
        if weights is not None and not isinstance(weights, program.SoftmaxClause):
            meaning = self._call.meanings.of(weights)
            return [float(self._evaluate(meaning, key)) for key in self.keys]
        lse = self._lse()
        if lse == math.inf:
            return [math.nan] * len(self.keys)
        return [0.0 if lse == -math.inf else math.exp(score - lse) for score in self._scores()]

    def _lse(self) -> float:
        """Return the log-sum-exp of the scores and the extra logits; -inf where no key is visible."""
        weights = self._attend.weights
        if weights is not None and not isinstance(weights, program.SoftmaxClause):
            return math.nan
        if not self.keys:
            return -math.inf
        extra = None if weights is None or weights.extra is None else self._call.meanings.of(weights.extra)(self._frame)
        logits = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        return float_arithmetic.logsumexp([*self._scores(), *(float(cast("Any", x)) for x in logits)])

    # --- output ------------------------------------------------------------------------------------------------------

    def output(self) -> Output:
        """Return (out, lse) of the row."""
        self._call.steps = 0
        stack = self._attend.stack
        if stack is None:
            return self._weighted_sum(), self._lse()
        frame, outputs = self._frame, []
        ends = [self._call.meanings.of(end)(frame) for end in (stack.low, stack.high)]
        for i in range(*ends):  # type: ignore[arg-type]  # integers
            inner = frame.binding(stack.binder, constantly(i)).forgetting()
            outputs.append(AttentionRow(self._call, self._attend, self._view, inner)._weighted_sum())
        return tuple(outputs), math.nan

    def _weighted_sum(self) -> Any:
        """Return Σ weights · value over the visible keys."""
        weights = self.weights()
        values = [self._value(key) for key in self.keys]
        if not values:
            return self._zero_output()
        width = max((len(x) for x in values if isinstance(x, tuple)), default=None)
        if width is None:
            return math.fsum(w * float(x) for w, x in zip(weights, values, strict=True))
        # an empty sum of vectors is the number 0
        values = [x if isinstance(x, tuple) else (x,) * width for x in values]
        return tuple(math.fsum(w * float(x[i]) for w, x in zip(weights, values, strict=True)) for i in range(width))

    def _value(self, frame: EvaluationFrame) -> Any:
        value = self._attend.value or program.Vector(self._attend.span, "v")
        return self._evaluate(self._call.meanings.of(value), frame)

    def _zero_output(self) -> Any:
        """Return the output of a row without visible keys: zeros in the shape of any key's value."""
        if self._attend.value is None:
            return (0.0,) * len(self._call.vectors["v"][0][0][0])
        for key in self._all_keys(self._frame):
            value = self._value(key)
            return (0.0,) * len(value) if isinstance(value, tuple) else 0.0
        return (0.0,) * len(self._call.vectors["v"][0][0][0])
