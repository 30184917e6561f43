"""Calls inside torch's context_parallel, where each rank has a shard of the sequence, are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from attnc import UnsupportedError, compile_attention

CALLS: dict[str, Callable[..., Any]] = {
    "plain": compile_attention("causal"),
    "scored": compile_attention("alibi"),
    "recurrent": compile_attention("retention"),
    "dense": compile_attention("causal", backend="reference"),
    "reference": lambda q, k, v: compile_attention("causal").reference(q, k, v),
    "decode": lambda q, k, v: compile_attention("causal").decode(q[:, :, -1:], k, v, kv_len=8),
    "prefill": lambda q, k, v: compile_attention("causal").prefill(q, k, v, kv_len=8),
    "compiled": torch.compile(compile_attention("causal"), backend="eager", fullgraph=True),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Yield a mesh of two ranks; the second rank does not exist."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_a_shard_is_refused(mesh: DeviceMesh, name: str) -> None:
    tensors: list[Tensor] = [torch.randn(1, 4, 16, 8) for _ in range(3)]
    with context_parallel(mesh, buffers=tensors, buffer_seq_dims=[2, 2, 2]):
        assert tensors[0].shape[2] == 8
        with pytest.raises(UnsupportedError, match=r"context_parallel .* shard of the sequence"):
            CALLS[name](*tensors)
    q, k, v = tensors
    out = CALLS[name](q[:, :, :8], k[:, :, :8], v[:, :, :8])
    assert out.isfinite().all()


def test_the_dispatcher_without_replaced_functions_is_refused(mesh: DeviceMesh) -> None:
    """The newer interface of torch wraps modules and replaces no function."""
    from torch.distributed.tensor.experimental import _attention as sharded

    attend, tensors = compile_attention("causal"), [torch.randn(1, 4, 8, 8) for _ in range(3)]
    expected = attend(*tensors)  # from now on calls take the direct path
    sharded._enable_context_parallel_dispatcher()
    try:
        with pytest.raises(UnsupportedError, match="context_parallel"):
            attend(*tensors)
    finally:
        sharded._disable_context_parallel_dispatcher()
    assert torch.equal(attend(*tensors), expected)
