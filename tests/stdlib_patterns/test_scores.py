"""The patterns with their own scores against dense torch written from their papers (`reference.scores`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import AttncError, compile_attention
from cases import normalisers, scores
from cases.case import Shape, leaf
from cases.scores import SQUARES
from cases.system import System
from reference import attention
from score_calls import (
    EXECUTORS,
    Run,
    assert_equals,
    check,
    check_nothing_seen,
    check_twice,
    executor,
    grads_for,
    results,
)

SYSTEMS = [*scores.SYSTEMS, *normalisers.SINKS]
DEFAULTS = [system for system in SYSTEMS if not system.params or system.params == {"causal": True}]


def named(name: str) -> System:
    return next(system for system in DEFAULTS if system.name == name)


MANY_ROWS, MANY_KEYS = Shape(600, 600, 2, 1, 1, dk=4, dv=3), Shape(3, 4500, 2, 1, 1, dk=4, dv=3)
"""Shapes with more rows, or more keys, than a tile holds."""


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_tiles_of_a_row_make_one_softmax(system: System) -> None:
    for shape in (MANY_ROWS, MANY_KEYS) if system.aligned else (MANY_ROWS,):
        check(executor(system.compiled(), "cpu"), system.dense, system.operands(shape))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 12, 16, 20])
def test_alibi_has_slopes_for_any_number_of_heads(n: int) -> None:
    shape = Shape(9, 9, n, n, batch=1)
    system = named("alibi")
    check(executor(system.compiled(), "cpu"), system.dense, system.operands(shape))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_gradients_of_some_operands_and_of_one_output(system: System, name: str) -> None:
    """Operands without gradients do not affect the others, nor does an output that is not part of the loss."""
    operands = system.operands(Shape(19, 19))
    run = executor(system.compiled(), name)
    for part in (0, 1):
        for alone in [key for key, x in operands.items() if x.requires_grad]:
            operands_of_call = {key: x if key == alone else x.detach() for key, x in operands.items()}
            output, wanted = run(**operands_of_call)[part], system.dense(**operands_of_call)[part]
            grad = torch.randn_like(wanted)
            if not wanted.requires_grad:
                assert alone == "v"
                continue
            gradient = torch.autograd.grad(output, operands_of_call[alone], grad)[0]
            assert_equals({alone: gradient}, {alone: torch.autograd.grad(wanted, operands_of_call[alone], grad)[0]})


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_gradcheck(system: System) -> None:
    operands = system.operands(Shape(4, 4, 2, 1, batch=1, dk=3, dv=2))
    run = executor(system.compiled(), "cpu")

    def positional(*tensors: Tensor) -> attention.Result:
        return run(**dict(zip(operands, tensors, strict=True)))

    assert torch.autograd.gradcheck(positional, tuple(operands.values()))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", DEFAULTS, ids=repr)
def test_scale(system: System, name: str) -> None:
    """A scale given with the call replaces dk^-1/2; T5 has none."""
    operands = system.operands(Shape(11, 11))
    run = executor(system.compiled(), name)
    times = 1.0 if system.name == "t5" else 0.3 * operands["q"].shape[-1] ** 0.5

    def dense(q: Tensor, **rest: Tensor) -> attention.Result:
        result: attention.Result = system.dense(q * times, **rest)
        return result

    def scaled(**operands: Any) -> attention.Result:
        return run(**operands, scale=0.3)

    check(scaled, dense, operands)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", [system for system in DEFAULTS if system.name in ("fox", "graphormer")], ids=repr)
def test_one_input_for_the_whole_batch(system: System, name: str) -> None:
    operands = system.operands(Shape(19, 19, batch=3))
    shared = {key: leaf(x[:1], x.dtype) for key, x in operands.items() if key in ("f", "distance")}

    def dense(q: Tensor, k: Tensor, v: Tensor, **inputs: Tensor) -> attention.Result:
        expanded = {key: x.expand(3, *x.shape[1:]) if key in shared else x for key, x in inputs.items()}
        result: attention.Result = system.dense(q, k, v, **expanded)
        return result

    check(executor(system.compiled(), name), dense, operands | shared)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", [system for system in DEFAULTS if system.inputs(Shape(1, 1))], ids=repr)
def test_each_call_has_its_own_inputs(system: System, name: str) -> None:
    """Nothing of a call is reused for the next call of its shape, even when an input is changed in place."""
    run = executor(system.compiled(), name)
    first, second = (system.operands(Shape(19, 19)) for _ in range(2))
    for operands in (first, second, first):
        check(run, system.dense, operands)
    for key in first.keys() - {"q", "k", "v"}:
        first[key].data.copy_(second[key])
    check(run, system.dense, first)


@pytest.mark.parametrize("system", DEFAULTS, ids=repr)
def test_strides_do_not_matter(system: System) -> None:
    def strided(x: Tensor) -> Tensor:
        return leaf(x.transpose(0, -1).contiguous().transpose(0, -1), x.dtype)

    operands = {name: strided(x) for name, x in system.operands(Shape(37, 37)).items()}
    check(executor(system.compiled(), "cpu"), system.dense, operands)


@pytest.mark.parametrize("system", DEFAULTS, ids=repr)
def test_the_same_bits_twice(system: System) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        operands = system.operands(Shape(130, 130), dtype)
        grads = grads_for(operands)
        first, second = (results(executor(system.compiled(), "cpu"), operands, grads) for _ in range(2))
        assert [name for name, x in first.items() if not torch.equal(x, second[name])] == []


# --- fp32 and bf16 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SQUARES[:3], Shape(2, 2, 6, 6), Shape(130, 130, 2, 1, batch=1)], ids=repr)
@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_at_most_twice_the_error_of_dense_torch(system: System, shape: Shape, dtype: torch.dtype, name: str) -> None:
    check_twice(executor(system.compiled(), name), system.dense, system.operands(shape, dtype))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", [system for system in DEFAULTS if system.inputs(Shape(1, 1))], ids=repr)
def test_inputs_of_fp32_beside_bf16(system: System, name: str) -> None:
    """In mixed precision parameters and their gradients stay in fp32."""
    operands = system.operands(Shape(37, 37), torch.bfloat16)
    wide = {key: leaf(x, torch.float32) for key, x in operands.items() if key not in ("q", "k", "v")}
    check_twice(executor(system.compiled(), name), system.dense, operands | wide)


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("high", [1000.0, -1000.0])
@pytest.mark.parametrize("system", [named("graphormer"), named("t5")], ids=repr)
def test_biases_of_a_thousand(system: System, high: float, dtype: torch.dtype, name: str) -> None:
    operands = system.operands(Shape(37, 37), dtype)
    table = operands["table"].detach().clone()
    table[::2, ::2] = high
    operands["table"] = leaf(table, dtype)
    run = executor(system.compiled(), name)
    if dtype == torch.float64:
        check(run, system.dense, operands)
    else:
        check_twice(run, system.dense, operands)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sink", [100.0, -100.0, 1000.0, -1000.0])
def test_high_and_low_sinks(sink: float, dtype: torch.dtype, name: str) -> None:
    system = normalisers.gpt_oss(17)
    operands = system.operands(Shape(37, 37), dtype)
    operands["sink"] = leaf(torch.tensor([sink, 0, -sink, sink / 2]), dtype)
    run = executor(system.compiled(), name)
    if dtype == torch.float64:
        check(run, system.dense, operands)
    else:
        check_twice(run, system.dense, operands)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_sink_without_weight_is_no_sink(name: str) -> None:
    """A sink at -inf takes no weight and has no gradient."""
    system = normalisers.gpt_oss(17)
    operands = system.operands(Shape(37, 37)) | {"sink": leaf(torch.full((4,), -math.inf), torch.float64)}
    actual = check(executor(system.compiled(), name), system.dense, operands)
    assert not actual["dsink"].any()


@pytest.mark.parametrize("name", EXECUTORS)
def test_steep_forgetting(name: str) -> None:
    """Gates are almost shut: earlier keys are forgotten, and no difference of large sums spoils the other weights."""
    system = named("fox")
    for dtype in (torch.float64, torch.float32):
        operands = system.operands(Shape(130, 130), dtype)
        f = operands["f"].detach().clone()
        f[:, 40] = -1e4
        f[:, 41:] *= 0.01
        operands["f"] = leaf(f, dtype)
        run = executor(system.compiled(), name)
        if dtype == torch.float64:
            check(run, system.dense, operands)
        else:
            check_twice(run, system.dense, operands)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("gate", [-math.inf, -3e38, -1e20])
def test_a_shut_gate(gate: float, name: str) -> None:
    """Keys before the gate lose all weight, and others are unaffected; the gate's gradient is 0 up to rounding."""
    system = named("fox")
    operands = system.operands(Shape(12, 12))
    f = operands["f"].detach().clone()
    f[:, 5] = gate
    operands["f"] = leaf(f, torch.float64)
    actual = check(executor(system.compiled(), name), system.dense, operands)
    assert actual["df"][:, 5].abs().max() < 1e-14


