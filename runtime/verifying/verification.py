"""Compare the executors with the oracle: the evaluator's relation and outputs, and dense attention in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention
from attnc.runtime.executors.registry import TABLE
from attnc.runtime.verifying.accuracy import Error, Probe, compare
from attnc.runtime.verifying.call_cases import CallCase, has_state, loops
from attnc.runtime.verifying.clauses import ExercisedClause
from attnc.runtime.verifying.condition_lines import MOST_HEADS, constants, heads_needed, reads_heads
from attnc.runtime.verifying.exercise import FEW_PAIRS, Look, look
from attnc.spec.checks.measure import below, inputs_read
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.program import BoundProgram, Coordinate, ParameterRead, PositionRead

DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes of the cpu executor's calls, unless the user names one."""

SCORE_TOLERANCE = 1e-9
ORACLE_TERMS = 1 << 13
"""The maximum number of terms in the evaluated outputs over all heads, which limits the number of rows.

A row has keys times keys terms, or a quarter of the keys cubed where sums over keys are nested.
"""

ORACLE_TOKENS = 40
"""The maximum number of tokens over all heads for which recurrences are evaluated besides the selected call."""

LONGER = 4
"""A shape that a `require` line rejects is tried with up to three tokens more."""

REFUSALS = {"A805", "A904", "A905", "A906"}
"""Error codes of a pattern that rejects a shape."""


@dataclass(frozen=True, slots=True)
class ExecutorTrial:
    """The error of one tensor computed by one executor, in one dtype and shape."""

    executor: str
    dtype: str
    case: CallCase
    result: Error


@dataclass(slots=True)
class Verdict:
    """The results of all comparisons.

    `pairs` and `hidden` count the pairs compared with the evaluator, by the mask if `by_mask`, else by the outputs.
    `rows` counts the compared outputs, `tokens` those of recurrences. `left_out` holds the shapes that the pattern
    rejects. If the pattern `is_plain`, its outputs follow from the mask.
    """

    look: Look
    by_mask: bool = True
    is_plain: bool = True
    pairs: int = 0
    hidden: int = 0
    rows: int = 0
    tokens: int = 0
    differing: list[str] = field(default_factory=list)
    errors: list[ExecutorTrial] = field(default_factory=list)
    cases: list[CallCase] = field(default_factory=list)
    left_out: list[CallCase] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """The comparisons that were not made, in words; empty if all were made."""
        return [text for text, _ in self.gaps]

    @property
    def gaps(self) -> list[tuple[str, str]]:
        """The comparisons that were not made, each with a remedy."""
        open_clauses = [
            (f"`{clause.text}` ({clause.where}) was {clause.missing}", remedy(self.look, clause))
            for clause in self.look.clauses
            if not clause.is_settled
        ]
        other_gaps = self._other_gaps()
        return [*open_clauses, *((text, remedy(self.look)) for text in other_gaps)]

    def _other_gaps(self) -> list[str]:
        gaps = []
        if self.look.degenerate:
            gaps.append("the scaled parameters fix a clause that the requested ones leave open")
        if not self.errors:
            gaps.append("no call was compared")
        unlimited = {(e.dtype, e.result.tensor) for e in self.errors if not isfinite(e.result.allowed)}
        for dtype, name in sorted(unlimited):
            gaps.append(f"{name} in {dtype} was compared with nothing, because torch's result is not finite")
        if has_state(self.look.choice.bound) and not (self.tokens or self.rows):
            gaps.append("no token was compared with the evaluator")
        elif not (self.is_plain or self.tokens or self.rows):
            gaps.append("no output was compared with the evaluator")
        if self.look.wanted and not self.pairs:
            gaps.append("no pair was compared with the evaluator")
        if not (self.hidden or self.look.hides_nothing):
            gaps.append("no hidden pair was compared with the evaluator")
        return gaps

    @property
    def agrees(self) -> bool:
        """Whether all required comparisons were made and nothing differs."""
        return not self.missing and not self.differing and all(e.result.agrees for e in self.errors)

    def worst(self) -> list[ExecutorTrial]:
        """Return the trial with the largest error relative to its limit, for each executor, dtype and tensor."""
        trials: dict[tuple[str, str, str], ExecutorTrial] = {}
        for trial in self.errors:
            key = (trial.executor, trial.dtype, trial.result.tensor)
            if key not in trials or _badness(trial.result) > _badness(trials[key].result):
                trials[key] = trial
        return list(trials.values())


