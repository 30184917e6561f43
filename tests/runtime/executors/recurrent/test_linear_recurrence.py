"""The chunked linear recurrence against the token loop: results, lengths, splits, resets, dtypes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.executors.recurrent import chunk_layout
from attnc.runtime.executors.recurrent.chunk_forms import inverse
from attnc.runtime.executors.recurrent.linear import linear_recurrence
from attnc.runtime.executors.recurrent.linear_inputs import Delta, RankOne
from recurrence_cases import CLASSES, GATED, REGIMES, Tensors, chunked, draw_case, error, truth

TIGHT = 1e-12


def assert_close(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for actual, reference in zip(ours, expected, strict=True):
        assert actual.shape == reference.shape
        assert error(actual, reference) <= tolerance


def stretch_of(name: str, tensors: Tensors, tokens: slice, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run a stretch of tokens (micro = 1) from the given state."""
    unsliced = {"gate"} if "constant" in name.split() else set()
    rest = {key: x if key in unsliced else x[:, :, tokens] for key, x in tensors.items() if key != "state"}
    return chunked(name, rest | {"state": state})


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 100, 257])
def test_lengths(name: str, tokens: int) -> None:
    case = draw_case(name, tokens=tokens, sizes=(1, 2, 6, 5))
    assert_close(chunked(name, case), truth(name, case), TIGHT)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(name: str, regime: str) -> None:
    case = draw_case(name, regime, tokens=160)
    assert_close(chunked(name, case), truth(name, case), TIGHT)


