"""Holding the executors against the oracle: the evaluator's relation, and dense attention in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.runtime.attention import Attention
from attnc.runtime.example_inputs import example_inputs, head_count
from attnc.spec.evaluate import Evaluator

TENSORS = ("out", "lse", "dq", "dk", "dv")
RUNS = (("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16))
TIMES = 2.0
"""Times the error of dense torch in the same dtype that is allowed …"""
UNITS = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 4}
"""… and, beyond that, units in the last place of the largest value.

Dense torch in fp64 is the truth itself. In fp32 the exponential of torch's own fused attention, which the cpu executor
calls, is good to 20 bits, and it is taken twice.
"""
ORACLE_PAIRS = 4096
"""Up to this many pairs a head, the relation is evaluated pair by pair."""


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
class Error:
    """How far one tensor of one run is from fp64, beside dense torch in the same dtype, and what is allowed."""

    executor: str
    dtype: str
    tensor: str
    case: Case
    error: float
    dense: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether it is near enough; an error that is no number never is."""
        return self.error <= self.allowed


@dataclass(slots=True)
class Verdict:
    """All that was tried: pairs compared with the evaluator and those that differ, errors, inputs."""

    pairs: int = 0
    differing: list[str] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    examples: dict[str, None] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and all(e.agrees for e in self.errors)

    def worst(self) -> list[Error]:
        """For each executor, dtype and tensor the case nearest to, or furthest beyond, what is allowed."""
        found: dict[tuple[str, str, str], Error] = {}
        for e in self.errors:
            key = (e.executor, e.dtype, e.tensor)
            if key not in found or _badness(e) > _badness(found[key]):
                found[key] = e
        return list(found.values())


def _badness(e: Error) -> float:
    if not e.agrees:
        return float("inf") if e.error != e.error else 1e9 + e.error
    return e.error / e.allowed


def cases(attention: Attention, length: int | None) -> list[Case]:
    """A handful of awkward shapes; `length` is the one that the pattern's tokens demand, None where any will do."""
    heads = head_count(attention.bound)
    shapes = [
        Case(1, 1, 1, 1, 1, 8, 8),
        Case(31, 31, 2, 6, 2, 16, 24),
        Case(64, 64, 1, 2, 1, 31, 8),
        Case(129, 129, 1, 5, 1, 72, 40),
        Case(137, 137, 1, 7, 7, 9, 64),
    ]
    program = attention.bound.program
    if program.align is not None or not program.needs_align:
        shapes.append(Case(17, 45, 1, 3, 1, 16, 16))
    if length is not None:
        shapes = [Case(length, length, s.batch, s.heads, s.kv_heads, s.dk, s.dv) for s in shapes[1:3]]
    if heads is not None:
        shapes = [Case(s.n_q, s.n_k, s.batch, heads, heads if i % 2 else 1, s.dk, s.dv) for i, s in enumerate(shapes)]
    return shapes


def verify(attention: Attention, shapes: list[Case], step: Callable[[str], None]) -> Verdict:
    """Try every shape; `step` is told of each."""
    verdict = Verdict()
    for i, case in enumerate(shapes):
        step(str(case))
        _verify_case(attention, case, verdict, seed=i)
    return verdict


def _verify_case(attention: Attention, case: Case, verdict: Verdict, seed: int) -> None:
    examples = example_inputs(attention.bound, case.n_q, case.n_k, {}, batch=case.batch, heads=case.heads)
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
    for executor, dtype in RUNS:
        operands = [x.to(dtype) for x in (q, k, v)]

        def run(q: Tensor, k: Tensor, v: Tensor, executor: str = executor) -> tuple[Tensor, Tensor]:
            call = attention if executor == "cpu" else attention.reference
            out, lse = call(q, k, v, return_lse=True, **inputs)  # type: ignore[call-overload]
            return out, lse

        def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return _dense(q, k, v, mask)

        got = _results(run, operands, grads)
        beside = _results(dense, operands, grads)
        truth = _results(dense, [x.double() for x in operands], grads)
        verdict.errors.extend(_compare(executor, dtype, case, got, beside, truth))


def _relation(attention: Attention, case: Case, inputs: dict[str, object], verdict: Verdict) -> Tensor:
    """The mask (batch, heads, Nq, Nk), compared with the evaluator's where that is quick."""
    counts = {"heads": case.heads, "kv_heads": case.kv_heads}
    mask = torch.empty((case.batch, case.heads, case.n_q, case.n_k), dtype=torch.bool)
    for head in range(case.heads):
        mask[:, head] = attention.mask(case.n_q, case.n_k, head=head, **counts, **inputs)  # type: ignore[arg-type]
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


Run = Callable[..., tuple[Tensor, Tensor]]


def _results(run: Run, operands: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """out, lse, dq, dk, dv of a run, as fp64."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    out, lse = run(*leaves)
    finite = torch.where(torch.isneginf(lse), 0, lse)
    torch.autograd.backward([out, finite], [grads[0].to(out.dtype), grads[1].to(lse.dtype)])
    found = [out, lse, *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]
    return [x.detach().double() for x in found]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as anyone would write it in torch."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = mask.any(-1, keepdim=True)
    score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask & seen, -torch.inf)
    lse = torch.logsumexp(score.to(torch.promote_types(score.dtype, torch.float32)), -1)
    out = torch.where(seen, torch.softmax(score, -1), 0) @ v
    return out, torch.where(seen[..., 0], lse, -torch.inf)


def _compare(
    executor: str, dtype: torch.dtype, case: Case, got: list[Tensor], dense: list[Tensor], truth: list[Tensor]
) -> Iterator[Error]:
    name = str(dtype).removeprefix("torch.")
    for tensor, a, b, c in zip(TENSORS, got, dense, truth, strict=True):
        scale = float(torch.where(torch.isfinite(c), c, 0).abs().max()) if c.numel() else 0.0
        beside = _distance(b, c)
        allowed = TIMES * beside + UNITS[dtype] * torch.finfo(dtype).eps * max(scale, 1e-3)
        yield Error(executor, name, tensor, case, _distance(a, c), beside, allowed)


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinities must be equal. NaN where there is one."""
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else float("inf")
    return float(torch.where(a == b, 0, (a - b).abs()).max())
