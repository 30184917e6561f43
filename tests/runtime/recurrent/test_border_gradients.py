"""A recurrence with borders is under autograd as any other call: memory, second passes, checkpoints, waits."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attnc import UnsupportedError, compile_attention, fallbacks, reset_fallbacks
from attnc.runtime.recurrent import border_gradients

TEXT = """recurrence bordered
    input g: log_decay[batch, token, head]
    input fresh: bool[batch, token]
    state S: [dk, dv]
    reset fresh
    step S = exp(g) * S + outer(k, v)
    read q @ S
"""
TOKENS = 40
BORDER = 20


class Leaves(dict[str, Tensor]):
    """Draw the tensors of a call from a fixed seed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        drawn = {name: torch.randn(1, 2, TOKENS, 8) for name in "qkv"} | {"g": -torch.rand(1, TOKENS, 2)}
        super().__init__({name: x.requires_grad_() for name, x in drawn.items()})

    def called(self, q: Tensor | None = None) -> Tensor:
        attend: Any = compile_attention(TEXT)
        given = dict(self) if q is None else {**self, "q": q}
        out: Tensor = attend(**given, fresh=(torch.arange(TOKENS) == BORDER)[None])
        return out

    def grads(self) -> dict[str, Tensor]:
        found = {name: x.grad for name, x in self.items()}
        return {name: grad for name, grad in found.items() if grad is not None}


def weights(value: float) -> Tensor:
    found = torch.linspace(0.5, 1.5, TOKENS)[None, None, :, None].repeat(1, 2, 1, 8)
    found[:, :, 3] = value
    return found


def once(value: float) -> dict[str, Tensor]:
    leaves = Leaves()
    torch.autograd.backward(leaves.called(), weights(value))
    return leaves.grads()


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], times: float = 1) -> None:
    assert found.keys() == wanted.keys() == set("qkvg")
    for name, x in found.items():
        assert torch.allclose(x, times * wanted[name], atol=1e-6, equal_nan=True), name


class Held:
    """Collect the tensors that autograd keeps."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_backward_pass_frees_what_was_kept(value: float) -> None:
    """The recorded pass lived as long as the output."""
    kept: list[weakref.ref[Held]] = []

    def pack(x: Tensor) -> Held:
        held = Held(x)
        kept.append(weakref.ref(held))
        return held

    leaves = Leaves()
    with saved_tensors_hooks(pack, lambda held: held.x):
        out = leaves.called()
    assert any(one() is not None for one in kept)
    torch.autograd.backward(out, weights(value))
    assert out.isfinite().all()
    assert not any(one() is not None for one in kept)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_second_backward_pass_raises_unless_the_graph_is_retained(value: float) -> None:
    """A second backward pass ran, silently."""
    leaves = Leaves()
    out = leaves.called()
    torch.autograd.backward(out, weights(value), retain_graph=True)
    torch.autograd.backward(out, weights(value))
    assert_alike(leaves.grads(), once(value), times=2)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.backward(out, weights(value))


def test_a_pass_whose_gradient_is_nan_leaves_nothing_to_the_next() -> None:
    leaves = Leaves()
    out = leaves.called()
    torch.autograd.grad(out, list(leaves.values()), weights(math.nan), retain_graph=True)
    torch.autograd.backward(out, weights(1.0))
    assert_alike(leaves.grads(), once(1.0))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_checkpoints(value: float, use_reentrant: bool) -> None:
    leaves = Leaves()
    out = checkpoint(leaves.called, leaves["q"], use_reentrant=use_reentrant)
    torch.autograd.backward(out, weights(value))
    assert_alike(leaves.grads(), once(value))


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_gradients_with_a_graph_of_their_own(value: float) -> None:
    leaves = Leaves()
    incoming = weights(value).requires_grad_()
    found = torch.autograd.grad(leaves.called(), list(leaves.values()), incoming, create_graph=True)
    assert_alike(dict(zip(leaves, (x.detach() for x in found), strict=True)), once(value))
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.backward(found[0].sum())


def test_tensors_that_depend_on_one_another() -> None:
    """NaN marks of the first of two passes stop at the tensors that the call was given."""
    leaf = torch.randn(1, 2, TOKENS, 8, requires_grad=True)
    leaves = Leaves()
    leaves["k"] = 2 * leaf
    leaves["v"] = leaves["k"] + 1
    passed: list[Tensor] = []
    leaves["k"].register_hook(passed.append)  # type: ignore[no-untyped-call]
    torch.autograd.backward(leaves.called(leaf), weights(math.nan))
    assert leaf.grad is not None
    assert not leaf.grad[:, :, 3].isfinite().any()
    assert leaf.grad[:, :, BORDER:].isfinite().all()
    assert len(passed) == 1


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often a number of a tensor is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_finiteness_is_asked_once() -> None:
    """Finiteness was asked twice: of the gradient of the output, and of zeros made for that of the last state."""
    out = Leaves().called()
    with Reads() as reads:  # type: ignore[no-untyped-call]
        torch.autograd.backward(out.sum())
    assert reads.count == 1


@pytest.mark.parametrize("capturing", [False, True])
def test_on_a_gpu_the_wait_is_counted_and_no_stream_captured_waits(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without values stand for a device's."""
    asked: list[Tensor] = []

    def is_finite(*grads: Tensor) -> bool:
        asked.extend(grads)
        return True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(border_gradients, "is_finite", is_finite)
    reset_fallbacks()
    with FakeTensorMode():
        grads = [torch.empty(2, 3, device="cuda"), torch.empty(2, device="cuda")]
        assert border_gradients._finite_or_captured("bordered", grads)
    assert len(asked) == (0 if capturing else 2)
    counted = [(one.pattern, one.kind, one.count) for one in fallbacks()]
    assert counted == ([] if capturing else [("bordered", "host wait", 1)])
