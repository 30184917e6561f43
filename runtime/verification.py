"""Holding the executors against the oracle: the evaluator's relation, and dense attention in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.accuracy import Error, Probe, compare
from attnc.runtime.attention import Attention
from attnc.runtime.example_inputs import example_inputs, head_count
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.meaning.evaluate import Evaluator

RUNS = (("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16))
SCORE_TOLERANCE = 1e-9
ORACLE_PAIRS = 4096
"""Up to this many pairs a head, the relation is evaluated pair by pair."""

ORACLE_TERMS = 1 << 15
"""Scores, weights and values are, where there are up to this many pairs times keys over all heads."""

ORACLE_ENTRIES = 1 << 18
"""Recurrences are, where there are up to this many tokens times dk times dv over all heads."""


@dataclass(frozen=True, slots=True)
class Case:
    """The shape of one call."""

    n_q: int
    n_k: int
    batch: int
    heads: int
    kv_heads: int
    dk: int
    dv: int

    def __str__(self) -> str:
        lengths = str(self.n_q) if self.n_q == self.n_k else f"{self.n_q}→{self.n_k}"
        return f"length {lengths}, batch {self.batch}, heads {self.heads}/{self.kv_heads}, dims {self.dk}/{self.dv}"


@dataclass(frozen=True, slots=True)
class Trial:
    """The error of one tensor of one executor in one dtype and shape."""

    executor: str
    dtype: str
    case: Case
    result: Error


@dataclass(slots=True)
class Verdict:
    """All that was tried: pairs, or tokens, compared with the evaluator, those that differ, errors, inputs.

    `left_out` are the shapes that the pattern's `require` refuses.
    """

    pairs: int = 0
    tokens: int = 0
    differing: list[str] = field(default_factory=list)
    errors: list[Trial] = field(default_factory=list)
    left_out: list[Case] = field(default_factory=list)
    examples: dict[str, None] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether something was tried, and nothing differs."""
        return bool(self.errors) and not self.differing and all(e.result.agrees for e in self.errors)

    def worst(self) -> list[Trial]:
        """For each executor, dtype and tensor the case nearest to, or furthest beyond, what is allowed."""
        found: dict[tuple[str, str, str], Trial] = {}
        for e in self.errors:
            key = (e.executor, e.dtype, e.result.tensor)
            if key not in found or _badness(e.result) > _badness(found[key].result):
                found[key] = e
        return list(found.values())


def _badness(e: Error) -> float:
    if not e.agrees:
        return float("inf") if e.error != e.error else 1e9 + e.error
    return e.error / e.allowed if e.allowed else 0.0


def cases(attention: Attention, length: int | None) -> list[Case]:
    """A handful of awkward shapes; `length` is the one that the pattern's tokens demand, None where any will do."""
    heads = head_count(attention.bound)
    shapes = [
        Case(1, 1, 1, 1, 1, 8, 8),
        Case(13, 13, 1, 2, 1, 6, 6),
        Case(31, 31, 2, 6, 2, 16, 24),
        Case(64, 64, 1, 2, 1, 31, 8),
        Case(129, 129, 1, 5, 1, 72, 40),
        Case(137, 137, 1, 7, 7, 9, 64),
    ]
    program = attention.bound.program
    if program.align is not None or not program.needs_align:
        shapes.append(Case(17, 45, 1, 3, 1, 16, 16))
    if length is not None:
        shapes = [Case(length, length, s.batch, s.heads, s.kv_heads, s.dk, s.dv) for s in shapes[1:4]]
    if heads is not None:
        shapes = [Case(s.n_q, s.n_k, s.batch, heads, heads if i % 2 else 1, s.dk, s.dv) for i, s in enumerate(shapes)]
    return shapes


def verify(attention: Attention, shapes: list[Case], step: Callable[[str], None]) -> Verdict:
    """Try every shape; `step` is told of each."""
    verdict = Verdict()
    for i, case in enumerate(shapes):
        step(str(case))
        try:
            _verify_case(attention, case, verdict, seed=i)
        except (SpecError, EvaluationError) as error:
            if not {d.code for d in error.diagnostics} <= {"A805", "A906"}:
                raise
            verdict.left_out.append(case)
    return verdict


def _verify_case(attention: Attention, case: Case, verdict: Verdict, seed: int) -> None:
    examples = example_inputs(
        attention.bound,
        case.n_q,
        case.n_k,
        {},
        batch=case.batch,
        heads=case.heads,
        sizes={"kv_head": case.kv_heads, "dk": case.dk, "dv": case.dv},
    )
    inputs: dict[str, object] = {name: example.tensor for name, example in examples.items()}
    verdict.examples.update(dict.fromkeys(examples))
    mask = _relation(attention, case, inputs, verdict)
    made = torch.Generator().manual_seed(seed)
    q, k, v, *grads = (
        torch.randn(shape, generator=made, dtype=torch.float64)
        for shape in (
            (case.batch, case.heads, case.n_q, case.dk),
            (case.batch, case.kv_heads, case.n_k, case.dk),
            (case.batch, case.kv_heads, case.n_k, case.dv),
            (case.batch, case.heads, case.n_q, case.dv),
            (case.batch, case.heads, case.n_q),
        )
    )
    if attention.is_recurrence:  # as delta rules need it for bounded states
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    _check_scores(attention, case, inputs, (q, k, v), verdict)
    chooses = bool(attention.pattern.selections)
    for executor, dtype in RUNS:
        call = attention if executor == "cpu" else attention.reference

        def run(q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Any] = call) -> tuple[Tensor, Tensor]:
            return _called(call, attention, inputs, q, k, v)

        dense = None if attention.is_plain else partial(_called, attention.reference, attention, inputs)
        grad_lse = grads[1] if attention.has_lse else None
        probe = Probe(q.to(dtype), k.to(dtype), v.to(dtype), mask, grads[0], grad_lse, dense, chooses)
        name = str(dtype).removeprefix("torch.")
        verdict.errors.extend(Trial(executor, name, case, error) for error in compare(run, probe))


