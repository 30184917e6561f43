"""Compare the executors with the oracle: the evaluator's relation and outputs, and dense attention in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.accuracy import Error, Probe, compare
from attnc.runtime.attention import Attention
from attnc.runtime.verifying.call_cases import CallCase, has_state, loops
from attnc.runtime.verifying.exercise import FEW_PAIRS, Look, look
from attnc.runtime.verifying.remedies import remedy
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.meaning.evaluate import Evaluator

DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes of the cpu executor's calls, unless the user names one."""

SCORE_TOLERANCE = 1e-9
ORACLE_TERMS = 1 << 13
"""Outputs are evaluated of as many rows as have this many terms over all heads, a row having keys times keys, or
    with sums over keys inside of sums a quarter of the cube."""

ORACLE_TOKENS = 40
"""Recurrences are evaluated in the call that was chosen, and where there are up to this many tokens over all heads."""

LONGER = 4
"""A shape that a `require` line refuses is tried with up to three tokens more."""

REFUSALS = {"A805", "A904", "A905", "A906"}
"""Codes of errors of a pattern that does not take a shape."""


@dataclass(frozen=True, slots=True)
class ExecutorTrial:
    """The error of one tensor of one executor in one dtype and shape."""

    executor: str
    dtype: str
    case: CallCase
    result: Error