def test_gates_that_grow_are_refused() -> None:
    """`log_decay` is at most 0; the reference executor checks it."""
    system = named("fox")
    operands = system.operands(Shape(5, 5))
    operands["f"] = leaf(-operands["f"], torch.float64)
    with pytest.raises(AttncError, match="`f`"):
        executor(system.compiled(), "reference")(**operands)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", [named("alibi"), named("fox"), named("music_relative"), named("softcap")], ids=repr)
def test_a_row_with_one_key_is_its_value(system: System, name: str) -> None:
    operands = system.operands(Shape(37, 37), torch.float32)
    out, _ = executor(system.compiled(), name)(**operands)
    assert torch.equal(out[:, :, 0], operands["v"].repeat_interleave(2, 1)[:, :, 0])


# --- rows without visible keys ----------------------------------------------------------------------------------------

STRICT = """
pattern strict
    align   end
    learned sink: real[head]
    visible k < q
    score   {score}
    weights softmax(score, extra = sink)
"""


def strictly(score: Callable[..., Tensor]) -> Run:
    """Return the reference of a pattern in which no token sees itself, with a sink."""

    def dense(q: Tensor, k: Tensor, v: Tensor, *, sink: Tensor, **inputs: Tensor) -> attention.Result:
        query, key = attention.positions(q, k)
        return attention.weighted(score(q, k, **inputs), key < query, v, sink)

    return dense


