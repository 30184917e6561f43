"""The operators under torch's subsystems: fake tensors, autograd, autocast, checkpoints, the FLOP counter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from attnc import UnsupportedError, compile_attention
from attnc.runtime.executors.cpu import cpu_executor
from operator_calls import (
    ATTEND,
    ATTEND_BACKWARD,
    DOC,
    Layer,
    draw,
    leaves,
    loss,
    results,
    same,
    text_of,
    window,
)

SCATTERED = "pattern scattered\n    input x: int[token]\n    visible x[q] == x[k]\n"


@pytest.mark.parametrize(
    ("spec", "shape", "inputs"),
    [
        ("causal", {}, []),
        ("causal", {"kv_heads": 2, "dv": 12, "tokens_first": True, "dtype": torch.bfloat16}, []),
        ("document", {"dv": 3}, [DOC]),
    ],
)
def test_opcheck(spec: str, shape: dict[str, Any], inputs: list[Tensor]) -> None:
    attend = compile_attention(spec)
    tensors = draw(**shape)
    opcheck(ATTEND, (*leaves(tensors), inputs, text_of(attend), None))
    out, lse = ATTEND(*tensors, inputs, text_of(attend), 0.5)
    for grad_lse in (None, torch.randn_like(lse)):
        opcheck(ATTEND_BACKWARD, (torch.randn_like(out), grad_lse, *tensors, out, lse, inputs, text_of(attend), 0.5))


@pytest.mark.parametrize("n", [0, 1, 6])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_fake_tensors_have_the_strides_of_real_ones(batch: int, n: int) -> None:
    """Any order of the dimensions of q, k and v in memory; sizes of 0 and 1 included."""
    text = text_of(window())
    orders = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3), (3, 1, 2, 0)]
    for (q_order, k_order), heads, d in product(product(orders, orders), (1, 4), (8, 5)):

        def laid_out(order: tuple[int, ...], width: int, heads: int = heads) -> Tensor:
            shape = (batch, heads, n, width)
            back = [order.index(i) for i in range(4)]
            return torch.randn([shape[i] for i in order]).permute(back)

        q, k, v = laid_out(q_order, 8), laid_out(k_order, 8), laid_out(q_order, d)
        real = ATTEND(q, k, v, [], text, None)
        grads = ATTEND_BACKWARD(torch.randn_like(real[0]), None, q, k, v, *real, [], text, None)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (q, k, v, *real)]
            fake = ATTEND(*fakes[:3], [], text, None)
            fake_grads = ATTEND_BACKWARD(torch.empty_like(fake[0]), None, *fakes, [], text, None)
        for a, b in zip((*real, *grads), (*fake, *fake_grads), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors_give_shapes_and_other_devices_a_typed_error() -> None:
    attend = window()
    q, k, v = (t.to("meta") for t in draw(kv_heads=2, dv=12))
    out, lse = attend(q, k, v, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, 17, 12), (2, 4, 17), "meta")
    with FakeTensorMode(), pytest.raises(UnsupportedError, match=r'q is on mps:0.*backend="reference"'):
        attend(*(torch.empty(1, 1, 4, 8, device="mps") for _ in range(3)))


def test_the_shapes_and_strides_of_a_call_on_a_gpu() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 17, 4, 8, device="cuda").transpose(1, 2) for _ in range(3))
        out, lse = window()(q, k, v, return_lse=True)
    assert (out.shape, out.stride()) == (q.shape, q.stride())
    assert (lse.shape, lse.is_contiguous(), lse.device.type) == ((2, 4, 17), True, "cuda")


def test_the_operator_differentiates_like_the_call() -> None:
    attend, tensors = window(), draw(kv_heads=2)
    same(
        results(lambda q, k, v: ATTEND(q, k, v, [], text_of(attend), None), tensors),
        results(lambda q, k, v: attend(q, k, v, return_lse=True), tensors),
    )


def test_the_operator_obeys_autocast() -> None:
    attend, (q, k, v) = window(), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = ATTEND(q, k.bfloat16(), v, [], text_of(attend), None)
        assert torch.equal(out, attend(q, k, v))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_only_operands_results_and_inputs_are_saved() -> None:
    attend, inputs = compile_attention("document"), leaves(draw())
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = attend(*inputs, return_lse=True, doc=DOC)
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in (*inputs, out, lse, DOC))


def test_inputs_changed_before_the_backward_are_noticed() -> None:
    inputs, doc = leaves(draw()), DOC.clone()
    out = compile_attention("document")(*inputs, doc=doc)
    doc.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), inputs)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_operator", [True, False])
def test_second_derivatives_are_refused(through_operator: bool) -> None:
    attend, (q, k, v) = window(), leaves(draw())
    out = ATTEND(q, k, v, [], text_of(attend), None)[0] if through_operator else attend(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), q)


def test_transforms_of_a_call() -> None:
    """First derivatives work, also under torch.func.grad; every other transform raises an error."""
    attend, (q, k, v) = window(), draw(dtype=torch.float64)

    def total(q: Tensor) -> Tensor:
        return loss(*attend(q, k, v, return_lse=True))

    (leaf,) = leaves([q])
    (want,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(q), want)
    grad = torch.func.grad(total)(leaf)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), leaf)
    for refused, says in (
        (lambda: torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(q), "second derivatives"),
        (lambda: torch.func.vmap(total)(q[None]), "vmap"),
        (lambda: torch.func.jvp(total, (q,), (q,)), "forward-mode"),
    ):
        with pytest.raises(UnsupportedError, match=says):
            refused()
    with forward_ad.dual_level():
        assert torch.equal(attend(q, k, v), attend(q, k, v))
        with pytest.raises(UnsupportedError, match="forward-mode"):
            attend(forward_ad.make_dual(q, q), k, v)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    ],
)
def test_transforms_of_the_operator_are_refused(transform: Callable[..., Any]) -> None:
    text, (q, k, v) = text_of(window()), draw()
    with pytest.raises(UnsupportedError, match=r"torch\.func over the operator"):
        transform(lambda x: ATTEND(x, k, v, [], text, None)[0], q)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Record every run of the executor."""
    runs: list[None] = []
    forward = cpu_executor.forward

    def counted(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        runs.append(None)
        return forward(*arguments, **options)

    monkeypatch.setattr(cpu_executor, "forward", counted)
    return runs


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tensors = Layer(window()), draw()
    expected = results(layer, tensors)
    runs, inputs = count_forwards(monkeypatch), leaves(tensors)
    pair = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    torch.autograd.backward(loss(*pair))
    same([*pair, *(t.grad for t in inputs if t.grad is not None)], expected)
    assert len(runs) == 2


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if operator is ATTEND else CheckpointPolicy.PREFER_RECOMPUTE

    layer, tensors = Layer(window()), draw()
    expected = results(layer, tensors)
    runs, inputs = count_forwards(monkeypatch), leaves(tensors)
    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    pair = checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
    same([*pair, *torch.autograd.grad(loss(*pair), inputs)], expected)
    assert len(runs) == (1 if policy is CheckpointPolicy.MUST_SAVE else 2)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def flops(function: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def test_flops_count_the_visible_pairs() -> None:
    attend, inputs = window(), leaves(draw(40, dv=12))
    pairs = 2 * 4 * int(attend.mask(40).sum())
    forward, backward = 2 * pairs * (8 + 12), 2 * pairs * (3 * 8 + 2 * 12)
    both = {"attnc.attend": forward, "attnc.attend_backward": backward}
    assert flops(lambda: torch.autograd.grad(attend(*inputs).sum(), inputs)) == both
    with torch.no_grad():
        assert flops(lambda: attend(*inputs)) == {"attnc.attend": forward}
    total = attend(*inputs).sum()
    assert flops(lambda: torch.autograd.grad(total, inputs)) == {"attnc.attend_backward": backward}


def test_flops_of_a_pattern_whose_pairs_no_plan_counts() -> None:
    attend, x = compile_attention(SCATTERED), torch.randint(0, 1000, (3000,))
    q, k, v = (torch.randn(1, 2, 3000, 4) for _ in range(3))
    assert attend.plan(3000, heads=2, head_dim=4, x=x).visible is None
    pairs = 2 * int((x[:, None] == x).sum())
    assert flops(lambda: attend(q, k, v, x=x)) == {"attnc.attend": 2 * pairs * 8}


def test_flops_that_depend_on_data_need_data() -> None:
    attend = compile_attention("document")
    with FakeTensorMode() as mode, pytest.raises(UnsupportedError, match="depend on their data"):
        fakes = [mode.from_tensor(t) for t in draw()]
        flops(lambda: attend(*fakes, doc=mode.from_tensor(DOC)))