@dataclass(slots=True)
class Verdict:
    """All that was compared, and what differs.

    `pairs` and `hidden` count pairs of a query and a key that were compared with the evaluator, by the mask where
    `by_mask`, else by the outputs; `rows` counts outputs that were compared with it, `tokens` those of recurrences.
    `left_out` holds the shapes that the pattern refuses. Where it `is_plain`, outputs follow from the mask.
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
        """Say what was not compared; empty where everything was."""
        return [text for text, _ in self.gaps]

    @property
    def gaps(self) -> list[tuple[str, str]]:
        """Say what was not compared, each with a remedy."""
        found = [
            (f"`{clause.text}` ({clause.where}) was {clause.missing}", remedy(self.look, clause))
            for clause in self.look.clauses
            if not clause.is_settled
        ]
        rest = self._rest()
        return [*found, *((text, remedy(self.look)) for text in rest)]

    def _rest(self) -> list[str]:
        found = []
        if self.look.degenerate:
            found.append("the scaled parameters decide a clause that the pattern's own leave open")
        if not self.errors:
            found.append("no call was compared")
        boundless = {(e.dtype, e.result.tensor) for e in self.errors if not isfinite(e.result.allowed)}
        for dtype, name in sorted(boundless):
            found.append(f"{name} in {dtype} was held against nothing: torch's own is not finite")
        if has_state(self.look.choice.bound) and not (self.tokens or self.rows):
            found.append("no token was compared with the evaluator")
        elif not (self.is_plain or self.tokens or self.rows):
            found.append("no output was compared with the evaluator")
        if self.look.wanted and not self.pairs:
            found.append("no pair was compared with the evaluator")
        if not (self.hidden or self.look.hides_nothing):
            found.append("no hidden pair was compared with the evaluator")
        return found

    @property
    def agrees(self) -> bool:
        """Whether all that has to be compared was, and nothing differs."""
        return not self.missing and not self.differing and all(e.result.agrees for e in self.errors)

    def worst(self) -> list[ExecutorTrial]:
        """Return for each executor, dtype and tensor the case nearest to, or furthest beyond, what is allowed."""
        found: dict[tuple[str, str, str], ExecutorTrial] = {}
        for e in self.errors:
            key = (e.executor, e.dtype, e.result.tensor)
            if key not in found or _badness(e.result) > _badness(found[key].result):
                found[key] = e
        return list(found.values())


def _badness(e: Error) -> float:
    if not e.agrees:
        return float("inf") if e.error != e.error else 1e9 + e.error
    return e.error / e.allowed if e.allowed else 0.0


def verify(
    attention: Attention,
    chosen: Look,
    others: Sequence[CallCase],
    step: Callable[[str], None],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Verdict:
    """Compare the call that was chosen, and others, which a pattern may refuse; `step` is told of each."""
    verdict = Verdict(chosen, attention.has_mask, attention.is_plain)
    step(str(chosen.case))
    _compare(attention, chosen, verdict, dtypes)
    for case in others:
        step(str(case))
        found = _first_taken(chosen, case)
        if found is None:
            verdict.left_out.append(case)
        else:
            _compare(attention, found, verdict, dtypes)
    return verdict


def _first_taken(chosen: Look, case: CallCase) -> Look | None:
    """Return what the evaluator says of a shape, or of one a little longer; None where the pattern takes neither."""
    longer = range(1, LONGER) if case.n_q == case.n_k else ()
    for shape in (case, *(replace(case, n_q=case.n_q + more, n_k=case.n_k + more) for more in longer)):
        try:
            return _looked(chosen, shape)
        except (SpecError, EvaluationError) as error:
            codes = {d.code for d in error.diagnostics}
            if not codes <= (REFUSALS if shape.n_q == shape.n_k else REFUSALS | {"A902"}):
                raise
            if codes != {"A906"}:
                return None
    return None


def _looked(chosen: Look, case: CallCase) -> Look:
    """Return what the evaluator says of another call with the parameters that were chosen."""
    try:
        return look(chosen.choice, case, FEW_PAIRS)
    except EvaluationError as error:
        if {d.code for d in error.diagnostics} != {"A902"} or case.own_size is not None:
            raise
        return look(chosen.choice, replace(case, own_size=case.n_k), FEW_PAIRS)


def _compare(attention: Attention, found: Look, verdict: Verdict, dtypes: Sequence[torch.dtype]) -> None:
    verdict.cases.append(found.case)
    mask = _relation(attention, found, verdict)
    _check_outputs(attention, found, verdict)
    _run(attention, found, mask, verdict, dtypes)


def _run(attention: Attention, found: Look, mask: Tensor, verdict: Verdict, dtypes: Sequence[torch.dtype]) -> None:
    """Run every executor, forward and backward.

    What torch would write of a pattern that is not plain is the reference executor: that one is held by the evaluator
    alone, as beside itself it would always agree.
    """
    numbers, case = found.numbers, found.case
    made = torch.Generator().manual_seed(1)
    grad = torch.randn((case.batch, case.heads, case.n_q, case.dv), generator=made, dtype=torch.float64)
    grad_lse = torch.randn((case.batch, case.heads, case.n_q), generator=made, dtype=torch.float64)
    has_parts = bool(attention.pattern.selections) or len(attention.pattern.nodes) > 1
    references = [("reference", torch.float64)] if attention.is_plain else []
    for executor, dtype in (*references, *(("cpu", dtype) for dtype in dtypes)):
        call = attention if executor == "cpu" else attention.reference

        def run(q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Any] = call) -> tuple[Tensor, Tensor]:
            return _called(call, attention, numbers.inputs, q, k, v)

        dense = None if attention.is_plain else partial(_called, attention.reference, attention, numbers.inputs)
        q, k, v = (x.to(dtype) for x in (numbers.q, numbers.k, numbers.v))
        probe = Probe(q, k, v, mask, grad, grad_lse if attention.has_lse else None, dense, has_parts)
        name = str(dtype).removeprefix("torch.")
        verdict.errors.extend(ExecutorTrial(executor, name, case, error) for error in compare(run, probe))


def _called(
    call: Callable[..., Any], attention: Attention, inputs: dict[str, object], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse); zeros for an LSE that the pattern does not have."""
    if not attention.has_lse:
        return call(q, k, v, **inputs), torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    out, lse = call(q, k, v, return_lse=True, **inputs)
    return out, lse


# --- the relation -----------------------------------------------------------------------------------------------------


