"""Recurrences of the library against references written from the papers, token by token in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError
from attnc.runtime.texts.library import recurrence_names
from attnc.spec.meaning.evaluate import Evaluator
from cases.recurrences import GRIDS, Recurrent, joined

NAMES = recurrence_names()
BY_TOKEN = {"test_time_regression", "yaad_linear", "moneta_linear", "memora_linear", "ttt_linear"}
"""Nonlinear patterns, which run token by token."""


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    if not theirs.numel():
        return
    ours, theirs = ours.detach(), theirs.detach()
    size = max(float(theirs.abs().max()), 1e-3)
    assert not ours.isnan().any()
    wide = torch.complex128 if ours.is_complex() else torch.float64
    assert float((ours.to(wide) - theirs.to(wide)).abs().max()) <= tolerance * size


@pytest.mark.parametrize("name", NAMES)
def test_the_evaluator(name: str) -> None:
    """The evaluator agrees with the reference on outputs and states."""
    case = Recurrent(name, 7, heads=2)
    out, states = case.reference([case.q, case.k, case.v], case.inputs)
    sizes = {"queries": out.shape[2], "keys": out.shape[2], "heads": 2, "kv_heads": 2, "dk": 8, "dv": 5}
    recurrence = case.attention().bound.program.recurrence
    assert recurrence is not None
    evaluator = Evaluator(case.attention().bound, inputs=joined(case.inputs), **sizes)
    tensors = (x.tolist() for x in (case.q, case.k, case.v))
    ours, last = evaluator.recur(*tensors, scale=0.6)
    close(torch.tensor(ours, dtype=torch.float64), out, 1e-12)
    kinds = {state.name: torch.complex128 if state.is_complex else torch.float64 for state in recurrence.states}
    final_states = {state: torch.tensor(x, dtype=kinds[state]) for state, x in last.items()}
    for a, b in zip(case.final(final_states), states, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_32_bits(name: str) -> None:
    case = Recurrent(name)
    tensors, inputs = case.leaves()
    with torch.no_grad():
        theirs, _ = case.reference(tensors, inputs)
        narrow = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
        ours, states = case.ours(case.attention(), [x.float() for x in tensors], narrow)
    assert ours.dtype == torch.float32
    wide = {name_: x.dtype for name_, x in states.items() if x.dtype not in (torch.float32, torch.complex64)}
    assert wide.keys() <= {"t"}
    close(ours, theirs, 2e-5)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 100, 257])
@pytest.mark.parametrize("name", sorted(set(NAMES) - GRIDS))
def test_lengths(name: str, tokens: int) -> None:
    case = Recurrent(name, tokens, heads=2)
    tensors, inputs = case.leaves()
    with torch.no_grad():
        theirs, _ = case.reference(tensors, inputs)
        ours, _ = case.ours(case.attention(), tensors, inputs)
    close(ours, theirs, 1e-11)


@pytest.mark.parametrize("cut", [1, 6, 64, 69])
@pytest.mark.parametrize("name", sorted(set(NAMES) - GRIDS))
def test_a_split_run_equals_a_whole_one(name: str, cut: int) -> None:
    """The prefill is split into two calls; a second run goes token by token."""
    case = Recurrent(name)
    attend = case.attention()
    with torch.no_grad():
        tensors, inputs = [case.q, case.k, case.v], case.inputs
        whole, last = case.ours(attend, tensors, inputs)

        def part(low: int, high: int, state: Any) -> tuple[Tensor, dict[str, Tensor]]:
            part_inputs = {k: x[:, low:high] if x.ndim >= 2 and x.shape[1] == 70 else x for k, x in inputs.items()}
            return case.ours(attend, [x[:, :, low:high] for x in tensors], part_inputs, state)

        first, state = part(0, cut, None)
        second, state = part(cut, 70, state)
        close(torch.cat([first, second], 2), whole, 1e-12)
        for name_, x in state.items():
            close(x, last[name_], 1e-12)
        outs, now = [], None
        for token in range(5):
            out, now = part(token, token + 1, now)
            outs.append(out)
        close(torch.cat(outs, 2), whole[:, :, :5], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_heads_that_share_keys(name: str) -> None:
    case = Recurrent(name, 9, heads=4)
    attend = case.attention()
    with torch.no_grad():
        k, v = case.k[:, ::2], case.v[:, ::2]
        shared, _ = case.ours(attend, [case.q, k, v], case.inputs)
        repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
        alone, _ = case.ours(attend, [case.q, *repeated], case.inputs)
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("name", NAMES)
def test_strict_refuses_runs_token_by_token(name: str) -> None:
    case = Recurrent(name, 3)
    if name in BY_TOKEN:
        with pytest.raises(UnsupportedError, match="would run token by token: "):
            case.attention(strict=True)
    else:
        case.attention(strict=True)
