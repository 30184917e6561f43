"""The cpu executor against dense autograd in fp64, on plans written by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Group, Mask, PlanPiece, Strip, StripAxis, strip
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.cpu import cpu_executor, strided_calls
from attnc.runtime.executors.cpu.autograd import attend
from attnc.runtime.settings import Settings
from attnc.runtime.verifying.accuracy import Probe, compare
from hand_plans import (
    PATTERNS,
    Case,
    Relation,
    Shape,
    blind,
    blocks,
    by_batch,
    by_head,
    causal,
    dense,
    everyone,
    make_plan,
    overlapping,
    sinks,
    whole,
    window,
)

QKV = tuple[Tensor, Tensor, Tensor]

HALF = (torch.bfloat16, torch.float16)

# --- the reference and the error bound -------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, v: Tensor, relation: Relation, scale: float) -> tuple[Tensor, Tensor]:
    """Compute dense attention in the dtype of its inputs; rows without keys give 0 and LSE −inf, under autograd too."""
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    visible = torch.from_numpy(relation.copy())
    seeing = visible.any(-1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible & seeing[..., None], -math.inf)
    out = (scores.softmax(-1) @ v).masked_fill(~seeing[..., None], 0)
    return out, scores.logsumexp(-1).masked_fill(~seeing, -math.inf)


def draw_qkv(shape: Shape, dk: int, dv: int, dtype: torch.dtype = torch.float64) -> QKV:
    batch, heads, kv_heads, n = shape
    return (
        torch.randn(batch, heads, n, dk, dtype=dtype),
        torch.randn(batch, kv_heads, n, dk, dtype=dtype),
        torch.randn(batch, kv_heads, n, dv, dtype=dtype),
    )


def apply(function: Callable[[Tensor], Tensor], inputs: QKV) -> QKV:
    q, k, v = inputs
    return function(q), function(k), function(v)


def leaves_of(inputs: QKV, dtype: torch.dtype = torch.float64) -> QKV:
    """Return copies of these tensors that are leaves and require gradients."""
    return apply(lambda x: x.detach().to(dtype).requires_grad_(), inputs)


def results(
    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    inputs: QKV,
    grads: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return out, LSE, dq, dk and dv of `function`, computed in `dtype`."""
    leaves = leaves_of(inputs, dtype)
    outputs = function(*leaves)
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    got = torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used], materialize_grads=True)
    return [*(o.detach() for o in outputs), *got]


def assert_agrees(case: Case, inputs: QKV, dtype: torch.dtype, with_lse: bool) -> None:
    """Check the error bound of `runtime.verifying.accuracy`, and exact zeros for rows without keys and unseen keys."""
    plan, relation = case
    inputs = apply(lambda x: x.to(dtype), inputs)
    q, k, v = inputs
    grad_out = torch.randn(*q.shape[:3], v.shape[-1]).to(dtype)
    grad_lse = torch.randn(q.shape[:3]) if with_lse else None

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, plan, q.shape[-1] ** -0.5)

    got = results(ours, inputs, (grad_out, grad_lse), dtype)
    seeing = torch.from_numpy(relation.any(-1))
    assert torch.equal(got[1] == -math.inf, ~seeing)
    assert not got[0][~seeing].any() and not got[2][~seeing].any()
    assert [x.dtype for x in got] == [dtype, max(dtype, torch.float32, key=lambda d: d.itemsize), dtype, dtype, dtype]
    probe = Probe(q, k, v, torch.from_numpy(relation.copy()), grad_out, grad_lse)
    assert [e for e in compare(ours, probe) if not e.agrees] == []


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.threads
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4, 4, 137), (2, 6, 2, 61)])
def test_patterns(pattern: Callable[[Shape], Case], dtype: torch.dtype, shape: Shape) -> None:
    assert_agrees(pattern(shape), draw_qkv(shape, 16, 16), dtype, with_lse=shape[0] == 2)


SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (2, 2, 2, 31),
    (1, 5, 1, 127),
    (2, 6, 1, 65),
    (1, 7, 1, 129),
    (3, 10, 2, 33),
    (2, 12, 2, 40),
    (2, 14, 2, 36),
)


@pytest.mark.threads
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(pattern: Callable[[Shape], Case], shape: Shape) -> None:
    case = pattern(shape)
    for dtype in (torch.float32, torch.bfloat16):
        assert_agrees(case, draw_qkv(shape, 8, 8), dtype, with_lse=True)


