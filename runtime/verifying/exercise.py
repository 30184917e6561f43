"""Find the smallest call that makes every clause of a relation true for some pair and false for another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from attnc.runtime.call.example_inputs import head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.verifying.call_cases import (
    CallCase,
    ShapeRequest,
    has_state,
    loops,
    may_differ,
    takes_more_queries,
    with_heads,
)
from attnc.runtime.verifying.clauses import ExercisedClause, WatchedEvaluator, clauses_of
from attnc.runtime.verifying.condition_lines import (
    compared_heads,
    constants,
    heads_needed,
    input_values,
    lines_of,
    reads_heads,
    relation_lines,
    step_lines,
)
from attnc.runtime.verifying.drawn_inputs import draw, is_constant, takes_constants
from attnc.runtime.verifying.hiding import hides_nothing
from attnc.runtime.verifying.scaled_parameters import ScaledChoice, counts, scaled
from attnc.spec.checks.measure import below
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.denotation import EvaluationFrame, constantly
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.program import BoundProgram, HeadIndexRead, InputRead, KeyRange, Literal, ParameterRead, Size

LONGEST = 640
LENGTHS = (16, 32, 64, 128, 256, 512, LONGEST)
LENGTHS_OF_ROWS = (12, 24, 48)
"""The lengths tried where a row costs as many evaluations as there are keys, or more."""
LENGTHS_OF_LOOPS = (12, 16)
"""The lengths tried where a row costs three nested loops or more."""

PAIRS = 1 << 12
"""The maximum number of pairs evaluated per head; of longer calls, random rows are evaluated."""

FEW_PAIRS = 1 << 10
"""The maximum number of pairs evaluated per head in further calls with the selected parameters."""

LOOKS, SHORT_LOOKS = 48, 24
"""The maximum number of calls to evaluate, in general and for patterns whose rows are expensive."""

MOST_ENTRIES = 4
"""The maximum batch size of calls for the values of integers that are the same for all tokens."""

LONGEST_STATE = 256
"""The maximum length at which states are evaluated for the constants in their conditions."""

LONG, LONG_LOOKS = 64, 4
"""The length and the number of the last calls that are tried for patterns whose rows are expensive."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The inputs and vectors of a call, in fp64."""

    inputs: dict[str, object]
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Look:
    """An evaluated call: the relation of some rows, and the values of the clauses.

    `wanted` holds the expected relation by batch entry and head: bool (rows, keys).
    """

    choice: ScaledChoice
    case: CallCase
    numbers: Numbers
    rows: tuple[int, ...]
    wanted: dict[tuple[int, int], Tensor]
    clauses: list[ExercisedClause]
    hides_nothing: str = ""
    degenerate: bool = False
    """Whether scaled parameters fix the value of a clause that the requested parameters leave open."""

    @property
    def pairs(self) -> int:
        """The number of pairs that were evaluated."""
        return sum(x.numel() for x in self.wanted.values())

    @property
    def hidden(self) -> int:
        """The number of hidden pairs among the evaluated pairs."""
        return sum(int((~x).sum()) for x in self.wanted.values())

    @property
    def is_complete(self) -> bool:
        """Whether every clause is settled, and a pair is hidden if the pattern can hide one."""
        hides = bool(self.hidden) or bool(self.hides_nothing)
        return hides and not self.degenerate and all(clause.is_settled for clause in self.clauses)

    @property
    def rank(self) -> tuple[bool, int, bool]:
        """A sort key: calls that exercise more clauses rank higher."""
        open_clauses = sum(not clause.is_settled for clause in self.clauses)
        return not self.degenerate, -open_clauses, bool(self.hidden)