def _badness(result: Error) -> float:
    if not result.agrees:
        return float("inf") if result.error != result.error else 1e9 + result.error
    return result.error / result.allowed if result.allowed else 0.0


def verify(
    attention: Attention,
    selected: Look,
    others: Sequence[CallCase],
    step: Callable[[str], None],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Verdict:
    """Compare the selected call and others, which the pattern may reject; `step` is called before each."""
    verdict = Verdict(selected, attention.has_mask, attention.is_plain)
    step(str(selected.case))
    _compare(attention, selected, verdict, dtypes)
    for case in others:
        step(str(case))
        evaluated = _first_accepted(selected, case)
        if evaluated is None:
            verdict.left_out.append(case)
        else:
            _compare(attention, evaluated, verdict, dtypes)
    return verdict


def _first_accepted(selected: Look, case: CallCase) -> Look | None:
    """Evaluate a shape, or one a little longer if a `require` line rejects it; None if the pattern rejects all."""
    longer = range(1, LONGER) if case.n_q == case.n_k else ()
    for shape in (case, *(replace(case, n_q=case.n_q + more, n_k=case.n_k + more) for more in longer)):
        try:
            return _evaluate(selected, shape)
        except (SpecError, EvaluationError) as error:
            codes = {d.code for d in error.diagnostics}
            if not codes <= (REFUSALS if shape.n_q == shape.n_k else REFUSALS | {"A902"}):
                raise
            if codes != {"A906"}:
                return None
    return None


def _evaluate(selected: Look, case: CallCase) -> Look:
    """Evaluate another call with the selected parameters."""
    try:
        return look(selected.choice, case, FEW_PAIRS)
    except EvaluationError as error:
        if {d.code for d in error.diagnostics} != {"A902"} or case.own_size is not None:
            raise
        return look(selected.choice, replace(case, own_size=case.n_k), FEW_PAIRS)


def _compare(attention: Attention, evaluated: Look, verdict: Verdict, dtypes: Sequence[torch.dtype]) -> None:
    verdict.cases.append(evaluated.case)
    mask = _compare_relation(attention, evaluated, verdict)
    _check_outputs(attention, evaluated, verdict)
    _run(attention, evaluated, mask, verdict, dtypes)


def _run(attention: Attention, evaluated: Look, mask: Tensor, verdict: Verdict, dtypes: Sequence[torch.dtype]) -> None:
    """Run every executor, forward and backward.

    For a pattern that is not plain, the dense result in torch is the reference executor itself. Only the evaluator
    checks that executor, because compared with itself it would always agree.
    """
    numbers, case = evaluated.numbers, evaluated.case
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn((case.batch, case.heads, case.n_q, case.dv), generator=generator, dtype=torch.float64)
    grad_lse = torch.randn((case.batch, case.heads, case.n_q), generator=generator, dtype=torch.float64)
    has_parts = bool(attention.pattern.selections) or len(attention.pattern.nodes) > 1
    for executor, dtype in _trials(attention, numbers.q.device, dtypes):
        call = attention.reference if executor == "reference" else attention._by_executor(executor)

        def run(q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Any] = call) -> tuple[Tensor, Tensor]:
            return _call_with_lse(call, attention, numbers.inputs, q, k, v)

        dense = None if attention.is_plain else partial(_call_with_lse, attention.reference, attention, numbers.inputs)
        q, k, v = (x.to(dtype) for x in (numbers.q, numbers.k, numbers.v))
        probe = Probe(q, k, v, mask, grad, grad_lse if attention.has_lse else None, dense, has_parts)
        name = str(dtype).removeprefix("torch.")
        verdict.errors.extend(ExecutorTrial(executor, name, case, error) for error in compare(run, probe))


