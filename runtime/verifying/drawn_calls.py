"""Comparison of two patterns by calls with drawn queries, keys, values and inputs, computed by the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from attnc.compiler.comparison.comparing import Witness
from attnc.compiler.comparison.equality import Difference
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.example_inputs import example_inputs
from attnc.spec.errors import EvaluationError, SpecError

D = TypeVar("D")

WIDTH = 8
"""The dk and dv of drawn calls."""

SCALE = 0.37
"""The scale of drawn calls: not `dk ** -0.5`, so that a pattern that ignores `scale` differs from one that reads it."""

TOLERANCE = 1e-9
"""Maximum error, relative to the largest result, that fp64 rounding explains."""

_REFUSED = {"A805", "A906"}
"""Error codes for a length that `require` refuses."""


@dataclass(frozen=True)
class CallDifference:
    """The query whose results differ most in a drawn call.

    `k`: the key on which the two results depend most differently, None where they depend on all keys equally; `error`:
    the largest difference of an entry.
    """

    q: int
    k: int | None
    head: int
    length: int
    group: int
    error: float


def compare_calls(
    one: Attention, other: Attention, lengths: Iterable[int], heads: int, groups: Sequence[int]
) -> tuple[int, CallDifference | None] | None:
    """Compare results at the first of `lengths` that both patterns allow; None where they allow none.

    Returns that length, and the difference or, where all results are equal, None. Raises ArgumentError where an input
    has no example, and the errors of the calls.
    """
    return _first_allowed(lengths, groups, partial(_difference, one, other, heads))


def compare_masks(
    one: Attention, other: Attention, lengths: Iterable[int], heads: int, groups: Sequence[int]
) -> tuple[int, Witness | None] | None:
    """Compare visible pairs for drawn inputs as `compare_calls` compares results.

    Raises ArgumentError where an input has no example, and the errors of `Attention.mask`.
    """
    return _first_allowed(lengths, groups, partial(_mask_difference, one, other, heads))


def _first_allowed(
    lengths: Iterable[int], groups: Sequence[int], compare: Callable[[int, int], D | None]
) -> tuple[int, D | None] | None:
    """Return the first length that `require` allows, with a difference in any of the groups."""
    for n in lengths:
        try:
            differences = (compare(n, group) for group in groups)
            return n, next((difference for difference in differences if difference is not None), None)
        except (SpecError, EvaluationError) as error:
            if not {d.code for d in error.diagnostics} <= _REFUSED:
                raise
    return None


def _mask_difference(one: Attention, other: Attention, heads: int, n: int, group: int) -> Witness | None:
    counts: dict[str, Any] = {"heads": heads, "kv_heads": heads // group}
    inputs_of_patterns: list[dict[str, Any]] = []
    for pattern in (one, other):
        inputs = _inputs(pattern, n, heads, heads // group, of_length_1=False)
        inputs_of_patterns.append({name: x for name, x in inputs.items() if name in pattern.relation_inputs})
    for head in range(heads):
        a, b = (
            pattern.mask(n, head=head, **counts, **inputs)
            for pattern, inputs in zip((one, other), inputs_of_patterns, strict=True)
        )
        for pair in (a != b).reshape(-1, n, n)[0].nonzero().tolist()[:1]:
            q, k = pair
            return Witness(Difference(q, k, n, bool(a.reshape(-1, n, n)[0, q, k])), head, group)
    return None


def _difference(one: Attention, other: Attention, heads: int, n: int, group: int) -> CallDifference | None:
    kv_heads = heads // group
    bounded = any(p.is_recurrence or p.pattern.stateful for p in (one, other))  # so that states stay small
    q, k, v = _vectors(n, heads, kv_heads, of_length_1=bounded)
    results = [_called(p, q, k, v, _inputs(p, n, heads, kv_heads, of_length_1=bounded)) for p in (one, other)]
    for a, b in zip(*results, strict=True):
        if a is None or b is None:
            continue
        error = _errors(a.detach(), b.detach())
        worst = int(error.argmax())
        if float(error.flatten()[worst]) > 0:
            head, row = divmod(worst, n)
            key = _key(a[0, head, row], b[0, head, row], (k, v), head // group)
            return CallDifference(row, key, head, n, group, float(error.flatten()[worst]))
    return None


def _vectors(n: int, heads: int, kv_heads: int, *, of_length_1: bool) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(32)
    q, k, v = (
        torch.randn((1, count, n, WIDTH), generator=draw, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)
    )
    if of_length_1:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return q, k.requires_grad_(), v.requires_grad_()


def _inputs(pattern: Attention, n: int, heads: int, kv_heads: int, *, of_length_1: bool) -> dict[str, Tensor]:
    """Return drawn inputs: real numbers differ between names, and are equal for one name in two patterns."""
    sizes = {"kv_head": kv_heads, "dk": WIDTH, "dv": WIDTH}
    examples = example_inputs(pattern.bound, n, n, {}, heads=heads, sizes=sizes)
    kinds = {item.name: item.type for item in pattern.bound.program.inputs}
    inputs = {}
    for name, example in examples.items():
        x = example.tensor
        if x.is_floating_point():
            # Examples use seed 0; another seed must still respect the type's refinement.
            draw = torch.Generator().manual_seed(crc32(name.encode()))
            normal = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            match kinds[name].refinement:
                case "unit":
                    x = normal.sigmoid()
                case "log_decay":
                    x = -normal.abs()
                case "positive":
                    x = normal.exp()
                case _ if of_length_1 and kinds[name].dims[-1:] in (("dk",), ("dv",)):
                    x = torch.nn.functional.normalize(normal, dim=-1)
                case _:
                    x = normal
        inputs[name] = x
    return inputs


def _called(
    pattern: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse) of the reference in fp64; lse (1, heads, n, 1), None where the pattern has none."""
    if not pattern.has_lse:
        return pattern.reference(q, k, v, scale=SCALE, **inputs), None
    out, lse = pattern.reference(q, k, v, scale=SCALE, return_lse=True, **inputs)
    return out, lse[..., None]


def _errors(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest difference of each head and query (heads, n), 0 where rounding explains it."""
    if a.shape != b.shape:
        return torch.full(a.shape[1:3], torch.inf, dtype=torch.float64)
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    apart = torch.where(a.isnan() ^ b.isnan(), torch.inf, apart)
    largest = max(float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for x in (a, b))
    worst = apart[0].amax(-1)
    return torch.where(worst > TOLERANCE * max(1.0, largest), worst, 0.0)


def _key(a: Tensor, b: Tensor, vectors: tuple[Tensor, Tensor], kv_head: int) -> int | None:
    """Return the key whose vectors' gradients differ most between two results; None where no gradient differs."""
    gradients = []
    for result in (a, b):
        if not result.requires_grad:
            return None
        gradients.append(torch.autograd.grad(result.sum(), vectors, retain_graph=True, allow_unused=True))
    apart = torch.zeros(vectors[0].shape[2], dtype=torch.float64)
    for one, other in zip(*gradients, strict=True):
        x, y = (torch.zeros_like(vectors[0]) if grad is None else grad for grad in (one, other))
        apart = apart + (x - y)[0, kv_head].nan_to_num().abs().sum(-1)
    return int(apart.argmax()) if float(apart.max()) > 0 else None
