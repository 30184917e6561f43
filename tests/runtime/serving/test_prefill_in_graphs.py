"""Chunks of a prompt against a cache, and masks for FlexAttention, inside torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from attnc import ArgumentError, UnsupportedError, compile_attention


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def chunk(*, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 64, 8), torch.randn(2, 2, 64, 8)
    return q.requires_grad_(grad), k, v


@pytest.mark.parametrize("name", ["sliding_window", "alibi"])
def test_lengths_are_data_of_the_graph(name: str) -> None:
    attend = compile_attention(name)

    def call(q: Tensor, k: Tensor, v: Tensor, n: Any) -> Tensor:
        return attend.prefill(q, k, v, kv_len=n)

    counter = CompileCounterWithBackend("eager")
    function: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend=counter)
    tensors = chunk()
    for n in (torch.tensor([30, 41]), torch.tensor([20, 64])):
        assert torch.equal(function(*tensors, n), call(*tensors, n))
    assert counter.frame_count == 1
    lengths: list[Any] = [torch.tensor(33), 33]
    for length in lengths:
        assert torch.equal(function(*tensors, length), call(*tensors, length))
    with pytest.raises(ArgumentError, match="kv_len"):
        function(*tensors, torch.tensor([30, 65]))


def test_a_ring_and_the_lse() -> None:
    attend = compile_attention("sliding_window", window=8)

    def call(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Any:
        return attend.prefill(q, k, v, kv_len=n, ring=True, return_lse=True)

    tensors = chunk()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors, torch.tensor([70, 99]))
    expected = call(*tensors, torch.tensor([70, 99]))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_the_operator_has_no_gradient() -> None:
    attend = compile_attention("causal")

    def call(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return attend.prefill(q, k, v, kv_len=n)

    broken, tensors = torch.compile(call, backend="eager"), chunk(grad=True)
    out = broken(*tensors, torch.tensor([30, 41]))
    assert torch.equal(out, call(*tensors, torch.tensor([30, 41])))
    assert out.requires_grad
    with torch.no_grad():
        traced = torch.export.export(Chunk(attend), (*chunk(), torch.tensor([30, 41]))).module()
    with pytest.raises(UnsupportedError, match="attnc::prefill has no gradient"):
        traced(*tensors, torch.tensor([30, 41]))


class Chunk(torch.nn.Module):
    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Any:
        return self.attend.prefill(q, k, v, kv_len=n)


def test_masks_are_made_between_graphs() -> None:
    attend, biased = compile_attention("sliding_window", window=8), compile_attention("alibi")

    def call(x: Tensor) -> Tensor:
        mask = attend.block_mask(64, block_size=16, device="cpu")
        pair = torch.tensor(5)
        pair_mask = attend.mask_mod(64, device="cpu")(pair, pair, pair, pair)
        score = biased.score_mod(64, heads=4, device="cpu")(x[0], pair, torch.tensor(1), pair, pair - 2)
        return x + mask.kv_num_blocks.sum() + pair_mask + score

    assert torch.equal(torch.compile(call, backend="eager")(torch.ones(1)), call(torch.ones(1)))
    torch._dynamo.reset()
    with pytest.raises(Unsupported, match="build them before the compiled function"):
        torch.compile(call, backend="eager", fullgraph=True)(torch.ones(1))