@dataclass(slots=True)
class Search:
    """A search over calls; it keeps the best call evaluated so far."""

    tell: Callable[[str], None]
    wishes: ShapeRequest
    fixed: frozenset[str] = frozenset()
    looks: int = 0
    best: Look | None = None
    decided: frozenset[tuple[str, str]] = frozenset()
    refused: list[CallCase] = field(default_factory=list)

    def run(self, choice: ScaledChoice) -> Look | None:
        """Return the first call that exercises every clause, else the best call; None if the pattern accepts none."""
        self.decided = decided(choice.bound)
        may_be_longer = self.wishes.length is None and not choice.bound.program.segments and loops(choice.bound) > 0
        if may_be_longer and any(LENGTHS_OF_ROWS[-1] <= n < LONG for n in constants(choice.bound.program)):
            self._look_longer(choice)
            if self.best is not None and self.best.is_complete:
                return self.best
        smaller = scaled(choice, self.fixed) if self.wishes.length is None or choice.how else ()
        for candidate in chain((choice,), smaller):
            for case in cases(candidate, self.wishes, is_own=candidate is choice):
                if self.looks >= LOOKS:
                    return self.best
                if self._is_enough(candidate, case):
                    return self.best
            if self.looks >= SHORT_LOOKS and loops(candidate.bound):
                break
        if may_be_longer:
            self._look_longer(choice)
        return self.best

    def _is_enough(self, choice: ScaledChoice, case: CallCase) -> bool:
        """Evaluate a call, keep it if it is the best, and return whether it exercises every clause."""
        evaluated = self._look(choice, case)
        if evaluated is not None and (self.best is None or evaluated.rank > self.best.rank or evaluated.is_complete):
            self.best = evaluated
        return evaluated is not None and evaluated.is_complete

    def _look_longer(self, choice: ScaledChoice) -> None:
        """Evaluate a few calls of an expensive pattern that are longer than most constants of its text."""
        for candidate in islice(scaled(choice, self.fixed), LONG_LOOKS):
            case = with_heads(candidate.bound, CallCase(LONG, LONG, 1, 2, 1, 4, 4), self.wishes)
            if self._is_enough(candidate, case):
                return

    def _look(self, choice: ScaledChoice, case: CallCase) -> Look | None:
        self.tell(f"choosing a call: length {case.lengths}")
        self.looks += 1
        try:
            evaluated = look(choice, case)
            return replace(evaluated, degenerate=not decided(choice.bound) <= self.decided)
        except EvaluationError as error:
            codes = {d.code for d in error.diagnostics}
            if case.at_constants:  # the pattern may reject these numbers
                self.refused.append(case)
                return None
            if codes == {"A902"} and case.own_size is None:
                return self._look(choice, replace(case, own_size=case.n_k))
            if not codes <= {"A902", "A906", "A908", "A901"}:
                raise
            self.refused.append(case)
            self.looks -= codes == {"A906"}
            return None


def decided(bound: BoundProgram) -> frozenset[tuple[str, str]]:
    """Return the clauses that have one value for every pair."""
    return frozenset((clause.where, clause.text) for clause in clauses_of(bound) if clause.reason)


