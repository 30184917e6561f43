"""The smallest call that makes every clause of a relation true for some pair and false for another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from attnc.runtime.example_inputs import head_count
from attnc.runtime.lengths import natural_length
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
from attnc.runtime.verifying.compared import (
    compared_heads,
    heads_wanted,
    input_values,
    lines_of,
    reads_heads,
)
from attnc.runtime.verifying.condition_lines import constants, relation_lines, step_lines
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
"""The lengths tried where each row costs as many evaluations as there are keys, or more."""
LENGTHS_OF_LOOPS = (12, 16)
"""The lengths tried where a row costs three nested loops or more."""

PAIRS = 1 << 12
"""Up to this many pairs a head are evaluated; of longer calls some rows are, drawn at random."""

FEW_PAIRS = 1 << 10
"""The number of evaluated pairs for further calls with the chosen parameters."""

LOOKS, SHORT_LOOKS = 48, 24
"""The largest number of calls to evaluate, and that for patterns whose rows are expensive."""

MOST_ENTRIES = 4
"""Calls have up to this many batch entries for the values of integers that are the same for all tokens."""

LONGEST_STATE = 256
"""States are looked at up to this length for the constants of their conditions."""

LONG, LONG_LOOKS = 64, 4
"""The length of a last few calls of patterns of which rows cost much, and how many there are."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The operands of a call, in fp64."""

    inputs: dict[str, object]
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Look:
    """One evaluated call: the relation of some rows, and the values of the clauses.

    `wanted` is bool (rows, keys) by batch entry and head.
    """

    choice: ScaledChoice
    case: CallCase
    numbers: Numbers
    rows: tuple[int, ...]
    wanted: dict[tuple[int, int], Tensor]
    clauses: list[ExercisedClause]
    hides_nothing: str = ""
    degenerate: bool = False
    """Whether scaled parameters decide a clause that those asked for leave open."""

    @property
    def pairs(self) -> int:
        """The number of pairs that were evaluated."""
        return sum(x.numel() for x in self.wanted.values())

    @property
    def hidden(self) -> int:
        """The number of hidden pairs among those evaluated."""
        return sum(int((~x).sum()) for x in self.wanted.values())

    @property
    def is_complete(self) -> bool:
        """Whether every clause is settled, and a pair is hidden where one can be."""
        hides = bool(self.hidden) or bool(self.hides_nothing)
        return hides and not self.degenerate and all(clause.is_settled for clause in self.clauses)

    @property
    def rank(self) -> tuple[bool, int, bool]:
        """A sort key: calls that exercise more clauses rank higher."""
        open_clauses = sum(not clause.is_settled for clause in self.clauses)
        return not self.degenerate, -open_clauses, bool(self.hidden)


@dataclass(slots=True)
class Search:
    """The calls looked at so far, of which the best is kept."""

    tell: Callable[[str], None]
    wishes: ShapeRequest
    fixed: frozenset[str] = frozenset()
    looks: int = 0
    best: Look | None = None
    decided: frozenset[tuple[str, str]] = frozenset()
    refused: list[CallCase] = field(default_factory=list)

    def run(self, choice: ScaledChoice) -> Look | None:
        """Return the first call that exercises every clause, else the one that exercises most; None for no call."""
        self.decided = decided(choice.bound)
        may_be_longer = self.wishes.length is None and not choice.bound.program.segments and loops(choice.bound) > 0
        if may_be_longer and any(LENGTHS_OF_ROWS[-1] <= n < LONG for n in constants(choice.bound.program)):
            self._look_longer(choice)
            if self.best is not None and self.best.is_complete:
                return self.best
        for candidate in self._choices(choice):
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
        """Look at a call, and keep it where it is the best; whether it exercises every clause."""
        found = self._look(choice, case)
        if found is not None and (self.best is None or found.rank > self.best.rank or found.is_complete):
            self.best = found
        return found is not None and found.is_complete

    def _look_longer(self, choice: ScaledChoice) -> None:
        """Look at a few calls of a pattern that costs much, longer than constants of its text may be."""
        for candidate in islice(scaled(choice, self.fixed), LONG_LOOKS):
            case = with_heads(candidate.bound, CallCase(LONG, LONG, 1, 2, 1, 4, 4), self.wishes)
            if self._is_enough(candidate, case):
                return

    def _choices(self, choice: ScaledChoice) -> Iterator[ScaledChoice]:
        yield choice
        if self.wishes.length is None or choice.how:
            yield from scaled(choice, self.fixed)

    def _look(self, choice: ScaledChoice, case: CallCase) -> Look | None:
        self.tell(f"choosing a call: length {case.lengths}")
        self.looks += 1
        try:
            found = look(choice, case)
            return replace(found, degenerate=not decided(choice.bound) <= self.decided)
        except EvaluationError as error:
            codes = {d.code for d in error.diagnostics}
            if case.at_constants:  # the text may take no such number
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