@pytest.mark.threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dims", [(8, 8), (31, 31), (72, 72), (1, 1), (64, 32), (32, 64), (192, 128), (17, 1), (1, 17), (96, 80), (63, 64)]
)
def test_head_dimensions(dims: tuple[int, int], dtype: torch.dtype) -> None:
    for pattern, shape in ((sinks, (2, 2, 1, 35)), (by_head, (1, 4, 2, 35))):
        assert_agrees(pattern(shape), draw_qkv(shape, *dims), dtype, with_lse=pattern is sinks)


def test_different_lengths() -> None:
    """The last block of rows against all keys, and a single query against many keys."""
    for n_q, n_k in ((7, 50), (1, 33), (40, 3)):
        relation = np.broadcast_to(np.ones((n_q, n_k), bool), (2, 4, n_q, n_k))
        shape = (2, 4, 2, n_q)
        plan = make_plan(shape, relation, everyone(shape, PlanPiece(whole(n_q), whole(n_k), "full")))
        q, _, _ = draw_qkv(shape, 8, 8)
        _, k, v = draw_qkv((2, 4, 2, n_k), 8, 8)
        assert_agrees((plan, relation), (q, k, v), torch.float32, with_lse=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "token major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.randn(x.shape[0] + 1, x.shape[1] + 2, 2 * x.shape[2], x.shape[3] + 3, dtype=x.dtype)[
        1:, 1:-1, ::2, 2:-1
    ].copy_(x),
    "last dimension far": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "width major": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded tokens": lambda x: x[:, :, :1].expand_as(x),
    "expanded width": lambda x: x[..., :1].expand_as(x),
    "overlapping tokens": lambda x: torch.randn(x[..., 0].numel() + x.shape[3], dtype=x.dtype).as_strided(
        x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1, 1)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(8, 8), (8, 5)])
@pytest.mark.parametrize("pattern", [sinks, by_head, dense])
def test_layouts(layout: str, dims: tuple[int, int], pattern: Callable[[Shape], Case]) -> None:
    """Any strides give the same bits as contiguous copies, and gradients of the right shape."""
    shape = (2, 4, 2, 37)
    case, arrange = pattern(shape), LAYOUTS[layout]
    inputs = draw_qkv(shape, *dims, torch.float32)
    for arranged in ((0,), (1,), (2,), (0, 1, 2)):
        q, k, v = (arrange(x) if i in arranged else x for i, x in enumerate(inputs))
        mixed = q, k, v
        assert_agrees(case, mixed, torch.float32, with_lse=True)
        plain = cpu_executor.forward(*apply(Tensor.contiguous, mixed), case[0], 0.3)
        for a, b in zip(cpu_executor.forward(*mixed, case[0], 0.3), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_strided_gradients() -> None:
    """grad_out and grad_lse may have any strides, including the stride 0 that `sum` produces."""
    shape = (2, 4, 2, 37)
    plan, _ = sinks(shape)
    inputs = leaves_of(draw_qkv(shape, 8, 8))
    out, lse = attend(*inputs, plan, 0.3)
    expanded = torch.autograd.grad(out.sum() + lse.sum(), inputs, retain_graph=True)
    plain = torch.autograd.grad((out, lse), inputs, (torch.ones(out.shape).double(), torch.ones(lse.shape).double()))
    for a, b in zip(expanded, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 2, 5), (2, 0, 0, 5), (2, 2, 1, 0), (1, 2, 2, 5)])
def test_empty_sizes_and_an_empty_plan(shape: Shape) -> None:
    """Zero batch entries, heads or tokens; and a plan without pieces."""
    relation = np.zeros((*shape[:2], shape[3], shape[3]), bool)
    unused = Group((), (), (PlanPiece(strip(0, 0, 0, 1), strip(0, 0, 0, 1), "full"),))
    for groups in ((), (unused,)):
        plan = make_plan((*shape[:2], max(shape[2], 1), shape[3]), relation, groups)
        inputs = leaves_of(draw_qkv(shape, 4, 6))
        out, lse = attend(*inputs, plan, 0.5)
        assert out.shape == (*shape[:2], shape[3], 6) and not out.any()
        assert lse.shape == (shape[0], shape[1], shape[3]) and (lse == -math.inf).all()
        for g in torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse))):
            assert not g.any() and not g.isnan().any()


def test_no_keys() -> None:
    shape = (2, 4, 2, 9)
    q, k, v = draw_qkv(shape, 4, 4)
    k, v = k[:, :, :0], v[:, :, :0]
    plan = make_plan(shape, np.zeros((2, 4, 9, 0), bool), everyone(shape))
    inputs = leaves_of((q, k, v))
    out, lse = attend(*inputs, plan, 0.5)
    assert not out.any() and (lse == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), inputs)
    assert not dq.any() and dk.shape == k.shape and dv.shape == v.shape