def cases(choice: ScaledChoice, request: ShapeRequest, *, is_own: bool) -> Iterator[CallCase]:
    """Yield the calls to try, short calls first; `is_own`: the parameters are the requested ones."""
    bound = choice.bound
    flags = {"batch", "head", "kv_head"}
    has_flags = any(i.type.kind == "bool" and set(i.type.dims) <= flags for i in bound.program.inputs)
    batch = 2 if has_flags else 1
    needs_more = _needs_more_queries(bound)
    by_heads = any(map(reads_heads, below(lines_of(bound))))
    for n in lengths(bound, request, is_own=is_own):
        case = with_heads(bound, CallCase(n, n, batch, 2, 1, 4, 4), request)
        shapes = [case]
        # some clauses compare heads beyond a power of two only
        if request.heads is None and request.kv_heads is None and by_heads and head_count(bound) is None:
            shapes += [replace(case, heads=3), *_many_heads_case(bound, case)]
        yield from shapes
        values = [input_values(bound, i) for i in bound.program.inputs if takes_constants(bound, i)]
        if any(values):
            yield replace(shapes[-1], at_constants=True, batch=_batch_of(bound, batch))
        if may_differ(bound) and n >= 8 and n <= 64 and bound.program.align is not None:
            yield replace(case, n_q=n // 4)
        if needs_more and n <= 64:
            yield replace(case, n_q=2 * n)


def _needs_more_queries(bound: BoundProgram) -> bool:
    """Whether only calls with more queries than keys exercise some clause, or hide a pair."""
    if not takes_more_queries(bound) or hides_nothing(bound, more_queries=False) != hides_nothing(bound):
        return takes_more_queries(bound)
    few, more = (clauses_of(bound, more_queries=more) for more in (False, True))
    return len(few) != len(more) or any(bool(a.reason) != bool(b.reason) for a, b in zip(few, more, strict=True))


def _many_heads_case(bound: BoundProgram, case: CallCase) -> list[CallCase]:
    """Return a call with heads on both sides of the constants in clauses, if three heads are too few."""
    heads, kv_heads = heads_needed(bound)
    if kv_heads > case.kv_heads:
        return [replace(case, heads=max(heads, kv_heads), kv_heads=max(heads, kv_heads))]
    return [replace(case, heads=heads)] if heads > 3 else []


def _batch_of(bound: BoundProgram, least: int) -> int:
    """Return the batch size that holds every value of integers that are the same for all tokens."""
    constant_inputs = [
        i for i in bound.program.inputs if is_constant(i) and "batch" in i.type.dims and takes_constants(bound, i)
    ]
    return min(max((len(input_values(bound, item)) for item in constant_inputs), default=least) or least, MOST_ENTRIES)


def lengths(bound: BoundProgram, request: ShapeRequest, *, is_own: bool) -> list[int]:
    """Return the lengths to try, in ascending order."""
    if request.length is not None:
        return [request.length]
    pattern = bound.program
    cost = loops(bound)
    choices = LENGTHS if not (pattern.selections or cost) else LENGTHS_OF_ROWS if cost < 3 else LENGTHS_OF_LOOPS
    if has_state(bound):
        choices = LENGTHS_OF_ROWS
    if pattern.segments:
        fixed = natural_length(bound, 1) or 0
        grid_lengths = sorted({natural_length(bound, target) or 0 for target in (fixed, fixed + 5, 16, 48)})
        return [n for n in grid_lengths if n <= (choices[-1] if cost < 3 else 64)]
    if not pattern.attends:
        largest = max(counts(bound), default=0) if is_own else 0
        longer = [n for n in LENGTHS_OF_ROWS[1:] if n > largest]
        return sorted({LENGTHS_OF_ROWS[0], *longer[:1], *_as_long_as_constants(bound)})
    if not is_own:
        return [n for n in choices if n <= 64][-2:]
    largest = max(counts(bound), default=0)
    choices = (*choices, *(n for n in _as_long_as_constants(bound) if n > choices[-1]))
    longer = [n for n in choices if n > largest]
    return longer if largest >= choices[0] and longer else list(choices[:1] if largest >= choices[0] else choices)


def _as_long_as_constants(bound: BoundProgram) -> list[int]:
    """Return the lengths that exceed once and twice the largest constant in the conditions of states."""
    steps = below(line for _, _, line in step_lines(bound.program))
    literals = {n.value for n in steps if isinstance(n, Literal) and type(n.value) is int}
    largest = max((n for n in literals if n + 2 <= LONGEST_STATE), default=0)
    return [n for n in (largest + 2, 2 * largest + 2) if LENGTHS_OF_ROWS[1] < n <= LONGEST_STATE]


def look(choice: ScaledChoice, case: CallCase, pairs: int = PAIRS) -> Look:
    """Evaluate the relation of a call. Raises EvaluationError if the pattern rejects the call."""
    bound = choice.bound
    numbers = numbers_of(bound, case)
    oracle = WatchedEvaluator(bound, queries=case.n_q, keys=case.n_k, inputs=numbers.inputs, **case.counts)
    oracle.give(*(x.tolist() for x in (numbers.q, numbers.k, numbers.v)))
    rows = _rows(case, pairs)
    wanted: dict[tuple[int, int], Tensor] = {}
    if bound.program.attends:
        varies = _varies(bound)
        for batch in range(case.batch if varies else 1):
            for head in _heads(bound, case) if varies else [0]:
                visible = [[any(oracle.seen_by(q, k, head=head, batch=batch)) for k in range(case.n_k)] for q in rows]
                wanted[batch, head] = torch.tensor(visible, dtype=torch.bool).reshape(len(rows), case.n_k)
        _evaluate_ranges(oracle, rows)
        _evaluate_families(oracle, case)
    _evaluate_steps(oracle, case)
    return Look(choice, case, numbers, rows, wanted, oracle.clauses, hides_nothing(bound))


def _varies(bound: BoundProgram) -> bool:
    """Whether the relation may differ between heads or between batch entries."""
    per_head = {p.name for p in bound.program.parameters if p.per_head}
    if bound.program.selections or bound.program.documents is not None:
        return True
    return any(
        isinstance(node, InputRead | HeadIndexRead)
        or (isinstance(node, ParameterRead) and node.name in per_head)
        or (isinstance(node, Size) and node.name in ("heads", "kv_heads", "group"))
        for node in below(line for _, line in relation_lines(bound.program))
    )


def _evaluate_ranges(oracle: Evaluator, rows: tuple[int, ...]) -> None:
    """Evaluate the rows of attentions over a range, whose relation is between a query and a number.

    In a family of branches, every branch is evaluated: the pattern may read only the branches whose relation holds.
    """
    ranges = [attend for attend in oracle.program.attends if isinstance(attend.over, KeyRange) and attend.visible]
    for row in rows if ranges else ():
        oracle.rows.result(0, 0, row)
        for attend in ranges:
            if attend.family is not None:
                for member in _members(oracle, attend.family, oracle.rows.frame(0, 0, row)[1]):
                    _try(partial(oracle.rows.of, attend.name, member, 0, 0, row))


def _try(evaluate: Callable[[], object]) -> None:
    """Evaluate something that the pattern itself may never evaluate; it may be undefined."""
    try:
        evaluate()
    except EvaluationError as error:
        if any(d.code == "A908" for d in error.diagnostics):
            raise


def _evaluate_steps(oracle: Evaluator, case: CallCase) -> None:
    """Evaluate the conditions of states at every token except the first, which has no state before it."""
    head_entries = [(head, batch) for batch in range(case.batch) for head in _heads(oracle.bound, case)]
    for _, recurrence, condition in step_lines(oracle.program):
        meaning = oracle.meanings.of(condition)
        for view, head, batch in (
            (view, *head_entry) for head_entry in head_entries for view in oracle.views(head_entry[1])
        ):
            for token in range(1, view.keys):
                for frame in _member_frames(oracle, recurrence.family, view.frame(token, token, head, batch)):
                    oracle.steps = 0
                    _try(partial(meaning, frame))


def _heads(bound: BoundProgram, case: CallCase) -> list[int]:
    """Return the heads to evaluate: the first, the last, and those that clauses compare with."""
    compared = compared_heads(bound, "head") | {
        c * case.heads // case.kv_heads for c in compared_heads(bound, "kv_head")
    }
    return sorted({0, case.heads - 1} | {head for head in compared if 0 <= head < case.heads})


def _member_frames(oracle: Evaluator, family: KeyRange | None, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
    """Yield a frame for each member of a family; the frame itself without a family."""
    for member in _members(oracle, family, frame):
        yield frame if family is None or member is None else frame.binding(family.binder, constantly(member))


def _members(oracle: Evaluator, family: KeyRange | None, frame: EvaluationFrame) -> Sequence[int | None]:
    """Return the members of a family; [None] without a family."""
    if family is None:
        return [None]
    low, high = (oracle.meanings.of(end)(frame) for end in (family.low, family.high))
    assert isinstance(low, int) and isinstance(high, int)
    return range(low, high)


def _evaluate_families(oracle: Evaluator, case: CallCase) -> None:
    """Evaluate every selection of a family for the last query; the pattern may evaluate only some of them."""
    view = oracle.view(case.n_q - 1, case.n_k - 1, 0)
    if view is None:
        return
    frame = view.frame(view.keys - 1, view.keys - 1, 0, 0)
    for selection in oracle.program.selections:
        if selection.family is not None:
            for member in _members(oracle, selection.family, frame):
                oracle.selections.chosen(selection, member, frame, view)


def _rows(case: CallCase, pairs: int) -> tuple[int, ...]:
    """Return all rows of a short call; of a long call the first, the last, and random rows between."""
    row_count = max(8, pairs // max(case.n_k, 1))
    if case.n_q <= row_count:
        return tuple(range(case.n_q))
    drawn = random.Random(0).sample(range(1, case.n_q - 1), row_count - 2)
    return (0, *sorted(drawn), case.n_q - 1)


def numbers_of(bound: BoundProgram, case: CallCase) -> Numbers:
    """Return inputs and vectors for a call. Raises ArgumentError for an input that gets no example values."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (case.batch, case.heads, case.n_q, case.dk),
        (case.batch, case.kv_heads, case.n_k, case.dk),
        (case.batch, case.kv_heads, case.n_k, case.dv),
    )
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if has_state(bound):  # keeps the states of delta rules bounded
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return Numbers({name: example.tensor for name, example in draw(bound, case).items()}, q, k, v)
