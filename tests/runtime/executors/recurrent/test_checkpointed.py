"""Recurrence calls computed in parts of a few tokens: results, gradients and states equal those of one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnc import UnsupportedError, compile_attention
from attnc.runtime.executors.recurrent import checkpointed
from recurrence_cases import error
from recurrence_draws import example
from recurrence_regimes import GRIDS, SYSTEMS, by_reference, by_us, draw_case, everything

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(set(SYSTEMS) - set(GRIDS))
OF_MATRICES = {"mamba1", "mamba_mixer"}
"""Patterns with matrices that are computed entry by entry, in stretches chosen separately."""
TOKENS, PART = 45, 7


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut calls into parts of 7 tokens."""
    monkeypatch.setattr(checkpointed, "ROWS", 1)
    monkeypatch.setattr(checkpointed, "FEWEST", PART)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of parts of each call."""
    counts: list[int] = []
    spans = checkpointed.Parts.spans

    def recording_spans(self: checkpointed.Parts) -> list[slice]:
        slices = spans(self)
        counts.append(len(slices))
        return slices

    monkeypatch.setattr(checkpointed.Parts, "spans", recording_spans)
    yield counts


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients(name: str, parts: list[int]) -> None:
    """Checked against the token loops in fp64, including states and their gradients."""
    case = draw_case(name, "mixed", TOKENS)
    truth = everything(case, by_reference, torch.float64)
    ours = everything(case, by_us, torch.float64)
    worst = {key: error(ours[key], x) for key, x in truth.items()}
    assert max(worst.values()) <= (1e-10 if name in ("aaren", "lightnet") else 1e-12), worst
    with torch.no_grad():
        plain = by_us(case, {key: x.double() for key, x in case.tensors.items()})
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
    assert max(parts, default=1) == (1 if name in OF_MATRICES else -(-TOKENS // PART))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["s5", "convs5_pointwise"])
def test_complex_numbers(name: str) -> None:
    call = call_of(name)
    assert_agrees_with_reference(name, call)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["gla", "gated_delta_net", "gsa", "yaad_linear"])
def test_documents(name: str, parts: list[int]) -> None:
    """Documents begin inside parts, at their borders, or not at all."""
    assert_agrees_with_reference(name, call_of(name), cu_seqlens=torch.tensor([0, 3, PART, 2 * PART, 30, TOKENS]))
    assert max(parts) > 1


@pytest.mark.usefixtures("small_parts")
def test_resets_by_inputs() -> None:
    text = """
recurrence kept
    input g: log_decay[batch, token, head]
    input fresh: bool[batch, token]
    state S: [dk, dv]
    reset fresh
    step  S = exp(g) * S + outer(k, v)
    read  q @ S