def _trials(attention: Attention, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[tuple[str, torch.dtype]]:
    """Return the executors for a device, by name, each with the dtypes of its calls; the reference in fp64."""
    names = [registered.name for registered in TABLE if device.type in registered.devices]
    references = [("reference", torch.float64)] if attention.is_plain else []
    return [*references, *((name, dtype) for name in names for dtype in dtypes)]


def _call_with_lse(
    call: Callable[..., Any], attention: Attention, inputs: dict[str, object], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse), with zeros for an LSE that the pattern does not have."""
    if not attention.has_lse:
        return call(q, k, v, **inputs), torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    out, lse = call(q, k, v, return_lse=True, **inputs)
    return out, lse


# --- the relation -----------------------------------------------------------------------------------------------------


def _compare_relation(attention: Attention, evaluated: Look, verdict: Verdict) -> Tensor:
    """Return the mask (batch, heads, Nq, Nk), compared with the evaluator's; all true for a pattern without a mask."""
    case, numbers = evaluated.case, evaluated.numbers
    mask = torch.ones((case.batch, case.heads, case.n_q, case.n_k), dtype=torch.bool)
    if not attention.has_mask:
        return mask
    inputs: dict[str, Any] = {name: x for name, x in numbers.inputs.items() if name in attention.relation_inputs}
    counts: dict[str, Any] = {"heads": case.heads, "kv_heads": case.kv_heads}
    if attention.pattern.selections:
        inputs, counts = {**numbers.inputs, "q": numbers.q, "k": numbers.k}, {}
    for head in range(case.heads):
        mask[:, head] = attention.mask(case.n_q, case.n_k, head=head, **counts, **inputs)
    rows = list(evaluated.rows)
    for (batch, head), expected in evaluated.wanted.items():
        verdict.pairs += expected.numel()
        verdict.hidden += int((~expected).sum())
        for row, key in (expected != mask[batch, head, rows]).nonzero().tolist()[:1]:
            verdict.differing.append(
                f"{case}: batch {batch}, head {head}, query {rows[row]}, key {key}: the evaluator says "
                f"{'visible' if expected[row, key] else 'hidden'}"
            )
    return mask


# --- outputs ----------------------------------------------------------------------------------------------------------


def _check_outputs(attention: Attention, evaluated: Look, verdict: Verdict) -> None:
    """Compare the reference executor's output and LSE with the evaluator's, for some rows if rows are expensive."""
    bound, case = evaluated.choice.bound, evaluated.case
    if attention.is_plain:
        return
    oracle = Evaluator(bound, queries=case.n_q, keys=case.n_k, inputs=evaluated.numbers.inputs, **case.counts)
    is_short = case.n_q * case.batch * case.heads <= ORACLE_TOKENS
    if bound.program.recurrence is not None:
        if is_short or not verdict.tokens:
            _check_tokens(attention, evaluated, oracle, verdict)
        return
    rows = _some_rows(evaluated, needs_one=not verdict.rows)
    if not rows or (has_state(bound) and verdict.rows and not is_short):
        return
    q, k, v = (x.tolist() for x in (evaluated.numbers.q, evaluated.numbers.k, evaluated.numbers.v))
    expected = [torch.tensor(x, dtype=torch.float64) for x in oracle.attend(q, k, v, only=rows)]
    outputs = _call_with_lse(
        attention.reference,
        attention,
        evaluated.numbers.inputs,
        evaluated.numbers.q,
        evaluated.numbers.k,
        evaluated.numbers.v,
    )
    verdict.rows += len(rows) * case.batch * case.heads
    for name, a, b in list(zip(("out", "lse"), expected, outputs, strict=True))[: 2 if attention.has_lse else 1]:
        _note_difference(verdict, case, name, a, b[:, :, rows])
    if not attention.has_mask:
        for expected_mask in evaluated.wanted.values():
            verdict.pairs += len(rows) * case.n_k
            indices = [i for i, row in enumerate(evaluated.rows) if row in set(rows)]
            verdict.hidden += int((~expected_mask[indices]).sum())


def _some_rows(evaluated: Look, *, needs_one: bool) -> list[int]:
    """Return the rows whose outputs are evaluated: the last rows, which see most keys."""
    case = evaluated.case
    terms = case.n_k**2 * case.batch * case.heads
    if loops(evaluated.choice.bound):
        terms *= max(case.n_k // 4, 1)
    row_count = ORACLE_TERMS // max(terms, 1) or int(needs_one)
    return list(evaluated.rows[-row_count:]) if row_count else []


def _check_tokens(attention: Attention, evaluated: Look, oracle: Evaluator, verdict: Verdict) -> None:
    """Compare a recurrence's outputs and final states with the evaluator's."""
    case, numbers = evaluated.case, evaluated.numbers
    out, states = oracle.recur(*(x.tolist() for x in (numbers.q, numbers.k, numbers.v)))
    options: dict[str, Any] = dict(numbers.inputs)
    outputs = attention.reference(numbers.q, numbers.k, numbers.v, **options)
    _, final_states = attention(numbers.q, numbers.k, numbers.v, return_state=True, **options)
    verdict.tokens += case.n_q * case.batch * case.heads
    for name, a, b in [("out", out, outputs), *((name, states[name], final_states[name]) for name in states)]:
        dtype = torch.complex128 if b.is_complex() else torch.float64
        _note_difference(verdict, case, name, torch.tensor(a, dtype=dtype).reshape(b.shape), b)


def _note_difference(verdict: Verdict, case: CallCase, name: str, expected: Tensor, actual: Tensor) -> None:
    error = float(torch.where(expected == actual, 0, (expected - actual).abs()).max()) if actual.numel() else 0.0
    if not error <= SCORE_TOLERANCE:
        verdict.differing.append(f"{case}: the evaluator's {name} differs by {error:.1e}")


# --- remedies --------------------------------------------------------------------------------------------------------


def remedy(look: Look, clause: ExercisedClause | None = None) -> str:
    """Return the options that may exercise a clause, or all options if it has none; empty without clauses."""
    bound = look.choice.bound
    if not look.clauses:
        return ""
    nodes = [] if clause is None or clause.node is None else list(below([clause.node]))
    options = [
        *(["smaller parameters with -p"] if any(isinstance(node, ParameterRead) for node in nodes) else []),
        *([_heads_option(look)] if any(map(reads_heads, nodes)) else []),
        *([_length_option(look)] if any(isinstance(node, PositionRead | Coordinate) for node in nodes) else []),
    ]
    names = sorted(item.name for item in inputs_read(nodes))
    if names:
        listed = " and ".join(f"`{name}`" for name in names)
        return f"; no example of {listed} exercises it: compare a call of your own with `.reference`"
    return "; use " + ", or ".join(options or _all_options(bound))


def _all_options(bound: BoundProgram) -> list[str]:
    counts = any(p.type.kind == "int" for p in bound.program.parameters)
    return [*(["smaller parameters with -p"] if counts else []), "another --len"]


def _heads_option(look: Look) -> str:
    """Return another number of heads: the number that constants need, if the call has fewer."""
    needed = max(heads_needed(look.choice.bound, MOST_HEADS**2))
    return f"--heads {needed}" if needed > look.case.heads else "another --heads"


def _length_option(look: Look) -> str:
    """Return another length: beyond the largest constant of the text, if the call is shorter."""
    largest = max(constants(look.choice.bound.program), default=0)
    return f"--len {largest + 2} or more" if largest + 2 > look.case.n_k else "another --len"
