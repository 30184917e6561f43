"""Kernels of attention keep documents apart, NaN and infinities included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.decode_kernels import find_decode
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.visible_products import RESULT_SUM
from attnc.compiler.last_rows import last_rows
from attnc.runtime.attention import Attention
from attnc.runtime.gpu import gpu_executor
from attnc.runtime.gpu.compiling import CompiledBinary, compile_all
from kernel_calls import Launch, recorded
from plan_calls import from_library

# Three documents in one tile; what the middle one holds must reach neither of the others.

N, BORDERS = 30, (11, 20)
MIDDLE = slice(*BORDERS)
OTHERS = [*range(BORDERS[0]), *range(BORDERS[1], N)]
CUT = torch.tensor([0, *BORDERS, N])
IDS = torch.bucketize(torch.arange(N), torch.tensor(BORDERS), right=True)

BY_IDS = """
pattern by_ids
    input   x: int[batch, token]
    visible x[k] == x[q] and k <= q
"""
WINDOW_BY_IDS = """
pattern window_by_ids
    input   x: int[token]
    visible x[k] == x[q] and 0 <= q - k and (q - k < 4 or (q - k) % 3 == 0)
    score   scale * dot(q, k) - 0.1 * (q - k)
"""
PADDED = """
pattern padded
    input   real: bool[batch, token]
    visible real[k] and k <= q
"""

CASES: list[tuple[str, dict[str, Any], tuple[int, int], dict[str, Tensor], float]] = [
    ("causal", {}, (1, 1), {"cu_seqlens": CUT}, math.nan),
    ("causal", {}, (1, 1), {"cu_seqlens": CUT}, math.inf),
    ("sliding_window", {"window": 6, "sinks": 2}, (1, 1), {"cu_seqlens": CUT}, -math.inf),
    ("alibi", {}, (2, 1), {"cu_seqlens": CUT}, math.nan),
    ("fox", {}, (1, 1), {"cu_seqlens": CUT, "f": -torch.rand(1, N, 1)}, math.inf),
    ("softplus_lssa", {}, (1, 1), {"cu_seqlens": CUT}, math.nan),
    ("document", {}, (1, 1), {"doc": IDS[None]}, math.nan),
    (BY_IDS, {}, (1, 1), {"x": IDS[None]}, math.nan),
    (WINDOW_BY_IDS, {}, (1, 1), {"x": IDS}, math.inf),
    (PADDED, {}, (1, 1), {"real": IDS[None] != 1}, math.nan),
]


class Results(dict[str, Tensor]):
    """Out, LSE and gradients of q, k, v and inputs by token, by name."""

    def others(self) -> dict[str, Tensor]:
        """Return the results of tokens of the other documents."""
        return {name: x[:, :, OTHERS] if x.ndim > 3 or name == "lse" else x[:, OTHERS] for name, x in self.items()}


def computed(attend: Attention, vectors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Results:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in vectors.items() if name != "grad"}
    leaves |= {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    q, k, v = (leaves[name] for name in "qkv")
    given: dict[str, Any] = {name: leaves.get(name, x) for name, x in inputs.items()}
    lse = {}
    if attend.has_lse:
        out, lse["lse"] = attend(q, k, v, return_lse=True, **given)
    else:
        out = attend(q, k, v, **given)
    grads = torch.autograd.grad(out, [*leaves.values()], vectors["grad"])
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return Results(out=out.detach(), **named, **{name: x.detach() for name, x in lse.items()})


def drawn(heads: tuple[int, int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    of = {"q": heads[0], "k": heads[1], "v": heads[1], "grad": heads[0]}
    return {name: torch.randn(1, count, N, 16) for name, count in of.items()}


def spoiled(vectors: Mapping[str, Tensor], bad: float) -> dict[str, Tensor]:
    """Return the vectors with `bad` in one token of the middle document, a different token in each tensor."""
    found = {name: x.clone() for name, x in vectors.items()}
    for token, x in enumerate(found.values(), BORDERS[0] + 1):
        x[:, :, token, ::2] = bad
    return found


@pytest.mark.parametrize(
    ("pattern", "params", "heads", "inputs", "bad"), CASES, ids=[f"{case[0].split()[-1]}-{case[4]}" for case in CASES]
)
def test_no_document_reaches_another(
    pattern: str, params: dict[str, Any], heads: tuple[int, int], inputs: dict[str, Tensor], bad: float
) -> None:
    """Kernels multiplied what other documents hold by 0: NaN in out and in every gradient."""
    attend, vectors = compile_attention(pattern, backend="triton", **params), drawn(heads)
    if pattern is PADDED:
        vectors["grad"][:, :, MIDDLE] = 0
    clean = computed(attend, vectors, inputs)
    if pattern is PADDED:  # rows of the padding see tokens that are none: only keys and values are hidden from all
        hidden = {**vectors, **{name: x for name, x in spoiled(vectors, bad).items() if name in "kv"}}
    else:
        hidden = spoiled(vectors, bad)
    found = computed(attend, hidden, inputs)
    assert {*found} >= {"out", "dq", "dk", "dv"}
    for name, x in found.others().items():
        assert torch.equal(x, clean.others()[name]), name
    assert pattern is PADDED or not found["out"][:, :, MIDDLE].isfinite().all()


# --- what remains ----------------------------------------------------------------------------------------------------


def by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within the documents of one head, row by row, from the visible keys alone."""
    rows = []
    for row in range(N):
        seen = slice(int(CUT[row >= CUT].max()), row + 1)
        weights = torch.softmax(k[seen] @ q[row] / 4, 0)
        rows.append((weights[:, None] * v[seen]).sum(0))
    return torch.stack(rows)