@pytest.mark.threads
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("pattern", [blind, dense, overlapping, by_batch])
def test_rows_without_keys(pattern: Callable[[Shape], Case], dtype: torch.dtype) -> None:
    """Any finite gradient of a row without keys, however large, leaves every bit of the result unchanged."""
    shape = (2, 4, 2, 53)
    plan, relation = pattern(shape)
    unseeing = ~torch.from_numpy(relation.any(-1))
    assert unseeing.any()
    inputs = leaves_of(draw_qkv(shape, 8, 8), dtype)
    out, lse = attend(*inputs, plan, 0.3)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    usual = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse), retain_graph=True)
    grad_out[unseeing], grad_lse[unseeing] = torch.finfo(dtype).max / 4, 3e38
    for a, b in zip(usual, torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse)), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_either_output_alone() -> None:
    shape = (2, 4, 2, 37)
    case = sinks(shape)
    inputs = draw_qkv(shape, 8, 8)
    scale = 8**-0.5
    for grads in ((torch.randn(2, 4, 37, 8), None), (None, torch.randn(2, 4, 37))):
        ours = results(lambda q, k, v: attend(q, k, v, case[0], scale), inputs, grads, torch.float64)
        true = results(lambda q, k, v: reference(q, k, v, case[1], scale), inputs, grads, torch.float64)
        for a, b in zip(ours, true, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", [sinks, blocks, by_head, overlapping])
def test_gradcheck(pattern: Callable[[Shape], Case]) -> None:
    shape = (1, 2, 1, 26)
    plan, relation = pattern(shape)
    seeing = torch.from_numpy(relation.any(-1))
    inputs = leaves_of(draw_qkv(shape, 3, 2))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, plan, 0.6)
        return out, lse[seeing]

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.threads
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_deterministic(pattern: Callable[[Shape], Case], dtype: torch.dtype) -> None:
    """Results have the same bits every time, whatever freshly allocated memory holds."""
    shape = (3, 4, 2, 150)
    plan, _ = pattern(shape)
    inputs = draw_qkv(shape, 16, 16, dtype)
    grads = (torch.randn(3, 4, 150, 16), torch.randn(3, 4, 150))
    first = results(lambda q, k, v: attend(q, k, v, plan, 0.25), inputs, grads, dtype)
    for _ in range(3):
        torch.full((3 * 4 * 150 * 16,), math.nan)
        again = results(lambda q, k, v: attend(q, k, v, plan, 0.25), inputs, grads, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.threads
def test_exact_masks_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 4, 2, 50)
    plan, relation = dense(shape)
    asked = []

    def exact_mask(*window: int) -> Mask:
        asked.append(window)
        b, h, r0, r1, k0, k1 = window
        return relation[b, h, r0:r1, k0:k1]

    monkeypatch.setattr(strided_calls, "SETTINGS", Settings(exact_elements=350))
    assert_agrees(
        (replace(plan, exact_mask=exact_mask), relation), draw_qkv(shape, 8, 8), torch.float32, with_lse=False
    )
    assert all((r1 - r0) * (k1 - k0) <= 350 for _, _, r0, r1, k0, k1 in asked)
    assert {w[:2] for w in asked} == {(0, 0)}
    assert {r for w in asked for r in range(w[2], w[3])} == set(range(50))