def _relation(attention: Attention, found: Look, verdict: Verdict) -> Tensor:
    """Return the mask (batch, heads, Nq, Nk), compared with the evaluator's; all true where there is none."""
    case, numbers = found.case, found.numbers
    mask = torch.ones((case.batch, case.heads, case.n_q, case.n_k), dtype=torch.bool)
    if not attention.has_mask:
        return mask
    read: dict[str, Any] = {name: x for name, x in numbers.inputs.items() if name in attention.relation_inputs}
    counts: dict[str, Any] = {"heads": case.heads, "kv_heads": case.kv_heads}
    if attention.pattern.selections:
        read, counts = {**numbers.inputs, "q": numbers.q, "k": numbers.k}, {}
    for head in range(case.heads):
        mask[:, head] = attention.mask(case.n_q, case.n_k, head=head, **counts, **read)
    rows = list(found.rows)
    for (batch, head), wanted in found.wanted.items():
        verdict.pairs += wanted.numel()
        verdict.hidden += int((~wanted).sum())
        for row, key in (wanted != mask[batch, head, rows]).nonzero().tolist()[:1]:
            verdict.differing.append(
                f"{case}: batch {batch}, head {head}, query {rows[row]}, key {key}: the evaluator says "
                f"{'visible' if wanted[row, key] else 'hidden'}"
            )
    return mask


# --- outputs ----------------------------------------------------------------------------------------------------------


def _check_outputs(attention: Attention, found: Look, verdict: Verdict) -> None:
    """Compare the reference executor's output and LSE with the evaluator's, of some rows where they cost much."""
    bound, case = found.choice.bound, found.case
    if attention.is_plain:
        return
    oracle = Evaluator(bound, queries=case.n_q, keys=case.n_k, inputs=found.numbers.inputs, **case.counts)
    is_short = case.n_q * case.batch * case.heads <= ORACLE_TOKENS
    if bound.program.recurrence is not None:
        if is_short or not verdict.tokens:
            _check_tokens(attention, found, oracle, verdict)
        return
    rows = _some_rows(found, needs_one=not verdict.rows)
    if not rows or (has_state(bound) and verdict.rows and not is_short):
        return
    q, k, v = (x.tolist() for x in (found.numbers.q, found.numbers.k, found.numbers.v))
    wanted = [torch.tensor(x, dtype=torch.float64) for x in oracle.attend(q, k, v, only=rows)]
    got = _called(
        attention.reference, attention, found.numbers.inputs, found.numbers.q, found.numbers.k, found.numbers.v
    )
    verdict.rows += len(rows) * case.batch * case.heads
    for name, a, b in list(zip(("out", "lse"), wanted, got, strict=True))[: 2 if attention.has_lse else 1]:
        _note(verdict, case, name, a, b[:, :, rows])
    if not attention.has_mask:
        for wanted_rows in found.wanted.values():
            verdict.pairs += len(rows) * case.n_k
            own = [i for i, row in enumerate(found.rows) if row in set(rows)]
            verdict.hidden += int((~wanted_rows[own]).sum())


def _some_rows(found: Look, *, needs_one: bool) -> list[int]:
    """Return the rows of which outputs are evaluated: the last ones see most."""
    case = found.case
    terms = case.n_k**2 * case.batch * case.heads
    if loops(found.choice.bound):
        terms *= max(case.n_k // 4, 1)
    most = ORACLE_TERMS // max(terms, 1) or int(needs_one)
    return list(found.rows[-most:]) if most else []


def _check_tokens(attention: Attention, found: Look, oracle: Evaluator, verdict: Verdict) -> None:
    """Compare what tokens of a recurrence get, and the states after them, with the evaluator's."""
    case, numbers = found.case, found.numbers
    out, states = oracle.recur(*(x.tolist() for x in (numbers.q, numbers.k, numbers.v)))
    given: dict[str, Any] = dict(numbers.inputs)
    got = attention.reference(numbers.q, numbers.k, numbers.v, **given)
    _, last = attention(numbers.q, numbers.k, numbers.v, return_state=True, **given)
    verdict.tokens += case.n_q * case.batch * case.heads
    for name, a, b in [("out", out, got), *((name, states[name], last[name]) for name in states)]:
        kind = torch.complex128 if b.is_complex() else torch.float64
        _note(verdict, case, name, torch.tensor(a, dtype=kind).reshape(b.shape), b)


def _note(verdict: Verdict, case: CallCase, name: str, wanted: Tensor, got: Tensor) -> None:
    error = float(torch.where(wanted == got, 0, (wanted - got).abs()).max()) if got.numel() else 0.0
    if not error <= SCORE_TOLERANCE:
        verdict.differing.append(f"{case}: the evaluator's {name} differs by {error:.1e}")