def cases(choice: ScaledChoice, wishes: ShapeRequest, *, is_own: bool) -> Iterator[CallCase]:
    """Yield the calls to try, short ones first; `is_own`: with the parameters that were asked for."""
    bound = choice.bound
    batch = 2 if _has_flags(bound) else 1
    needs_more = _needs_more_queries(bound)
    for n in lengths(bound, wishes, is_own=is_own):
        case = with_heads(bound, CallCase(n, n, batch, 2, 1, 4, 4), wishes)
        shapes = [case]
        if wishes.heads is None and wishes.kv_heads is None and _reads_heads(bound) and head_count(bound) is None:
            shapes += [replace(case, heads=3), *_of_many_heads(bound, case)]
        yield from shapes
        values = [input_values(bound, i) for i in bound.program.inputs if takes_constants(bound, i)]
        if any(values):
            yield replace(shapes[-1], at_constants=True, batch=_batch_of(bound, batch))
        if may_differ(bound) and n >= 8 and n <= 64 and bound.program.align is not None:
            yield replace(case, n_q=n // 4)
        if needs_more and n <= 64:
            yield replace(case, n_q=2 * n)


def _needs_more_queries(bound: BoundProgram) -> bool:
    """Whether calls with more queries than keys alone show a clause true and false, or hide a pair."""
    if not takes_more_queries(bound) or hides_nothing(bound, more_queries=False) != hides_nothing(bound):
        return takes_more_queries(bound)
    few, more = (clauses_of(bound, more_queries=more) for more in (False, True))
    return len(few) != len(more) or any(bool(a.reason) != bool(b.reason) for a, b in zip(few, more, strict=True))


def _reads_heads(bound: BoundProgram) -> bool:
    """Whether a clause reads the head or how many there are: some tell apart heads beyond a power of two alone."""
    return any(reads_heads(node) for node in below(lines_of(bound)))


def _of_many_heads(bound: BoundProgram, case: CallCase) -> list[CallCase]:
    """A call with heads on both sides of the constants that clauses compare them with, where three are too few."""
    heads, kv_heads = heads_wanted(bound)
    if kv_heads > case.kv_heads:
        return [replace(case, heads=max(heads, kv_heads), kv_heads=max(heads, kv_heads))]
    return [replace(case, heads=heads)] if heads > 3 else []


def _batch_of(bound: BoundProgram, least: int) -> int:
    """The batch entries that show every value of integers that are the same for all tokens."""
    lone = [i for i in bound.program.inputs if is_constant(i) and "batch" in i.type.dims and takes_constants(bound, i)]
    return min(max((len(input_values(bound, item)) for item in lone), default=least) or least, MOST_ENTRIES)


def _has_flags(bound: BoundProgram) -> bool:
    """Whether an input gives one truth value to each batch entry."""
    inputs = bound.program.inputs
    return any(i.type.kind == "bool" and set(i.type.dims) <= {"batch", "head", "kv_head"} for i in inputs)


def lengths(bound: BoundProgram, wishes: ShapeRequest, *, is_own: bool) -> list[int]:
    """Return the lengths to try."""
    if wishes.length is not None:
        return [wishes.length]
    pattern = bound.program
    cost = loops(bound)
    choices = LENGTHS if not (pattern.selections or cost) else LENGTHS_OF_ROWS if cost < 3 else LENGTHS_OF_LOOPS
    if has_state(bound):
        choices = LENGTHS_OF_ROWS
    if pattern.segments:
        fixed = natural_length(bound, 1) or 0
        found = sorted({natural_length(bound, about) or 0 for about in (fixed, fixed + 5, 16, 48)})
        return [n for n in found if n <= (choices[-1] if cost < 3 else 64)]
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
    """The lengths at which states have passed the largest constant of their conditions, once and twice."""
    steps = below(line for _, _, line in step_lines(bound.program))
    found = {n.value for n in steps if isinstance(n, Literal) and type(n.value) is int}
    largest = max((n for n in found if n + 2 <= LONGEST_STATE), default=0)
    return [n for n in (largest + 2, 2 * largest + 2) if LENGTHS_OF_ROWS[1] < n <= LONGEST_STATE]


def look(choice: ScaledChoice, case: CallCase, pairs: int = PAIRS) -> Look:
    """Evaluate the relation of a call. Raises EvaluationError where the pattern refuses the call."""
    bound = choice.bound
    numbers = numbers_of(bound, case)
    oracle = WatchedEvaluator(bound, queries=case.n_q, keys=case.n_k, inputs=numbers.inputs, **case.counts)
    oracle.give(*(x.tolist() for x in (numbers.q, numbers.k, numbers.v)))
    rows = _rows(case, pairs)
    wanted: dict[tuple[int, int], Tensor] = {}
    if bound.program.attends:
        depends = _depends_on(bound)
        for batch in range(case.batch if depends else 1):
            for head in _heads(bound, case) if depends else [0]:
                found = [[any(oracle.seen_by(q, k, head=head, batch=batch)) for k in range(case.n_k)] for q in rows]
                wanted[batch, head] = torch.tensor(found, dtype=torch.bool).reshape(len(rows), case.n_k)
        _ask_ranges(oracle, rows)
        _ask_families(oracle, case)
    _ask_steps(oracle, case)
    return Look(choice, case, numbers, rows, wanted, oracle.clauses, hides_nothing(bound))


def _depends_on(bound: BoundProgram) -> bool:
    """Whether a relation may differ from head to head, or from batch entry to batch entry."""
    per_head = {p.name for p in bound.program.parameters if p.per_head}
    if bound.program.selections or bound.program.documents is not None:
        return True
    return any(
        isinstance(node, InputRead | HeadIndexRead)
        or (isinstance(node, ParameterRead) and node.name in per_head)
        or (isinstance(node, Size) and node.name in ("heads", "kv_heads", "group"))
        for node in below(line for _, line in relation_lines(bound.program))
    )


def _ask_ranges(oracle: Evaluator, rows: tuple[int, ...]) -> None:
    """Evaluate the rows of attentions over a range, whose relation is between a query and a number.

    Those of a family of branches are asked of each branch: the pattern may read those alone whose relation holds.
    """
    ranges = [attend for attend in oracle.program.attends if isinstance(attend.over, KeyRange) and attend.visible]
    for row in rows if ranges else ():
        oracle.rows.result(0, 0, row)
        for attend in ranges:
            if attend.family is not None:
                for member in _members(oracle, attend.family, oracle.rows.frame(0, 0, row)[1]):
                    _try(partial(oracle.rows.of, attend.name, member, 0, 0, row))


def _try(ask: Callable[[], object]) -> None:
    """Evaluate what the pattern itself may never ask; it may have no value."""
    try:
        ask()
    except EvaluationError as error:
        if any(d.code == "A908" for d in error.diagnostics):
            raise


def _ask_steps(oracle: Evaluator, case: CallCase) -> None:
    """Evaluate the conditions of states at every token but the first, before which there is nothing to keep."""
    places = [(head, batch) for batch in range(case.batch) for head in _heads(oracle.bound, case)]
    for _, recurrence, condition in step_lines(oracle.program):
        asked = oracle.meanings.of(condition)
        for view, head, batch in ((view, *place) for place in places for view in oracle.views(place[1])):
            for token in range(1, view.keys):
                for frame in _of_family(oracle, recurrence.family, view.frame(token, token, head, batch)):
                    oracle.steps = 0
                    _try(partial(asked, frame))


def _heads(bound: BoundProgram, case: CallCase) -> list[int]:
    """The heads to ask: the first, the last, and those that clauses name."""
    named = compared_heads(bound, "head") | {c * case.heads // case.kv_heads for c in compared_heads(bound, "kv_head")}
    return sorted({0, case.heads - 1} | {head for head in named if 0 <= head < case.heads})


def _of_family(oracle: Evaluator, family: KeyRange | None, frame: EvaluationFrame) -> Iterator[EvaluationFrame]:
    """Yield a frame for each place of a family; the frame itself where there is none."""
    for member in _members(oracle, family, frame):
        yield frame if family is None or member is None else frame.binding(family.binder, constantly(member))


def _members(oracle: Evaluator, family: KeyRange | None, frame: EvaluationFrame) -> Sequence[int | None]:
    """The places of a family; None alone where there is none."""
    if family is None:
        return [None]
    low, high = (oracle.meanings.of(end)(frame) for end in (family.low, family.high))
    assert isinstance(low, int) and isinstance(high, int)
    return range(low, high)


def _ask_families(oracle: Evaluator, case: CallCase) -> None:
    """Evaluate every selection of a family for the last query; the pattern may ask some of them only."""
    view = oracle.view(case.n_q - 1, case.n_k - 1, 0)
    if view is None:
        return
    frame = view.frame(view.keys - 1, view.keys - 1, 0, 0)
    for selection in oracle.program.selections:
        if selection.family is not None:
            for member in _members(oracle, selection.family, frame):
                oracle.selections.chosen(selection, member, frame, view)


def _rows(case: CallCase, pairs: int) -> tuple[int, ...]:
    """All rows of a short call; of a long one the first, the last, and some between them."""
    most = max(8, pairs // max(case.n_k, 1))
    if case.n_q <= most:
        return tuple(range(case.n_q))
    drawn = random.Random(0).sample(range(1, case.n_q - 1), most - 2)
    return (0, *sorted(drawn), case.n_q - 1)


def numbers_of(bound: BoundProgram, case: CallCase) -> Numbers:
    """Return operands for a call. Raises ArgumentError for an input of which no values are made."""
    made = torch.Generator().manual_seed(0)
    shapes = (
        (case.batch, case.heads, case.n_q, case.dk),
        (case.batch, case.kv_heads, case.n_k, case.dk),
        (case.batch, case.kv_heads, case.n_k, case.dv),
    )
    q, k, v = (torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes)
    if has_state(bound):  # as delta rules need it for bounded states
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return Numbers({name: example.tensor for name, example in draw(bound, case).items()}, q, k, v)
