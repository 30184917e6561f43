"""Several sequences in one call give the results of separate calls."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from branch_calls import operands
from weight_calls import check


def test_packed_rows_without_keys_with_a_weight_formula() -> None:
    text = "pattern p\n    visible k < q\n    weights relu(score) / (1 + sum(relu(score) for k))\n"
    attend: Any = compile_attention(text)
    qkv, ends = operands(9), [0, 1, 2, 9]

    def call_separately(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        per_sequence = [tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in pairwise(ends)]
        return torch.cat([attend(*tensors) for tensors in per_sequence], 2)

    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x, cu_seqlens=torch.tensor(ends)), call_separately, qkv)


SEQUENCES = [("causal", {}), ("sliding_window", {"window": 4}), ("softcap", {"window": 6}), ("softplus_lssar", {})]


@pytest.mark.parametrize(("name", "params"), SEQUENCES)
@pytest.mark.parametrize("ends", [[0, 5, 5, 6, 20, 33], [0, 0, 33, 33], [0, 33]])
def test_packed_sequences_equal_separate_calls(name: str, params: dict[str, Any], ends: list[int]) -> None:
    attend: Any = compile_attention(name, **params)
    qkv, cu = operands(33), torch.tensor(ends, dtype=torch.int32)

    def call_separately(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        per_sequence = [tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in pairwise(ends) if b > a]
        return torch.cat([attend(*tensors) for tensors in per_sequence], 2)

    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x, cu_seqlens=cu), call_separately, qkv)


LENGTHS = [0, 1, 7, 128, 130]
ENDS = list(accumulate(LENGTHS, initial=0))
PACKED = [
    ("causal", {}),
    ("sliding_window", {"window": 40, "sinks": 4}),
    ("blocked", {"block": 24}),
    ("power", {"window": 2, "block": 8}),
    ("strided", {"stride": 16, "local": 16}),
    ("alibi", {}),
    ("softplus_lssar", {}),
]


@pytest.mark.parametrize(("name", "params"), PACKED, ids=[name for name, _ in PACKED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_of_all_lengths(name: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    """Packed equals separate; the content of one sequence changes no bit of another, in results or gradients."""
    attend: Any = compile_attention(name, **params)
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, ENDS[-1], 8).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    cu, grad = torch.tensor(ENDS), torch.randn(1, 4, ENDS[-1], 8).to(dtype)

    def run(tensors: list[Tensor]) -> list[Tensor]:
        out = attend(*tensors, cu_seqlens=cu)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    packed = run(qkv)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in pairwise(ENDS):
        per_sequence = [x[:, :, a:b].detach().requires_grad_() for x in qkv]
        out = attend(*per_sequence)
        wanted = [out, *torch.autograd.grad(out, per_sequence, grad[:, :, a:b])]
        for x, y in zip(packed, wanted, strict=True):
            torch.testing.assert_close(x[:, :, a:b], y, rtol=tolerance, atol=tolerance)
    for a, b in pairwise(ENDS):
        changed = [x.detach().clone() for x in qkv]
        for x in changed:
            x[:, :, a:b] = 50.0
        packed_again = run([x.requires_grad_() for x in changed])
        for x, y in zip(packed, packed_again, strict=True):
            assert torch.equal(x[:, :, :a], y[:, :, :a])
            assert torch.equal(x[:, :, b:], y[:, :, b:])


def test_packed_calls_compile_to_one_graph_for_all_lengths() -> None:
    attend = compile_attention("sliding_window", window=3)
    compiled = torch.compile(lambda q, k, v, cu: attend(q, k, v, cu_seqlens=cu), backend="aot_eager", fullgraph=True)
    q, k, v = (x.detach() for x in operands(20).values())
    for ends in ([0, 7, 20], [0, 1, 1, 20]):
        cu = torch.tensor(ends)
        torch.testing.assert_close(compiled(q, k, v, cu), attend(q, k, v, cu_seqlens=cu))


@pytest.mark.parametrize(
    ("name", "params", "ends", "says"),
    [
        ("causal", {}, [0, 5], "must start at 0 and end at the number of keys, 9"),
        ("causal", {}, [1, 9], "must start at 0"),
        ("causal", {}, [], "must start at 0"),
        ("causal", {}, [0, 6, 4, 9], "decreases after entry 1"),
        ("document", {}, [0, 9], "pass `doc` instead"),
        ("combiner", {"segment": 3}, [0, 9], "call it per sequence"),
        ("neighborhood_2d", {"height": 3, "width": 3, "window": 3}, [0, 9], "call it once for each sequence"),
    ],
)
def test_wrong_cumulative_lengths(name: str, params: dict[str, Any], ends: list[int], says: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=says):
        compile_attention(name, **params)(*operands(9).values(), cu_seqlens=torch.tensor(ends, dtype=torch.int64))