STRICT_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scale * dot(q, k)": lambda q, k: attention.scale_of(q) * attention.products(q, k),
    "3 * tanh(scale * dot(q, k) / 3)": lambda q, k: (
        3 * torch.tanh(attention.scale_of(q) * attention.products(q, k) / 3)
    ),
    "dot(q, k) + 1000": lambda q, k: attention.products(q, k) + 1000,
}


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize(
    "shape", [Shape(1, 1), Shape(2, 2), Shape(37, 37), Shape(130, 130, 3, 3), Shape(5, 37)], ids=repr
)
@pytest.mark.parametrize("score", STRICT_SCORES)
def test_the_first_token_sees_no_key(score: str, shape: Shape, name: str) -> None:
    run = executor(compile_attention(STRICT.format(score=score)), name)
    operands = normalisers.gpt_oss().operands(shape)
    actual = check(run, strictly(STRICT_SCORES[score]), operands)
    rows = torch.arange(shape.n_k - shape.n_q, shape.n_k)
    check_nothing_seen(actual, (rows > 0).expand(actual["lse"].shape))


FAR_APART = """
pattern far_apart
    input   distance: int[batch, query, key]
    learned table: real[head, distances]
    visible distance[q, k] < 2
    score   scale * dot(q, k) + table[distance[q, k]]
"""


@pytest.mark.parametrize("name", EXECUTORS)
def test_rows_of_some_batch_entries_see_no_key(name: str) -> None:
    """The first entry is a graph without edges, the second has isolated nodes, the third has none."""
    system = named("graphormer")
    operands = system.operands(Shape(37, 37, batch=3))
    operands["distance"][0] = 5
    operands["distance"][1, ::3] = 4

    def dense(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, table: Tensor) -> attention.Result:
        score = attention.scale_of(q) * attention.products(q, k) + table[:, distance].transpose(0, 1)
        return attention.weighted(score, (distance < 2)[:, None], v)

    actual = check(executor(compile_attention(FAR_APART), name), dense, operands)
    check_nothing_seen(actual, (operands["distance"] < 2).any(-1)[:, None].expand(3, 4, 37))
    assert not actual["dtable"][:, 2:].any()