def _called(
    call: Callable[..., Any], attention: Attention, inputs: dict[str, object], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse); zeros for an LSE that there is not."""
    if not attention.has_lse:
        return call(q, k, v, **inputs), torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    out, lse = call(q, k, v, return_lse=True, **inputs)
    return out, lse


def _check_scores(
    attention: Attention, case: Case, inputs: dict[str, object], tensors: tuple[Tensor, ...], verdict: Verdict
) -> None:
    """The reference's output and LSE against the evaluator's, where that is quick."""
    if attention.is_recurrence:
        _check_tokens(attention, case, inputs, tensors, verdict)
        return
    if attention.is_plain or case.n_q * case.n_k**2 * case.batch * case.heads > ORACLE_TERMS:
        return
    counts = {"heads": case.heads, "kv_heads": case.kv_heads, "dk": case.dk, "dv": case.dv}
    oracle = Evaluator(attention.bound, queries=case.n_q, keys=case.n_k, inputs=inputs, **counts)
    wanted = [torch.tensor(x, dtype=torch.float64) for x in oracle.attend(*(x.tolist() for x in tensors))]
    q, k, v = tensors
    found = _called(attention.reference, attention, inputs, q, k, v)
    for name, a, b in list(zip(("out", "lse"), wanted, found, strict=True))[: 2 if attention.has_lse else 1]:
        error = float(torch.where(a == b, 0, (a - b).abs()).max())
        if not error <= SCORE_TOLERANCE:
            verdict.differing.append(f"{case}: the evaluator's {name} differs by {error:.1e}")


def _check_tokens(
    attention: Attention, case: Case, inputs: dict[str, object], tensors: tuple[Tensor, ...], verdict: Verdict
) -> None:
    """The same of a recurrence: what tokens get, and the states after them."""
    if case.n_q * case.dk * case.dv * case.batch * case.heads > ORACLE_ENTRIES:
        return
    counts = {"heads": case.heads, "kv_heads": case.kv_heads, "dk": case.dk, "dv": case.dv}
    oracle = Evaluator(attention.bound, queries=case.n_q, keys=case.n_k, inputs=inputs, **counts)
    out, states = oracle.recur(*(x.tolist() for x in tensors))
    q, k, v = tensors
    given: dict[str, Any] = dict(inputs)
    found = attention.reference(q, k, v, **given)
    _, last = attention(q, k, v, return_state=True, **given)
    verdict.tokens += case.n_q * case.batch * case.heads
    for name, a, b in [("out", out, found), *((name, states[name], last[name]) for name in states)]:
        wanted = torch.tensor(a, dtype=torch.complex128 if b.is_complex() else torch.float64).reshape(b.shape)
        error = float(torch.where(wanted == b, 0, (wanted - b).abs()).max()) if b.numel() else 0.0
        if not error <= SCORE_TOLERANCE:
            verdict.differing.append(f"{case}: the evaluator's {name} differs by {error:.1e}")


def _relation(attention: Attention, case: Case, inputs: dict[str, object], verdict: Verdict) -> Tensor:
    """The mask (batch, heads, Nq, Nk), compared with the evaluator's where that is quick."""
    counts = {"heads": case.heads, "kv_heads": case.kv_heads}
    mask = torch.ones((case.batch, case.heads, case.n_q, case.n_k), dtype=torch.bool)
    if not attention.has_mask or attention.pattern.selections:  # of which vectors decide
        return mask
    read = {name: x for name, x in inputs.items() if name in attention.relation_inputs}
    for head in range(case.heads):
        mask[:, head] = attention.mask(case.n_q, case.n_k, head=head, **counts, **read)  # type: ignore[arg-type]
    if case.n_q * case.n_k <= ORACLE_PAIRS:
        sizes = {"dk": case.dk, "dv": case.dv}
        oracle = Evaluator(attention.bound, queries=case.n_q, keys=case.n_k, inputs=inputs, **counts, **sizes)
        for batch, head in _corners(case):
            wanted = torch.tensor(oracle.mask(head=head, batch=batch)).reshape(case.n_q, case.n_k)
            verdict.pairs += wanted.numel()
            for row, key in (wanted != mask[batch, head]).nonzero().tolist()[:1]:
                verdict.differing.append(
                    f"{case}: batch {batch}, head {head}, query {row}, key {key}: the evaluator says "
                    f"{'visible' if wanted[row, key] else 'hidden'}"
                )
    return mask


def _corners(case: Case) -> Iterator[tuple[int, int]]:
    for batch in range(case.batch):
        yield from ((batch, head) for head in sorted({0, case.heads - 1}))
