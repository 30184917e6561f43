"""Kernels of elementwise scans in Triton's interpreter against the steps in torch, and their machine code."""

from __future__ import annotations

import itertools
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.recurrences.kernels.scan_kernel import ScanKind, emit_scan
from attnc.runtime.executors.recurrent.prefixes import PrefixSteps, by_kernels, fill
from attnc.runtime.executors.triton.recurrent import scan_on_gpu as on_gpu
from attnc.runtime.toolchain.compiling import CompiledBinary
from compiled_kernels import Compiler
from linear_scans import linear_scan
from recurrence_draws import example

pytest.importorskip("triton")

Op = Literal["real", "complex", "max"]
SIZES = (2, 2, 36)


def draw_case(
    op: Op, *entries: int, shared: bool = False, largest: float = 1.0
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Draw decays, writes and the initial state."""
    dtype = torch.complex64 if op == "complex" else torch.float32
    draw = torch.Generator().manual_seed(5)
    write = torch.randn(*SIZES, *entries, dtype=dtype, generator=draw)
    start = torch.randn(*SIZES[:2], *entries, dtype=dtype, generator=draw)
    if op == "max":
        return None, write, start
    shape = (2, 1, 36, *((1,) * len(entries) if shared else entries))
    decay = largest * torch.rand(shape, generator=draw).to(dtype)
    if op == "complex":
        decay = decay * torch.exp(6j * torch.rand(shape, generator=draw))
    return decay.expand(2, 2, 36, *shape[3:]), write, start


def largest_error(
    decay: Tensor | None, write: Tensor, emptied: Tensor | None, start: Tensor, *, backwards: bool
) -> float:
    """Return the largest error against fp64, relative to the largest state of each entry."""
    wide = torch.complex128 if write.is_complex() else torch.float64
    ours = torch.empty_like(torch.nn.functional.pad(write, (0, 0) * (write.ndim - 3) + (0, 1)))[:, :, :-1]
    with by_kernels():
        fill(PrefixSteps(ours, decay, write, emptied), start, backwards=backwards)
    exact_states = torch.empty(write.shape, dtype=wide)
    exact = PrefixSteps(exact_states, None if decay is None else decay.to(wide), write.to(wide), emptied)
    fill(exact, start.to(wide), backwards=backwards)
    return float(((ours - exact_states).abs() / exact_states.abs().amax(2, keepdim=True).clamp(min=1e-30)).max())


@pytest.mark.parametrize("op", ["real", "complex", "max"])
@pytest.mark.parametrize(("shared", "emptying"), list(itertools.product([False, True], repeat=2)))
def test_steps(op: Op, shared: bool, emptying: bool) -> None:
    decay, write, start = draw_case(op, 3, 4, shared=shared)
    emptied = torch.zeros(2, 1, 36, dtype=torch.bool)
    emptied[0, 0, [0, 31, 32]], emptied[1, 0, 35] = True, True
    for backwards in (False, True):
        assert largest_error(decay, write, emptied if emptying else None, start, backwards=backwards) < 5e-7


@pytest.mark.parametrize("op", ["real", "complex"])
def test_growing_states_run_token_by_token(op: Op) -> None:
    decay, write, start = draw_case(op, 3, largest=3.0)
    assert decay is not None
    assert largest_error(decay, write, None, start, backwards=False) < 1e-4
    states = torch.empty_like(write)
    on_gpu.fill(states, decay * 1e30, torch.zeros_like(write), None, torch.zeros_like(start), backwards=False)
    assert (states == 0).all()


@pytest.mark.slow
def test_more_entries_than_a_block_with_resets() -> None:
    decay, write, start = draw_case("real", 70)
    assert largest_error(decay, write, None, start, backwards=False) < 5e-7
    start[:], write[:, :, 3] = float("inf"), float("nan")
    emptied = torch.zeros(2, 2, 36, dtype=torch.bool)
    emptied[:, :, [0, 4]] = True
    states = torch.empty_like(write)
    on_gpu.fill(states, decay, write, emptied, start, backwards=False)
    assert states[:, :, 3].isnan().all()
    assert states[:, :, [0, 1, 2, 4, 35]].isfinite().all()


@pytest.mark.parametrize("op", ["real", "complex"])
def test_gradients(op: Op) -> None:
    tensors = [x.detach().clone().requires_grad_() for x in draw_case(op, 5) if x is not None]
    results = []
    for wanted in (True, False):
        with by_kernels(wanted):
            out, final = linear_scan(*tensors[:2], state=tensors[2])
        results.append(torch.autograd.grad(out.abs().square().sum() + final.abs().sum(), tensors))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_library_runs_scan_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[str] = []

    def recording_emit_scan(kind: ScanKind) -> Any:
        functions.append(kind.function)
        return emit_scan(kind)

    monkeypatch.setattr(on_gpu, "emit_scan", recording_emit_scan)
    q, k, v, inputs = example("mamba1", B=1, H=2, T=37, dk=6, dv=5, dtype=torch.float32)
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        attend: Any = compile_attention("mamba1", backend=cast("Any", backend))
        out = attend(*leaves, **inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert set(functions) == {"scan_real", "scan_real_backwards"}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6 * float(theirs.detach().abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_machine_code(target: str, compiler: Compiler) -> None:
    ops: tuple[Op, ...] = ("real", "complex", "max")
    scan_kinds = [
        ScanKind(op, shared, emptied, shared, 64) for op in ops for shared in (False, True) for emptied in (False, True)
    ]
    code_facts = {}
    outcomes = compiler([(emit_scan(kind), target) for kind in scan_kinds])
    for kind, outcome in zip(scan_kinds, outcomes, strict=True):
        assert isinstance(outcome, CompiledBinary), outcome.reason
        code_facts[kind.function] = (outcome.code.stack, outcome.code.spilled)
    assert {name: facts for name, facts in code_facts.items() if facts != (0, 0)} == {}
