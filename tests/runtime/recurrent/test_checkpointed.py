"""Calls of recurrences that are cut into parts of a few tokens: results, gradients and states are those of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnc import UnsupportedError, compile_attention
from attnc.runtime.recurrent import checkpointed
from recurrence_cases import error
from recurrence_draws import example
from recurrence_regimes import GRIDS, SYSTEMS, by_reference, by_us, draw_case, everything

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(set(SYSTEMS) - set(GRIDS))
OF_MATRICES = {"mamba1", "mamba_mixer"}
"""Taken entry by entry, in stretches of their own."""
TOKENS, PART = 45, 7


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 7 tokens."""
    monkeypatch.setattr(checkpointed, "ROWS", 1)
    monkeypatch.setattr(checkpointed, "FEWEST", PART)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many parts calls were cut into."""
    seen: list[int] = []
    spans = checkpointed.Parts.spans

    def kept(self: checkpointed.Parts) -> list[slice]:
        found = spans(self)
        seen.append(len(found))
        return found

    monkeypatch.setattr(checkpointed.Parts, "spans", kept)
    yield seen


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients(name: str, parts: list[int]) -> None:
    """Against the loops over tokens, states and their gradients included; in fp64."""
    case = draw_case(name, "mixed", TOKENS)
    truth = everything(case, by_reference, torch.float64)
    ours = everything(case, by_us, torch.float64)
    worst = {key: error(ours[key], x) for key, x in truth.items()}
    assert max(worst.values()) <= (1e-10 if name in ("aaren", "lightnet") else 1e-12), worst
    with torch.no_grad():
        plain = by_us(case, {key: x.double() for key, x in case.tensors.items()})
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
    assert max(parts, default=1) == (1 if name in OF_MATRICES else -(-TOKENS // PART))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["s5", "convs5_pointwise"])
def test_complex_numbers(name: str) -> None:
    given = drawn(name)
    assert_as_by_reference(name, given)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["gla", "gated_delta_net", "gsa", "yaad_linear"])
def test_documents(name: str, parts: list[int]) -> None:
    """That begin inside parts, between them, and not at all."""
    assert_as_by_reference(name, drawn(name), cu_seqlens=torch.tensor([0, 3, PART, 2 * PART, 30, TOKENS]))
    assert max(parts) > 1


@pytest.mark.usefixtures("cut")
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
    assert_as_by_reference(text, drawn("gla", g=-torch.rand(2, TOKENS, 2).double()), fresh=fresh)


@pytest.mark.usefixtures("cut")
def test_places_go_on() -> None:
    """A value that reads where its token stands, among all tokens of the call and of those before."""
    text = """
recurrence fading
    state S: [dk, dv]
    step  S = (1 - 1 / (t + 2)) * S + outer(k, v)
    read  q @ S
"""
    given = drawn("linear_attention")
    assert_as_by_reference(text, given)
    attend = compile_attention(text)
    head, tail = ({key: x[:, :, at] for key, x in given.items()} for at in (slice(0, 11), slice(11, None)))
    first, state = attend(**head, return_state=True)
    second = attend(**tail, state=state)
    assert torch.allclose(torch.cat([first, second], 2), attend(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("cut")
def test_heads_that_share_keys() -> None:
    given = drawn("gla")
    given["k"], given["v"] = (given[key][:, :1].detach().requires_grad_() for key in "kv")
    assert_as_by_reference("gla", given)


@pytest.mark.usefixtures("cut")
def test_sixteen_bits() -> None:
    """Inputs are taken as they are, part by part; results and gradients are of their dtype."""
    given = {key: x.detach().bfloat16().requires_grad_() for key, x in drawn("mamba2_ssd").items()}
    exact = {key: x.detach().double().requires_grad_() for key, x in given.items()}
    attend = compile_attention("mamba2_ssd")
    (ours, state), truth = attend(**given, return_state=True), attend(**exact)
    assert ours.dtype == torch.bfloat16
    assert state["S"].dtype == torch.float32
    assert error(ours, truth) < 2**-8
    weight = torch.randn(ours.shape)
    found = torch.autograd.grad((ours.float() * weight).sum(), list(given.values()))
    wanted = torch.autograd.grad((truth * weight.bfloat16()).sum(), list(exact.values()))
    assert all(x.dtype == torch.bfloat16 for x in found)
    assert max(error(x, y) for x, y in zip(found, wanted, strict=True)) < 2**-7


@pytest.mark.usefixtures("cut")
def test_what_two_read_is_not_written_over() -> None:
    """A scan's states may take the place of what is written, unless that is read elsewhere."""
    text = """
recurrence twice
    learned A: real[head, dv]
    state x: [dv]
    state y: [dv]
    step  x = sigmoid(A) * x + 2 * v
    step  y = sigmoid(2 * A) * y + 2 * v
    read  x + y * silu(2 * v)
"""
    given = drawn("linear_attention", A=torch.randn(2, 3).double())
    assert_as_by_reference(text, given)
    fixed = {key: x.detach() for key, x in given.items()}
    with torch.no_grad():
        ours, theirs = (compile_attention(text, backend=backend)(**fixed) for backend in ("auto", "reference"))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("cut")
def test_second_derivatives_are_refused() -> None:
    given = drawn("gla")
    out = compile_attention("gla")(**given)
    (grad,) = torch.autograd.grad(out.square().sum(), given["v"], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), given["v"])


def test_memory_is_that_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but inputs, outputs and their gradients has all tokens; states are kept of parts."""
    monkeypatch.setattr(checkpointed, "ROWS", 1)
    monkeypatch.setattr(checkpointed, "FEWEST", 64)
    tokens, whole = 1024, set[int]()
    q, k, v = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, tokens, 2, requires_grad=True)
    size = q.untyped_storage().nbytes()
    given = {x.untyped_storage().data_ptr() for x in (q, k, v)}

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.untyped_storage().nbytes() >= size:
                whole.add(found.untyped_storage().data_ptr())
            return found

    attend = compile_attention("delta_net")
    with Counted():  # type: ignore[no-untyped-call]
        out = attend(q, k, v, beta=beta)
    assert whole - given == {out.untyped_storage().data_ptr()}
    ones = torch.ones_like(out)
    with Counted():  # type: ignore[no-untyped-call]
        found = torch.autograd.grad(out, (q, k, v, beta), ones)
    own = {x.untyped_storage().data_ptr() for x in (out, ones, *found)}
    assert whole - given <= own


def drawn(name: str, **more: Any) -> dict[str, Any]:
    """A call in fp64 whose tensors want gradients; `more` in the place of its inputs."""
    q, k, v, given = example(name, T=TOKENS)
    for key in [key.removesuffix("_re") for key in given if key.endswith("_re")]:
        given[key] = torch.complex(given.pop(f"{key}_re"), given.pop(f"{key}_im"))
    call = {"q": q, "k": k, "v": v, **(more or given)}
    return {key: x.requires_grad_() if isinstance(x, Tensor) else x for key, x in call.items()}


def assert_as_by_reference(spec: str, given: dict[str, Any], **more: Any) -> None:
    """Outputs and every gradient, token by token under torch's autograd."""
    leaves = [x for x in given.values() if isinstance(x, Tensor)]
    ours, theirs = (compile_attention(spec, backend=backend)(**given, **more) for backend in ("auto", "reference"))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = torch.randn(ours.shape, dtype=ours.dtype)
    found, truth = (
        torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (ours, theirs)
    )
    for x, y in zip(found, truth, strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9)