def test_only_inputs_and_results_are_saved() -> None:
    shape = (1, 2, 2, 20)
    plan, _ = sinks(shape)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    inputs = leaves_of(draw_qkv(shape, 8, 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = attend(*inputs, plan, 0.3)
    expected = [*inputs, out, lse]
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in expected)


def test_inference_and_no_grad_modes() -> None:
    shape = (1, 2, 2, 20)
    plan, _ = sinks(shape)
    inputs = draw_qkv(shape, 8, 8, torch.float32)
    with torch.inference_mode():
        first = attend(*inputs, plan, 0.3)
    with torch.no_grad():
        second = attend(*inputs, plan, 0.3)
    leaves = leaves_of(apply(Tensor.clone, inputs), torch.float32)
    third = attend(*leaves, plan, 0.3)
    grads = torch.autograd.grad(third[0].sum(), leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    for i in range(3):
        q, k, v = (leaf if i == j else x for j, (leaf, x) in enumerate(zip(leaves, inputs, strict=True)))
        (alone,) = torch.autograd.grad(attend(q, k, v, plan, 0.3)[0].sum(), leaves[i])
        assert torch.equal(alone, grads[i])


def test_func_grad() -> None:
    shape = (1, 2, 2, 20)
    plan, _ = window(shape)
    q, k, v = draw_qkv(shape, 4, 4)
    got = torch.func.grad(lambda x: attend(x, k, v, plan, 0.3)[0].square().sum())(q)
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(attend(leaf, k, v, plan, 0.3)[0].square().sum(), leaf)
    torch.testing.assert_close(got, want)


@pytest.mark.threads
def test_runs_of_heads() -> None:
    """Runs cover each head of any subset once, with the right kv head; a subset of whole groups needs one run."""
    for per_kv, kv_heads in ((1, 6), (2, 4), (3, 3), (7, 1)):
        total = per_kv * kv_heads
        for subset in product((0, 1), repeat=total) if total <= 8 else ([1] * total, [1, 0] * (total // 2)):
            heads = tuple(h for h, kept in enumerate(subset) if kept)
            covered = []
            for q, kv in strided_calls.head_runs(heads, per_kv):
                apply = q.size // kv.size
                for i in range(q.size):
                    head = q.start + i * q.step
                    assert kv.start + i // apply * kv.step == head // per_kv
                    covered.append(head)
            assert tuple(sorted(covered)) == heads
        assert len(list(strided_calls.head_runs(tuple(range(total)), per_kv))) == 1


def test_a_window_needs_three_kernel_calls() -> None:
    """A window takes three kernel calls for any heads, and for any batch whose strides merge with the heads'."""
    plan, _ = window((3, 4, 2, 120), 20, 16)
    assert len(strided_calls.calls_of(plan, merged=True)) == 3
    assert len(strided_calls.calls_of(plan, merged=False)) == 1 + 3 + 1
    plan, _ = window((1, 4, 2, 120), 20, 16)
    assert len(strided_calls.calls_of(plan, merged=False)) == 3


@pytest.mark.parametrize(
    ("step", "length", "count"), [(0, 5, 4), (2, 7, 9), (2, 7, 3), (7, 7, 3), (9, 7, 3), (1, 4, 8)]
)
def test_no_add_contains_a_token_twice(step: int, length: int, count: int) -> None:
    check_adds(Strip(3, (StripAxis(step, count, length),)))


@pytest.mark.parametrize("second", [(0, 2, 3), (2, 3, 4), (3, 4, 3), (5, 1, 2)])
@pytest.mark.parametrize("first", [(40, 3, 2), (20, 4, 5), (20, 2, 5), (0, 3, 2)])
def test_no_add_of_bricks_contains_a_token_twice(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    check_adds(Strip(3, (StripAxis(*first, 20), StripAxis(*second))))


def check_adds(keys: Strip) -> None:
    block = strided_calls.StripBlock(0, 0, keys, strided_calls.StridedAxis(1), strided_calls.StridedAxis(1))
    numbers = keys.starts()[:, None] + keys.inside()
    total: dict[int, int] = {}
    for add in strided_calls.adds_of(block):
        met = add.block.strip.starts()[:, None] + add.block.strip.inside()
        assert len(np.unique(met)) == met.size
        added = numbers.reshape(add.size[:-1])[add.at]
        for axis in reversed(add.over):
            assert (added == added.take([0], axis)).all()
        copies = added.size // met.size
        summed = added.take([0], add.over[0]) if len(add.over) == 1 else added
        if len(add.over) <= 1:
            assert np.array_equal(summed.ravel(), met.ravel())
        for token in met.ravel().tolist():
            total[token] = total.get(token, 0) + copies
    expected: dict[int, int] = {}
    for token in numbers.ravel().tolist():
        expected[token] = expected.get(token, 0) + 1
    assert total == expected


REFUSED: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "forward mode": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


def test_second_derivatives_raise_when_taken() -> None:
    shape = (1, 2, 2, 10)
    plan, _ = causal(shape)
    inputs = leaves_of(draw_qkv(shape, 4, 4))
    out, lse = attend(*inputs, plan, 0.3)
    first = torch.autograd.grad(out.square().sum() + lse.sum(), inputs, create_graph=True, retain_graph=True)
    plain = torch.autograd.grad(out.square().sum() + lse.sum(), inputs, retain_graph=True)
    for a, b in zip(first, plain, strict=True):
        assert a.requires_grad and torch.equal(a, b)
    for g in first:
        with pytest.raises(UnsupportedError, match="second derivatives"):
            torch.autograd.grad(g.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("transform", REFUSED)
def test_transforms_are_refused(transform: str) -> None:
    shape = (1, 2, 2, 10)
    plan, _ = causal(shape)
    q, k, v = draw_qkv(shape, 4, 4)
    with pytest.raises(UnsupportedError, match="reference executor"):
        REFUSED[transform](lambda x: attend(x, k, v, plan, 0.3)[0], q)
