"""Recurrences of the library against references written from the papers, one token after another in 64 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import Attention, UnsupportedError, compile_attention
from attnc.runtime.library import library_files, recurrence_names
from attnc.spec.meaning.evaluate import Evaluator
from recurrence_draws import example
from recurrence_references import REFERENCES

NAMES = recurrence_names()
GRIDS = {"mhs_vm"}
BY_TOKEN = {"test_time_regression", "yaad_linear"}
"""Those that run token by token: what is not linear."""

PARAMETERS = ("height", "width", "chunk")


class Case:
    """One call: tensors, parameters, and whether the spec reads the scale."""

    def __init__(self, name: str, tokens: int = 70, *, heads: int = 3, dtype: torch.dtype = torch.float64) -> None:
        self.name = name
        grid = (7, 10) if name in GRIDS else None
        self.q, self.k, self.v, given = example(name, B=2, H=heads, T=tokens, dk=8, dv=5, dtype=dtype, grid=grid)
        self.inputs = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        self.numbers = {key: x for key, x in given.items() if not isinstance(x, Tensor)}
        self.params = {key: self.numbers[key] for key in PARAMETERS if key in self.numbers}
        scaled = "scale" in library_files()[name].read_text(encoding="utf-8").split('"""')[2]
        self.options: dict[str, Any] = {"scale": 0.6} if scaled else {}

    def attention(self, **options: Any) -> Attention:
        return compile_attention(self.name, **self.params, **options)

    def leaves(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        tensors = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        return tensors, {
            key: x.detach().clone().requires_grad_(x.is_floating_point()) for key, x in self.inputs.items()
        }

    def reference(self, tensors: list[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        q, k, v = tensors
        out, states = REFERENCES[self.name](q, k, v, scale=0.6, **inputs, **self.numbers)
        if self.name == "aaren":  # ours: the LSE, and the weighted mean
            top, total, acc = states
            return out, [top + total.log(), acc / total[..., None]]
        return out, list(states)

    def ours(
        self, attend: Attention, tensors: list[Tensor], inputs: Mapping[str, Any], state: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = tensors
        return attend(q, k, v, return_state=True, state=state, **self.options, **joined(inputs))

    def final(self, states: dict[str, Tensor]) -> list[Tensor]:
        """In the order of the reference."""
        if "x" in states and states["x"].is_complex():
            return [states["x"].real, states["x"].imag]
        if self.name == "titans_linear":
            return [states["M"], states["P"]]
        return list(states.values())


def joined(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Real and imaginary parts as one input."""
    parts = {name[:-3] for name in inputs if name.endswith("_re")}
    whole: dict[str, Any] = {name: torch.complex(inputs[f"{name}_re"], inputs[f"{name}_im"]) for name in parts}
    return whole | {name: x for name, x in inputs.items() if name.rsplit("_", 1)[0] not in parts}


def close(ours: Tensor, theirs: Tensor, most: float) -> None:
    assert ours.shape == theirs.shape
    if not theirs.numel():
        return
    ours, theirs = ours.detach(), theirs.detach()
    size = max(float(theirs.abs().max()), 1e-3)
    assert not ours.isnan().any()
    wide = torch.complex128 if ours.is_complex() else torch.float64
    assert float((ours.to(wide) - theirs.to(wide)).abs().max()) <= most * size


def compare(case: Case, attend: Attention, most: float) -> None:
    """Outputs, states, and every gradient through both."""

    def by_reference(tensors: list[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        return case.reference(tensors, inputs)

    def by_us(tensors: list[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, states = case.ours(attend, tensors, inputs)
        return out, case.final(states)

    results: list[list[Tensor]] = []
    for run in (by_reference, by_us):
        tensors, inputs = case.leaves()
        out, last = run(tensors, inputs)
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros((), dtype=torch.float64)
        for x in (out, *last):
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        wanted = [*tensors, *(x for x in inputs.values() if x.requires_grad)]
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        results.append([out, *last, *grads])
    for a, b in zip(*results, strict=True):
        close(b, a, most)


@pytest.mark.parametrize("name", NAMES)
def test_output_states_and_gradients(name: str) -> None:
    """As it runs by default: by chunks, where it can be."""
    case = Case(name)
    compare(case, case.attention(), 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_the_evaluator(name: str) -> None:
    """The language's meaning, of all that is computed."""
    case = Case(name, 7, heads=2)
    out, states = case.reference([case.q, case.k, case.v], case.inputs)
    sizes = {"queries": out.shape[2], "keys": out.shape[2], "heads": 2, "kv_heads": 2, "dk": 8, "dv": 5}
    recurrence = case.attention().bound.program.recurrence
    assert recurrence is not None
    evaluator = Evaluator(case.attention().bound, inputs=joined(case.inputs), **sizes)
    tensors = (x.tolist() for x in (case.q, case.k, case.v))
    ours, last = evaluator.recur(*tensors, scale=0.6)
    close(torch.tensor(ours, dtype=torch.float64), out, 1e-12)
    kinds = {state.name: torch.complex128 if state.is_complex else torch.float64 for state in recurrence.states}
    found = {state: torch.tensor(x, dtype=kinds[state]) for state, x in last.items()}
    for a, b in zip(case.final(found), states, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_executor(name: str) -> None:
    case = Case(name, 12)
    compare(case, case.attention(backend="reference"), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_32_bits(name: str) -> None:
    case = Case(name)
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
    case = Case(name, tokens, heads=2)
    tensors, inputs = case.leaves()
    with torch.no_grad():
        theirs, _ = case.reference(tensors, inputs)
        ours, _ = case.ours(case.attention(), tensors, inputs)
    close(ours, theirs, 1e-11)


@pytest.mark.parametrize("cut", [1, 6, 64, 69])
@pytest.mark.parametrize("name", sorted(set(NAMES) - GRIDS))
def test_a_run_that_is_cut_goes_on_where_it_was(name: str, cut: int) -> None:
    """Prefill in two calls, and then token by token."""
    case = Case(name)
    attend = case.attention()
    with torch.no_grad():
        tensors, inputs = [case.q, case.k, case.v], case.inputs
        whole, last = case.ours(attend, tensors, inputs)

        def part(low: int, high: int, state: Any) -> tuple[Tensor, dict[str, Tensor]]:
            own = {k: x[:, low:high] if x.ndim >= 2 and x.shape[1] == 70 else x for k, x in inputs.items()}
            return case.ours(attend, [x[:, :, low:high] for x in tensors], own, state)

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
    case = Case(name, 9, heads=4)
    attend = case.attention()
    with torch.no_grad():
        k, v = case.k[:, ::2], case.v[:, ::2]
        shared, _ = case.ours(attend, [case.q, k, v], case.inputs)
        repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
        alone, _ = case.ours(attend, [case.q, *repeated], case.inputs)
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("name", NAMES)
def test_strict_refuses_what_runs_token_by_token(name: str) -> None:
    case = Case(name, 3)
    if name in BY_TOKEN:
        with pytest.raises(UnsupportedError, match="would run token by token, for"):
            case.attention(strict=True)
    else:
        case.attention(strict=True)
