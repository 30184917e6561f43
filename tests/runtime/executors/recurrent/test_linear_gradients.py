"""Gradients of the chunked linear recurrence: gradcheck, the token loop in every gate regime, and errors of fp32."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.recurrent import chunk_layout
from recurrence_cases import CLASSES, GATED, REGIMES, chunked, draw_case, error, gradients, leaves, truth


def classes_with_regimes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pair each class with every regime of its gate; a class without a gate has one regime."""
    return [(name, regime) for name in names for regime in (REGIMES if name in GATED else ["mild"])]


@pytest.mark.parametrize("name", CLASSES)
def test_gradcheck(name: str) -> None:
    case = leaves(draw_case(name, tokens=5, sizes=(1, 2, 3, 2)))
    tensors = list(case.values())
    assert torch.autograd.gradcheck(lambda *xs: chunked(name, dict(zip(case, xs, strict=True)), chunk=4), tensors)


@pytest.mark.parametrize(("name", "regime"), classes_with_regimes(CLASSES))
def test_every_regime(name: str, regime: str) -> None:
    case = draw_case(name, regime, tokens=160, sizes=(1, 2, 8, 5))
    ours, theirs = leaves(case), leaves(case)
    actual, expected_grads = gradients(chunked(name, ours), ours), gradients(truth(name, theirs), theirs)
    assert {
        key: error(actual[key], expected_grads[key])
        for key in actual
        if not error(actual[key], expected_grads[key]) < 1e-12
    } == {}


@pytest.mark.parametrize("micro", [2, 3])
@pytest.mark.parametrize("name", ["constant", "rows columns", "scalar delta", "rows old", "rows comba"])
def test_micro_steps_resets_and_stretches(name: str, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_layout, "STRETCH", 1)
    case = draw_case(name, tokens=70, micro=micro)
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[0, [5, 32]], resets[1, 41] = True, True
    ours, theirs = leaves(case), leaves(case)
    actual = gradients(chunked(name, ours, resets, micro, chunk=32), ours)
    expected_grads = gradients(truth(name, theirs, resets, micro), theirs)
    assert max(error(actual[key], expected_grads[key]) for key in actual) < 1e-12


# At most twice the measured error, in units of 1e-7: results, gradients, gradients of gates.
REQUIRED = {
    "": (4.0, 4.8, 0),
    "scalar": (5.4, 9.4, 6.2),
    "rows": (5.4, 8.8, 4.6),
    "rows columns": (4.4, 6.0, 5.2),
    "rows before": (4.6, 6.8, 4.8),
    "delta": (7.0, 9.6, 0),
    "scalar delta": (7.8, 10.8, 7.8),
    "rows delta": (10.2, 9.6, 9.2),
    "scalar comba": (6.4, 10.2, 8.8),
    "rows old": (8.6, 10.6, 7.0),
}


@pytest.mark.parametrize(("name", "regime"), classes_with_regimes(REQUIRED))
def test_errors_of_fp32(name: str, regime: str) -> None:
    case = {key: x.float() for key, x in draw_case(name, regime, 200, sizes=(1, 3, 32, 24)).items()}
    ours, theirs = leaves(case, torch.float32), leaves(case)
    results, expected = chunked(name, ours), truth(name, theirs)
    actual, expected_grads = gradients(results, ours), gradients(expected, theirs)
    if regime == "-100 first" and not {"before", "old"} & set(name.split()):
        assert actual.pop("state").abs().max() < 1e-40
    forward = max(error(x, y) for x, y in zip(results, expected, strict=True))
    gates = max((error(actual[key], expected_grads[key]) for key in actual if "gate" in key), default=0)
    other_errors = max(error(actual[key], expected_grads[key]) for key in actual if "gate" not in key)
    assert all(key <= most * 1e-7 for key, most in zip((forward, other_errors, gates), REQUIRED[name], strict=True))


@pytest.mark.parametrize("name", ["scalar", "rows", "rows columns", "rows delta"])
def test_nothing_crosses_a_closed_gate(name: str) -> None:
    """A gate's gradient is exactly 0 where the gate is closed: no difference of large terms remains."""
    case = leaves(draw_case(name, "-inf", tokens=160), torch.float32)
    gate = gradients(chunked(name, case), case)["gate"]
    assert not gate[:, :, [77, 128, 150]].any()


def test_gradients_of_some_inputs() -> None:
    case = draw_case("rows delta", tokens=70)
    case["v"].requires_grad_()
    out, final = chunked("rows delta", case)
    (alone,) = torch.autograd.grad(out.sum(), case["v"])
    assert alone.isfinite().all()
    assert final.requires_grad


@pytest.mark.parametrize("name", ["constant", "rows before", "rows delta"])
def test_16_bits(name: str) -> None:
    """Gradients have the inputs' dtypes; gradients of heads that share an input are summed before rounding."""
    case = leaves(draw_case(name, tokens=130), torch.bfloat16)
    exact = leaves({key: x.detach() for key, x in case.items()})
    actual, expected_grads = gradients(chunked(name, case), case), gradients(truth(name, exact), exact)
    for key, x in actual.items():
        assert x.dtype == torch.bfloat16
        assert error(x, expected_grads[key]) < 2**-7


def test_empty_sequences() -> None:
    case = leaves(draw_case("scalar delta", tokens=0))
    out, final = chunked("scalar delta", case)
    (state,) = torch.autograd.grad(final.sum() + out.sum(), case["state"])
    assert torch.equal(state, torch.ones_like(state))


def test_functional_gradient() -> None:
    case = draw_case("rows delta", tokens=20)
    ours = torch.func.grad(lambda q: chunked("rows delta", case | {"q": q})[0].sum())(case["q"])
    theirs = torch.func.grad(lambda q: truth("rows delta", case | {"q": q})[0].sum())(case["q"])
    assert error(ours, theirs) < 1e-12


def test_second_derivatives_refused() -> None:
    case = leaves(draw_case("scalar delta", tokens=20))
    (first,) = torch.autograd.grad(chunked("scalar delta", case)[0].square().sum(), case["q"], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(first.sum(), case["q"])
