"""Attention kernels keep documents apart, even where another document holds NaN or infinities."""

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
from attnc.compiler.passes.last_rows import last_rows
from attnc.runtime.api.attention import Attention
from attnc.runtime.executors.triton import gpu_executor
from attnc.runtime.toolchain.compiling import CompiledBinary
from compiled_kernels import Compiler
from kernel_calls import Launch, recorded
from plan_calls import from_library

# Three documents in one tile: no number of the middle document may reach the other two.

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
    """Out, LSE and the gradients of q, k, v and inputs, each by token, under their names."""

    def others(self) -> dict[str, Tensor]:
        """Return the results of tokens of the other documents."""
        return {name: x[:, :, OTHERS] if x.ndim > 3 or name == "lse" else x[:, OTHERS] for name, x in self.items()}


def attention_results(attend: Attention, vectors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Results:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in vectors.items() if name != "grad"}
    leaves |= {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    q, k, v = (leaves[name] for name in "qkv")
    inputs_of_call: dict[str, Any] = {name: leaves.get(name, x) for name, x in inputs.items()}
    lse = {}
    if attend.has_lse:
        out, lse["lse"] = attend(q, k, v, return_lse=True, **inputs_of_call)
    else:
        out = attend(q, k, v, **inputs_of_call)
    grads = torch.autograd.grad(out, [*leaves.values()], vectors["grad"])
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return Results(out=out.detach(), **named, **{name: x.detach() for name, x in lse.items()})


def draw_vectors(heads: tuple[int, int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    of = {"q": heads[0], "k": heads[1], "v": heads[1], "grad": heads[0]}
    return {name: torch.randn(1, count, N, 16) for name, count in of.items()}


def with_bad_tokens(vectors: Mapping[str, Tensor], bad: float) -> dict[str, Tensor]:
    """Return the vectors with `bad` in one token of the middle document, a different token in each tensor."""
    results = {name: x.clone() for name, x in vectors.items()}
    for token, x in enumerate(results.values(), BORDERS[0] + 1):
        x[:, :, token, ::2] = bad
    return results


@pytest.mark.parametrize(
    ("pattern", "params", "heads", "inputs", "bad"), CASES, ids=[f"{case[0].split()[-1]}-{case[4]}" for case in CASES]
)
def test_documents_do_not_reach_each_other(
    pattern: str, params: dict[str, Any], heads: tuple[int, int], inputs: dict[str, Tensor], bad: float
) -> None:
    """Kernels multiplied other documents' numbers by 0: NaN in out and in every gradient."""
    attend, vectors = compile_attention(pattern, backend="triton", **params), draw_vectors(heads)
    if pattern is PADDED:
        vectors["grad"][:, :, MIDDLE] = 0
    clean = attention_results(attend, vectors, inputs)
    if pattern is PADDED:  # padding rows see padding tokens: only keys and values are hidden from every row
        hidden = {**vectors, **{name: x for name, x in with_bad_tokens(vectors, bad).items() if name in "kv"}}
    else:
        hidden = with_bad_tokens(vectors, bad)
    results = attention_results(attend, hidden, inputs)
    assert {*results} >= {"out", "dq", "dk", "dv"}
    for name, x in results.others().items():
        assert torch.equal(x, clean.others()[name]), name
    assert pattern is PADDED or not results["out"][:, :, MIDDLE].isfinite().all()


# --- visible non-finite values, careful kernels ----------------------------------------------------------------------


def attention_by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention within the documents of one head, row by row, from the visible keys alone."""
    rows = []
    for row in range(N):
        visible = slice(int(CUT[row >= CUT].max()), row + 1)
        weights = torch.softmax(k[visible] @ q[row] / 4, 0)
        rows.append((weights[:, None] * v[visible]).sum(0))
    return torch.stack(rows)


def test_visible_nonfinite_values_arrive() -> None:
    """Infinities and NaN of visible values and of output gradients arrive, with the right sign."""
    vectors = draw_vectors((1, 1))
    vectors["v"][0, 0, 12, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    vectors["v"][0, 0, 14, :3] = torch.tensor([0.0, math.inf, math.inf])
    vectors["v"][0, 0, 2, 1:4] = math.inf
    vectors["grad"][0, 0, 25, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    results = attention_results(compile_attention("causal", backend="triton"), vectors, {"cu_seqlens": CUT})
    leaves = [vectors[name][0, 0].double().requires_grad_() for name in "qkv"]
    out = attention_by_rows(*leaves)
    grads = torch.autograd.grad(out, leaves, vectors["grad"][0, 0].double())
    assert torch.allclose(results["out"][0, 0].double(), out, atol=1e-5, equal_nan=True)
    assert torch.allclose(results["dv"][0, 0].double(), grads[2], atol=1e-5, equal_nan=True)
    for name, x in zip(("dq", "dk"), grads[:2], strict=True):
        assert torch.equal(results[name][0, 0].isfinite(), x.isfinite()), name


def careful_launches(launches: Sequence[Launch]) -> list[Launch]:
    return [launch for launch in launches if launch.source.function.endswith("_careful")]


def test_finite_calls_need_no_careful_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careful kernels return at once when results are finite; forced to run, they write the same bits."""
    attend, vectors, inputs = compile_attention("causal", backend="triton"), draw_vectors((1, 1)), {"cu_seqlens": CUT}
    with recorded() as launches:
        plain_results = attention_results(attend, vectors, inputs)
    assert [launch.source.stage for launch in careful_launches(launches)] == ["forward", "dq", "dkdv"]
    for launch in careful_launches(launches):
        place = [argument.name for argument in launch.source.arguments].index(RESULT_SUM.name)
        assert launch.arguments[place].isfinite()  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_executor, "result_sum", lambda *results: torch.tensor(math.nan))
    forced = attention_results(attend, vectors, inputs)
    assert all(torch.equal(x, forced[name]) for name, x in plain_results.items())


def test_only_inputs_that_hide_tokens_make_careful_kernels() -> None:
    with recorded(run=False) as launches:
        for pattern in ("causal", "alibi"):
            attention_results(compile_attention(pattern, backend="triton"), draw_vectors((1, 1)), {})
    assert launches
    assert not careful_launches(launches)


def test_steps_against_a_cache() -> None:
    """Two rows of one step lie in two documents: the second row reads no value of the first document."""
    attend, vectors = compile_attention("document", backend="triton"), draw_vectors((2, 1))
    q = vectors["q"][:, :, -12:]
    call: dict[str, Any] = {"kv_len": N, "doc": IDS[None]}
    clean = attend.decode(q, vectors["k"], vectors["v"], return_lse=True, **call)
    vectors["v"][:, :, 19] = math.nan
    vectors["k"][:, :, 19, 0] = math.inf
    results = attend.decode(q, vectors["k"], vectors["v"], return_lse=True, **call)
    second = BORDERS[1] - (N - 12)
    for result, expected in zip(results, clean, strict=True):
        assert torch.equal(result[:, :, second:], expected[:, :, second:])
    assert results[0][:, :, second - 1].isnan().all()


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
def test_careful_kernels_compile_for_a_gpu(compiler: Compiler) -> None:
    """On sm_90, through boxes and through pointers, careful kernels fit in the target's shared memory."""
    pattern, heads, target = from_library("document"), HeadShape(64, 64, "bfloat16", grouped=False), TARGETS["sm_90"]
    kernels = find_kernels(pattern, heads, target).careful
    step = find_decode(last_rows(pattern), heads, target, "pages").careful(16)
    assert kernels is not None
    assert step is not None
    for results in compiler([(launch, "sm_90") for launch in (kernels.dq, step)]):
        assert isinstance(results, CompiledBinary)
        assert results.shared <= target.shared_kib * 1024
        assert results.code.products
