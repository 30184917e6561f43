"""The patterns with their own weights, keys or branches against dense torch written from their definitions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from attnc import Attention
from attnc.runtime.texts.library import ModuleLoader, library_files
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.reading.source_text import decode
from cases import normalisers, structures
from cases.case import Shape
from cases.system import System, square
from weight_calls import Dense, check, check_twice, results

EXECUTORS = ["cpu", "reference"]
SYSTEMS = [*normalisers.SYSTEMS, *structures.SYSTEMS]


def executor(attend: Attention, name: str) -> Dense:
    def run(q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> Tensor:
        call: Any = attend if name == "cpu" else attend.reference
        return cast("Tensor", call(q, k, v, **inputs))

    return run


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_the_evaluator_agrees_with_the_definition(system: System) -> None:
    """The evaluator computes a row at a time from the pattern's text."""
    fixed = {"height", "rows", "frames", "width"} & set(system.params)
    shape = system.shapes[-1] if fixed else min(system.shapes, key=lambda s: abs(s.n_k - 12))
    if shape.n_k > 30 and not fixed:
        shape = square(12)
    operands = system.operands(shape)
    file = library_files()[system.name]
    program = load_program(decode(file.read_bytes(), file.name), ModuleLoader(None), system.name)
    inputs = {name: x for name, x in operands.items() if name not in ("q", "k", "v")}
    q, k, v = (operands[name].tolist() for name in ("q", "k", "v"))
    evaluator = Evaluator(
        bind(program, system.params),
        queries=shape.n_q,
        keys=shape.n_k,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        inputs={name: x.tolist() for name, x in inputs.items()},
        dk=shape.dk,
        dv=shape.dv,
    )
    out, _ = evaluator.attend(q, k, v)
    torch.testing.assert_close(torch.tensor(out, dtype=torch.float64), system.dense(**operands), rtol=1e-9, atol=1e-9)


SMALL = {"landmark": square(7, heads=2, kv_heads=1, batch=1, dk=2, dv=2)}


def small(system: System) -> Shape:
    """Return a shape for finite differences."""
    shape = min(system.shapes, key=lambda s: (s.n_k < 4, s.n_k))
    n_q, n_k = (min(shape.n_q, 6), min(shape.n_k, 6)) if "height" not in system.params else (shape.n_q, shape.n_k)
    n_q, n_k = (shape.n_q, shape.n_k) if {"rows", "width"} & set(system.params) else (n_q, n_k)
    return SMALL.get(system.name, Shape(n_q, n_k, shape.heads, shape.kv_heads, 1, 2, 2))


@pytest.mark.parametrize("system", [s for s in SYSTEMS if "frames" not in s.params], ids=repr)
def test_gradcheck(system: System) -> None:
    operands = system.operands(small(system))
    whole = {name: x for name, x in operands.items() if not x.requires_grad}
    real = {name: x for name, x in operands.items() if x.requires_grad}
    run = executor(system.compiled(), "cpu")

    def positional(*tensors: Tensor) -> Tensor:
        return run(**dict(zip(real, tensors, strict=True)), **whole)

    assert torch.autograd.gradcheck(positional, tuple(real.values()), eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_errors_are_at_most_twice_those_of_the_formula(system: System, dtype: torch.dtype) -> None:
    shape = max(system.shapes, key=lambda s: s.n_k)
    check_twice(executor(system.compiled(), "cpu"), system, system.operands(shape, dtype))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.name not in ("davit_channel", "autoformer_lags")], ids=repr)
def test_scores_in_the_hundreds(system: System, name: str) -> None:
    """The scores lead to quotients of exponentials beyond the range of fp64."""
    operands = system.operands(max(system.shapes, key=lambda s: s.n_k))
    large = {n: (x.detach() * 40).requires_grad_() if n in ("q", "k") else x for n, x in operands.items()}
    if system.name in ("local_linear", "differential", "softplus_lssar"):
        large = {n: (x.detach() / 13).requires_grad_() if n in ("q", "k") else x for n, x in large.items()}
    run, grad = executor(system.compiled(), name), torch.ones_like(operands["q"][..., :1])
    actual = results(run, large, grad.expand(*grad.shape[:3], operands["v"].shape[-1]))
    wanted = results(system.dense, large, grad.expand(*grad.shape[:3], operands["v"].shape[-1]))
    for part, x in wanted.items():
        assert bool(actual[part].isfinite().all()), part
        torch.testing.assert_close(actual[part], x, rtol=1e-6, atol=1e-7, msg=part)


@pytest.mark.parametrize("system", SYSTEMS, ids=repr)
def test_the_same_call_gives_the_same_bits(system: System) -> None:
    operands = system.operands(max(system.shapes, key=lambda s: s.n_k))
    run = executor(system.compiled(), "cpu")
    grad = torch.ones(*operands["q"].shape[:3], operands["v"].shape[-1], dtype=torch.float64)
    first, again = results(run, operands, grad), results(run, operands, grad)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "system", [s for s in SYSTEMS if s.name in ("softplus_lssa", "landmark", "combiner")], ids=repr
)
def test_more_rows_than_one_block_holds(system: System) -> None:
    shape = square(700, heads=2, kv_heads=1, batch=1, dk=3, dv=3)
    check(executor(system.compiled(), "cpu"), system.dense, system.operands(shape))