def test_what_is_visible_stays_visible() -> None:
    """Infinities and NaN of visible values and output gradients arrive, each with its sign."""
    vectors = drawn((1, 1))
    vectors["v"][0, 0, 12, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    vectors["v"][0, 0, 14, :3] = torch.tensor([0.0, math.inf, math.inf])
    vectors["v"][0, 0, 2, 1:4] = math.inf
    vectors["grad"][0, 0, 25, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    found = computed(compile_attention("causal", backend="triton"), vectors, {"cu_seqlens": CUT})
    leaves = [vectors[name][0, 0].double().requires_grad_() for name in "qkv"]
    out = by_rows(*leaves)
    grads = torch.autograd.grad(out, leaves, vectors["grad"][0, 0].double())
    assert torch.allclose(found["out"][0, 0].double(), out, atol=1e-5, equal_nan=True)
    assert torch.allclose(found["dv"][0, 0].double(), grads[2], atol=1e-5, equal_nan=True)
    for name, x in zip(("dq", "dk"), grads[:2], strict=True):
        assert torch.equal(found[name][0, 0].isfinite(), x.isfinite()), name


def careful(launches: Sequence[Launch]) -> list[Launch]:
    return [one for one in launches if one.source.function.endswith("_careful")]


def test_finite_calls_need_no_careful_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They return at once; where they are made to run they write the same bits."""
    attend, vectors, inputs = compile_attention("causal", backend="triton"), drawn((1, 1)), {"cu_seqlens": CUT}
    with recorded() as launches:
        found = computed(attend, vectors, inputs)
    assert [one.source.stage for one in careful(launches)] == ["forward", "dq", "dkdv"]
    for one in careful(launches):
        place = [argument.name for argument in one.source.arguments].index(RESULT_SUM.name)
        assert one.arguments[place].isfinite()  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_executor, "result_sum", lambda *results: torch.tensor(math.nan))
    forced = computed(attend, vectors, inputs)
    assert all(torch.equal(x, forced[name]) for name, x in found.items())


def test_only_inputs_that_hide_tokens_make_careful_kernels() -> None:
    with recorded(run=False) as launches:
        for pattern in ("causal", "alibi"):
            computed(compile_attention(pattern, backend="triton"), drawn((1, 1)), {})
    assert launches
    assert not careful(launches)


def test_steps_against_a_cache() -> None:
    """Rows of one step in two documents: the second reads no value of the first."""
    attend, vectors = compile_attention("document", backend="triton"), drawn((2, 1))
    q = vectors["q"][:, :, -12:]
    call: dict[str, Any] = {"kv_len": N, "doc": IDS[None]}
    clean = attend.decode(q, vectors["k"], vectors["v"], return_lse=True, **call)
    vectors["v"][:, :, 19] = math.nan
    vectors["k"][:, :, 19, 0] = math.inf
    found = attend.decode(q, vectors["k"], vectors["v"], return_lse=True, **call)
    second = BORDERS[1] - (N - 12)
    for own, other in zip(found, clean, strict=True):
        assert torch.equal(own[:, :, second:], other[:, :, second:])
    assert found[0][:, :, second - 1].isnan().all()


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
def test_careful_kernels_compile_for_a_gpu() -> None:
    """For sm_90, through boxes and through pointers: they take no more shared memory than there is."""
    pattern, heads, target = from_library("document"), HeadShape(64, 64, "bfloat16", grouped=False), TARGETS["sm_90"]
    kernels = find_kernels(pattern, heads, target).careful
    step = find_decode(last_rows(pattern), heads, target, "pages").careful(16)
    assert kernels is not None
    assert step is not None
    for _, found in compile_all([(one, "sm_90") for one in (kernels.dq, step)], 2):
        assert isinstance(found, CompiledBinary)
        assert found.shared <= target.shared_kib * 1024
        assert found.code.products
