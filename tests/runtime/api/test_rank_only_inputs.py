"""An input that only ranks a selection gets no gradient, and the call warns; used in the output as well, it trains."""

from __future__ import annotations

import warnings

import pytest
import torch

import attnc
from attnc import NoGradientWarning, compile_attention

RANKED = """pattern gated(block: int = 8, topk: int = 1)
    align   end
    input   gate: real[batch, head, query, blocks]
    select chosen
        over   b = k // block
        score  gate[q, b]
        from   b.end <= q
        keep   rank < topk
        always q in b
    visible k in chosen and k <= q
"""
USED = f"{RANKED}    value   sigmoid(gate[q, k // block]) * v\n"
N, BLOCKS = 21, 3


def operands() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, N, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v, torch.randn(1, 4, N, BLOCKS, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_input_that_only_ranks_warns_if_it_requires_a_gradient(backend: str) -> None:
    attend = compile_attention(RANKED, backend=backend)  # type: ignore[arg-type]
    q, k, v, gate = operands()
    with pytest.warns(NoGradientWarning, match=r"`gated` only ranks a selection by `gate`.*sigmoid\(gate") as warned:
        attend(q, k, v, gate=gate).sum().backward()  # type: ignore[no-untyped-call]
    assert [warning.filename for warning in warned] == [__file__]
    assert gate.grad is None or not gate.grad.any()


@pytest.mark.filterwarnings("error")
def test_no_warning_without_a_gradient() -> None:
    attend = compile_attention(RANKED)
    q, k, v, gate = operands()
    attend(q, k, v, gate=gate.detach())
    with torch.no_grad():
        attend(q, k, v, gate=gate)


@pytest.mark.filterwarnings("error")
def test_a_gate_that_is_used_in_the_output_trains() -> None:
    q, k, v, gate = operands()
    gradients: list[torch.Tensor] = []
    tiled = compile_attention(USED)
    for attend in (tiled, compile_attention(USED, backend="reference")):
        gate.grad = None
        attend(q, k, v, gate=gate).square().sum().backward()  # type: ignore[no-untyped-call]
        assert gate.grad is not None
        gradients.append(gate.grad)
    torch.testing.assert_close(*gradients)
    chosen = tiled.chosen(q, k, v, gate=gate)["chosen"]
    assert torch.equal(gradients[0] != 0, chosen)  # nonzero exactly where a block was selected


def test_warnings_are_public() -> None:
    assert issubclass(attnc.PatternWarning, UserWarning)
    assert issubclass(attnc.NoGradientWarning, UserWarning)


def test_a_learned_tensor_that_only_ranks_is_named() -> None:
    input_clause, learned_clause = "input   gate: real[batch, head, query, blocks]", "learned gate: real[blocks]"
    text = RANKED.replace(input_clause, learned_clause).replace("gate[q, b]", "gate[b]")
    module = compile_attention(text).module(heads=4, dk=8, dv=8, blocks=BLOCKS)
    q, k, v, _ = operands()
    with pytest.warns(NoGradientWarning, match="`gate`"):
        module(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.requires_grad_(requires_grad=False)(q, k, v)