"""
    fresh = torch.zeros(2, TOKENS, dtype=torch.bool)
    fresh[0, [5, 14, 20]] = fresh[1, [0, 7, 44]] = True
    assert_agrees_with_reference(text, call_of("gla", g=-torch.rand(2, TOKENS, 2).double()), fresh=fresh)


@pytest.mark.usefixtures("small_parts")
def test_positions_continue_across_parts_and_calls() -> None:
    """A value reads its token's position, counted over all tokens of this call and of earlier calls."""
    text = """
recurrence fading
    state S: [dk, dv]
    step  S = (1 - 1 / (t + 2)) * S + outer(k, v)
    read  q @ S
"""
    call = call_of("linear_attention")
    assert_agrees_with_reference(text, call)
    attend = compile_attention(text)
    head, tail = ({key: x[:, :, at] for key, x in call.items()} for at in (slice(0, 11), slice(11, None)))
    first, state = attend(**head, return_state=True)
    second = attend(**tail, state=state)
    assert torch.allclose(torch.cat([first, second], 2), attend(**call), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_parts")
def test_heads_that_share_keys() -> None:
    call = call_of("gla")
    call["k"], call["v"] = (call[key][:, :1].detach().requires_grad_() for key in "kv")
    assert_agrees_with_reference("gla", call)


@pytest.mark.usefixtures("small_parts")
def test_16_bits() -> None:
    """Inputs keep their dtype until each part is computed; results and gradients have the inputs' dtypes."""
    call = {key: x.detach().bfloat16().requires_grad_() for key, x in call_of("mamba2_ssd").items()}
    exact = {key: x.detach().double().requires_grad_() for key, x in call.items()}
    attend = compile_attention("mamba2_ssd")
    (ours, state), truth = attend(**call, return_state=True), attend(**exact)
    assert ours.dtype == torch.bfloat16
    assert state["S"].dtype == torch.float32
    assert error(ours, truth) < 2**-8
    weight = torch.randn(ours.shape)
    grads = torch.autograd.grad((ours.float() * weight).sum(), list(call.values()))
    wanted = torch.autograd.grad((truth * weight.bfloat16()).sum(), list(exact.values()))
    assert all(x.dtype == torch.bfloat16 for x in grads)
    assert max(error(x, y) for x, y in zip(grads, wanted, strict=True)) < 2**-7


@pytest.mark.usefixtures("small_parts")
def test_a_write_with_two_readers_is_not_overwritten() -> None:
    """A scan may store its states in the memory of its writes, unless another expression reads these writes."""
    text = """
recurrence twice
    learned A: real[head, dv]
    state x: [dv]
    state y: [dv]
    step  x = sigmoid(A) * x + 2 * v
    step  y = sigmoid(2 * A) * y + 2 * v
    read  x + y * silu(2 * v)
"""
    call = call_of("linear_attention", A=torch.randn(2, 3).double())
    assert_agrees_with_reference(text, call)
    fixed = {key: x.detach() for key, x in call.items()}
    with torch.no_grad():
        ours, theirs = (compile_attention(text, backend=backend)(**fixed) for backend in ("auto", "reference"))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_parts")
def test_second_derivatives_are_refused() -> None:
    call = call_of("gla")
    out = compile_attention("gla")(**call)
    (grad,) = torch.autograd.grad(out.square().sum(), call["v"], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), call["v"])


def test_memory_of_states_is_limited_to_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only inputs, outputs and their gradients span all tokens; states are kept per part."""
    monkeypatch.setattr(checkpointed, "ROWS", 1)
    monkeypatch.setattr(checkpointed, "FEWEST", 64)
    tokens, long_tensors = 1024, set[int]()
    q, k, v = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, tokens, 2, requires_grad=True)
    size = q.untyped_storage().nbytes()
    inputs = {x.untyped_storage().data_ptr() for x in (q, k, v)}

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= size:
                long_tensors.add(result.untyped_storage().data_ptr())
            return result

    attend = compile_attention("delta_net")
    with Counted():  # type: ignore[no-untyped-call]
        out = attend(q, k, v, beta=beta)
    assert long_tensors - inputs == {out.untyped_storage().data_ptr()}
    grad_out = torch.ones_like(out)
    with Counted():  # type: ignore[no-untyped-call]
        result = torch.autograd.grad(out, (q, k, v, beta), grad_out)
    allowed = {x.untyped_storage().data_ptr() for x in (out, grad_out, *result)}
    assert long_tensors - inputs <= allowed


def call_of(name: str, **more: Any) -> dict[str, Any]:
    """Return a call in fp64 whose tensors require gradients; `more` replaces the example's inputs."""
    q, k, v, inputs = example(name, T=TOKENS)
    for key in [key.removesuffix("_re") for key in inputs if key.endswith("_re")]:
        inputs[key] = torch.complex(inputs.pop(f"{key}_re"), inputs.pop(f"{key}_im"))
    call = {"q": q, "k": k, "v": v, **(more or inputs)}
    return {key: x.requires_grad_() if isinstance(x, Tensor) else x for key, x in call.items()}


def assert_agrees_with_reference(spec: str, call: dict[str, Any], **more: Any) -> None:
    """Compare outputs and every gradient with the token loop under torch's autograd."""
    leaves = [x for x in call.values() if isinstance(x, Tensor)]
    ours, theirs = (compile_attention(spec, backend=backend)(**call, **more) for backend in ("auto", "reference"))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = torch.randn(ours.shape, dtype=ours.dtype)
    grads, reference_grads = (
        torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (ours, theirs)
    )
    for x, y in zip(grads, reference_grads, strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9)
