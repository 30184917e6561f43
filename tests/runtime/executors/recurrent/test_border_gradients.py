"""Autograd through a recurrence with borders works as for any call: memory, second passes, checkpoints, host waits."""

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
from attnc.runtime.executors.recurrent import borders

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
    """The tensors of a call, drawn from a fixed seed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        drawn = {name: torch.randn(1, 2, TOKENS, 8) for name in "qkv"} | {"g": -torch.rand(1, TOKENS, 2)}
        super().__init__({name: x.requires_grad_() for name, x in drawn.items()})

    def called(self, q: Tensor | None = None) -> Tensor:
        attend: Any = compile_attention(TEXT)
        tensors = dict(self) if q is None else {**self, "q": q}
        out: Tensor = attend(**tensors, fresh=(torch.arange(TOKENS) == BORDER)[None])
        return out

    def grads(self) -> dict[str, Tensor]:
        all_grads = {name: x.grad for name, x in self.items()}
        return {name: grad for name, grad in all_grads.items() if grad is not None}


def grad_weights(value: float) -> Tensor:
    values = torch.linspace(0.5, 1.5, TOKENS)[None, None, :, None].repeat(1, 2, 1, 8)
    values[:, :, 3] = value
    return values


def grads_of_one_pass(value: float) -> dict[str, Tensor]:
    leaves = Leaves()
    torch.autograd.backward(leaves.called(), grad_weights(value))
    return leaves.grads()


def assert_grads_agree(actual: dict[str, Tensor], wanted: dict[str, Tensor], times: float = 1) -> None:
    assert actual.keys() == wanted.keys() == set("qkvg")
    for name, x in actual.items():
        assert torch.allclose(x, times * wanted[name], atol=1e-6, equal_nan=True), name


class Held:
    """A saved tensor, wrapped so that a weak reference shows whether autograd still keeps it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_backward_pass_frees_saved_tensors(value: float) -> None:
    """The recorded pass stayed in memory as long as the output."""
    kept: list[weakref.ref[Held]] = []

    def pack(x: Tensor) -> Held:
        held = Held(x)
        kept.append(weakref.ref(held))
        return held

    leaves = Leaves()
    with saved_tensors_hooks(pack, lambda held: held.x):
        out = leaves.called()
    assert any(reference() is not None for reference in kept)
    torch.autograd.backward(out, grad_weights(value))
    assert out.isfinite().all()
    assert not any(reference() is not None for reference in kept)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_second_backward_pass_raises_unless_the_graph_is_retained(value: float) -> None:
    """A second backward pass used to run without an error."""
    leaves = Leaves()
    out = leaves.called()
    torch.autograd.backward(out, grad_weights(value), retain_graph=True)
    torch.autograd.backward(out, grad_weights(value))
    assert_grads_agree(leaves.grads(), grads_of_one_pass(value), times=2)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.backward(out, grad_weights(value))


def test_a_pass_with_nan_gradients_does_not_affect_the_next() -> None:
    leaves = Leaves()
    out = leaves.called()
    torch.autograd.grad(out, list(leaves.values()), grad_weights(math.nan), retain_graph=True)
    torch.autograd.backward(out, grad_weights(1.0))
    assert_grads_agree(leaves.grads(), grads_of_one_pass(1.0))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_checkpoints(value: float, use_reentrant: bool) -> None:
    leaves = Leaves()
    out = checkpoint(leaves.called, leaves["q"], use_reentrant=use_reentrant)
    torch.autograd.backward(out, grad_weights(value))
    assert_grads_agree(leaves.grads(), grads_of_one_pass(value))


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_gradients_with_create_graph(value: float) -> None:
    leaves = Leaves()
    incoming = grad_weights(value).requires_grad_()
    grads = torch.autograd.grad(leaves.called(), list(leaves.values()), incoming, create_graph=True)
    assert_grads_agree(dict(zip(leaves, (x.detach() for x in grads), strict=True)), grads_of_one_pass(value))
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.backward(grads[0].sum())


def test_tensors_that_depend_on_one_another() -> None:
    """NaN markers of the first of two passes stop at the tensors that the call received."""
    leaf = torch.randn(1, 2, TOKENS, 8, requires_grad=True)
    leaves = Leaves()
    leaves["k"] = 2 * leaf
    leaves["v"] = leaves["k"] + 1
    passed: list[Tensor] = []
    leaves["k"].register_hook(passed.append)  # type: ignore[no-untyped-call]
    torch.autograd.backward(leaves.called(leaf), grad_weights(math.nan))
    assert leaf.grad is not None
    assert not leaf.grad[:, :, 3].isfinite().any()
    assert leaf.grad[:, :, BORDER:].isfinite().all()
    assert len(passed) == 1


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count how often the host reads a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_finiteness_is_read_once() -> None:
    """Finiteness was read twice: for the output's gradient, and for zeros made for the last state's gradient."""
    out = Leaves().called()
    with Reads() as reads:  # type: ignore[no-untyped-call]
        torch.autograd.backward(out.sum())
    assert reads.count == 1


@pytest.mark.parametrize("capturing", [False, True])
def test_host_waits_are_counted_and_skipped_during_capture(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors stand for a device's tensors."""
    tested: list[Tensor] = []

    def is_finite(*grads: Tensor) -> bool:
        tested.extend(grads)
        return True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(borders, "is_finite", is_finite)
    reset_fallbacks()
    with FakeTensorMode():
        grads = [torch.empty(2, 3, device="cuda"), torch.empty(2, device="cuda")]
        assert borders._finite_or_captured("bordered", grads)
    assert len(tested) == (0 if capturing else 2)
    counted = [(fallback.pattern, fallback.kind, fallback.count) for fallback in fallbacks()]
    assert counted == ([] if capturing else [("bordered", "host wait", 1)])