@pytest.mark.parametrize("micro", [2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_micro_steps(name: str, micro: int) -> None:
    case = draw_case(name, tokens=50, micro=micro)
    resets = torch.zeros(2, 50, dtype=torch.bool)
    resets[0, 7], resets[1, 40] = True, True
    assert_close(chunked(name, case, resets, micro), truth(name, case, resets, micro), TIGHT)


@pytest.mark.parametrize("name", CLASSES)
def test_chunk_lengths(name: str) -> None:
    case = draw_case(name, "mixed", tokens=150)
    expected = chunked(name, case)
    for chunk in (1, 2, 16, 32, 128):
        assert_close(chunked(name, case, chunk=chunk), expected, TIGHT)


@pytest.mark.parametrize("name", CLASSES)
def test_several_stretches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of one chunk give the same result as all chunks at once."""
    case = draw_case(name, "mixed", tokens=150)
    expected = chunked(name, case, chunk=32)
    monkeypatch.setattr(chunk_layout, "STRETCH", 1)
    assert_close(chunked(name, case, chunk=32), expected, TIGHT)


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("name", CLASSES)
def test_a_stretch_with_as_many_rows_as_tokens(name: str, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch holds as many rows as the call has tokens, fewer than the call's rows with micro-steps."""
    case = draw_case(name, tokens=64, micro=micro)
    batch, heads = case["q"].shape[:2]
    expected = truth(name, case, None, micro)
    monkeypatch.setattr(chunk_layout, "STRETCH", batch * heads * 64)
    assert_close(chunked(name, case, None, micro, chunk=16), expected, TIGHT)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_sequences_split_at_any_token(name: str, cut: int) -> None:
    case = draw_case(name, "mixed", tokens=130)
    first, state = stretch_of(name, case, slice(0, cut), case["state"])
    second, final = stretch_of(name, case, slice(cut, None), state)
    assert_close((torch.cat((first, second), 2), final), chunked(name, case), TIGHT)


@pytest.mark.parametrize("name", CLASSES)
def test_resets(name: str) -> None:
    case = draw_case(name, tokens=140)
    resets = torch.zeros(2, 140, dtype=torch.bool)
    resets[0, [0, 30, 64, 65]], resets[1, [63, 127]] = True, True
    assert_close(chunked(name, case, resets), truth(name, case, resets), TIGHT)


@pytest.mark.parametrize("name", CLASSES)
def test_a_reset_is_a_fresh_start(name: str) -> None:
    """Nothing of the earlier document remains, whether the state is read before or after its update."""
    case = draw_case(name, tokens=100)
    resets = torch.zeros(2, 100, dtype=torch.bool)
    resets[:, 70] = True
    out, final = chunked(name, case, resets)
    fresh = stretch_of(name, case, slice(70, None), torch.zeros_like(case["state"]))
    assert_close((out[:, :, 70:], final), fresh, TIGHT)


@pytest.mark.parametrize("name", GATED)
def test_all_gates_closed(name: str) -> None:
    case = draw_case(name, tokens=70)
    for gate in {"gate", "gate_columns"} & case.keys():
        case[gate] = torch.full_like(case[gate], -torch.inf)
    assert_close(chunked(name, case), truth(name, case), TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    """Inputs of 16 bits are computed in fp32 and rounded once."""
    case = {key: x.to(dtype) for key, x in draw_case(name, "mild", tokens=90).items()}
    out, final = chunked(name, case)
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    expected, state = truth(name, {key: x.double() for key, x in case.items()})
    assert error(out, expected) < torch.finfo(dtype).eps
    assert error(final, state) < 2e-6


@pytest.mark.parametrize("name", CLASSES)
def test_repeated_calls_give_the_same_bits(name: str) -> None:
    case = {key: x.float() for key, x in draw_case(name, "mixed", tokens=200).items()}
    for first, second in zip(chunked(name, case), chunked(name, case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", CLASSES)
def test_strided_inputs(name: str) -> None:
    """Heads lie next to channels in memory, the layout that projections produce."""
    case = draw_case(name, tokens=70)
    strided = {key: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x for key, x in case.items()}
    assert_close(chunked(name, strided), chunked(name, case), TIGHT)


def test_no_batch_and_no_heads() -> None:
    for batch, heads in ((0, 2), (2, 0)):
        x = torch.zeros(batch, heads, 5, 4)
        out, state = linear_recurrence(x, x, x)
        assert (out.shape, state.shape) == ((batch, heads, 5, 4), (batch, heads, 4, 4))


SEVERAL = {
    "a write and a correction": "step S = S + outer(k, v)\nstep S = S + beta * outer(k, v - k @ S)",
    "a correction and a write": "step S = S + beta * outer(k, v - k @ S)\nstep S = S + outer(w, v)",
    "a decay and a correction": "step S = beta * S + outer(w, v)\nstep S = S + beta * outer(k, v - k @ S)",
    "two kinds of corrections": "step S = S + beta * outer(k, v - k @ S)\nstep S = S - beta / 2 * outer(w, k @ S)",
    "the old state first": "step S = beta * S + outer(k, w @ S) / 2\nstep S = S + beta * outer(k, v - k @ S)",
}


@pytest.mark.parametrize("name", SEVERAL)
def test_steps_of_which_some_correct(name: str) -> None:
    """Only some steps of a token correct the state, or they correct it in different ways."""
    inputs = ["input beta: unit[batch, token, head]", "input w: real[batch, token, head, dk]", "state S: [dk, dv]"]
    text = "\n    ".join(["recurrence r", *inputs, *SEVERAL[name].splitlines(), "read q @ S"]) + "\n"
    case = draw_case("delta", tokens=70)
    tensors = [case["q"], case["k"], case["v"], case["beta"].mT, case["k"].flip(2).transpose(1, 2)]
    results = []
    for backend in ("auto", "reference"):
        attend = compile_attention(text, backend=backend)
        ours = [x.clone().requires_grad_() for x in tensors]
        out = attend(*ours[:3], beta=ours[3], w=ours[4])
        grads = torch.autograd.grad(out.square().sum(), ours, allow_unused=True, materialize_grads=True)
        results.append([out, *grads])
    assert "token by token" not in compile_attention(text).derivation()
    for actual, reference in zip(*results, strict=True):
        assert error(actual, reference) < TIGHT


@pytest.mark.parametrize("beta", [1.0, 1.9])
def test_similar_keys(beta: float) -> None:
    """Powers of the triangular matrix, multiplied out, would lose every digit here."""
    draw = torch.Generator().manual_seed(3)
    k = torch.nn.functional.normalize(
        torch.randn(64, generator=draw) + 0.3 * torch.randn(8, 64, 64, generator=draw), dim=-1
    )
    lower = (beta * k @ k.mT).tril(-1)
    expected = torch.linalg.inv(torch.eye(64).double() + lower.double())
    assert error(inverse(lower), expected) < 1e-5


X, Y = torch.zeros(2, 3, 8, 4), torch.zeros(2, 3, 8, 5)
REFUSED: dict[str, dict[str, Any]] = {
    "k: expected shape": {"k": X[..., :3]},
    "v: expected shape": {"v": Y[:, :, :7]},
    "v must have four dimensions": {"v": Y[0]},
    "v: expected real numbers": {"v": Y.int()},
    "gate: expected shape": {"gate": torch.zeros(2, 8)},
    "gate_columns: expected shape": {"gate_columns": X},
    "gate_columns with a correction is not supported": {"gate_columns": Y, "correction": Delta(X[..., 0])},
    "correction.beta: expected shape": {"correction": Delta(X)},
    "correction.read: expected shape": {"correction": Delta(X[..., 0], Y)},
    "correction.left: expected shape": {"correction": RankOne(Y, X, "old")},
    "resets: expected bool": {"resets": torch.zeros(2, 8)},
    "resets: expected shape": {"resets": torch.zeros(2, 3, 8, dtype=torch.bool)},
    "state: expected shape": {"state": torch.zeros(2, 3, 5, 4)},
    "chunk must be a power": {"chunk": 48},
    "micro must be from": {"micro": 65},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    arguments: dict[str, Any] = {"q": X, "k": X, "v": Y}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        linear_recurrence(**(arguments | REFUSED[message]))


def test_vmap_and_forward_mode_refused() -> None:
    case = draw_case("rows delta", tokens=5)
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda q: chunked("rows delta", case | {"q": q})[0])(torch.stack([case["q"]] * 2))
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda q: chunked("rows delta", case | {"q": q})[0], (case["q"],), (case["q"],))
