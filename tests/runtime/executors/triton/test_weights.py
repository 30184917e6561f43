"""Kernels for weights other than a softmax of the score: formulas, formulas over their row sum, sums of formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.call.call_errors import UnsupportedError
from kernel_calls import check, operands, recorded, stages

BACKWARD = {"dq", "dkdv"}


@pytest.fixture(params=["sm_90", "sm_80"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from attnc.compiler.kernels.targets import TARGETS
    from attnc.runtime.executors.triton import planner

    name: str = request.param
    monkeypatch.setattr(planner, "target_of", lambda device: TARGETS[name])
    return name


def pattern(weights: str, *, relation: str = "0 <= q - k < 40", inputs: str = "", score: str = "") -> str:
    lines = ["pattern weighed", "    align end", *(f"    input {one}" for one in inputs.split("; ") if one)]
    lines += [f"    visible {relation}", *([f"    score {score}"] if score else []), f"    weights {weights}"]
    return "\n".join(lines) + "\n"


FORMULAS = [
    "sigmoid(score - 3)",
    "relu(score) ** 2",
    "score",
    "silu(score) / count(visible for k)",
    "erf(score) / count(visible for k)",
    "1",
    "dot(normalised(q), normalised(k))",
]
SHARES = [
    "softplus(score) / sum(softplus(score) for k)",
    "relu(score) / sum(relu(score) for k)",
    "(1 + score * score) / sum(1 + score * score for k)",
]


@pytest.mark.parametrize("weights", FORMULAS)
def test_formulas(weights: str, target: str) -> None:
    attention = compile_attention(pattern(weights), backend="triton")
    launches = check(attention, operands(97, 120, heads=(2, 1)), with_lse=False)
    assert stages(launches) == {"forward", *BACKWARD}


@pytest.mark.parametrize("weights", SHARES)
def test_formulas_divided_by_their_sum(weights: str, target: str) -> None:
    attention = compile_attention(pattern(weights), backend="triton")
    launches = check(attention, operands(97, 120, heads=(2, 1)), with_lse=False)
    assert stages(launches) == {"forward", "delta", *BACKWARD}


def test_exponentials_divided_by_their_sum_are_a_softmax(target: str) -> None:
    """The result is exact even for scores so large that their exponentials overflow."""
    attention = compile_attention(pattern("exp(score) / sum(exp(score) for k)"), backend="triton")
    tensors = operands(60, heads=(2, 1))
    tensors["q"] = tensors["q"] * 40
    check(attention, tensors, with_lse=False, tolerance=1e-4)
    assert "most" in attention.source("sm_90")["weighed_forward"]


@pytest.mark.parametrize("relation", ["k <= q - 20 and q % 3 > 0", "k <= q and power_of_two(q - k + 1)", "true"])
@pytest.mark.parametrize("weights", [FORMULAS[0], SHARES[0]])
def test_relations(weights: str, relation: str, target: str) -> None:
    """Relations with rows without keys, with tile lists, and with every pair visible."""
    attention = compile_attention(pattern(weights, relation=relation), backend="triton")
    assert stages(check(attention, operands(70, heads=(2, 2)), with_lse=False)) >= BACKWARD


def test_inputs_by_query_and_by_key_have_gradients(target: str) -> None:
    text = pattern(
        "sigmoid(b[q] * score + c[k]) / sum(sigmoid(b[q] * score + c[k]) for k)",
        inputs="b: real[batch, head, query]; c: real[batch, head, key]",
    )
    torch.manual_seed(5)
    inputs = {"b": torch.randn(1, 2, 50), "c": torch.randn(1, 2, 60)}
    check(compile_attention(text, backend="triton"), operands(50, 60, heads=(2, 1)), inputs, with_lse=False)


@pytest.mark.parametrize("cut", [None, [0, 1, 1, 40, 66]], ids=["whole", "packed"])
def test_key_counts(cut: list[int] | None, target: str) -> None:
    """Keys are counted where ranges overlap, and within documents."""
    text = pattern(
        SHARES[0],
        relation="k <= q and (q - k < 20 or k < 15)",
        score="log(dk) * log(count(visible for k)) * dot(normalised(q), normalised(k))",
    )
    more: dict[str, Any] = {} if cut is None else {"cu_seqlens": torch.tensor(cut)}
    launches = check(compile_attention(text, backend="triton"), operands(66), more, with_lse=False)
    assert stages(launches) >= BACKWARD


def test_half_precision(target: str) -> None:
    for weights in (FORMULAS[0], SHARES[0]):
        attention = compile_attention(pattern(weights), backend="triton")
        check(attention, operands(70, heads=(2, 1), widths=(40, 24), dtype=torch.float16), with_lse=False)


def test_head_dimensions(target: str) -> None:
    check(compile_attention(pattern(SHARES[0]), backend="triton"), operands(40, widths=(16, 300)), with_lse=False)


ROW = "alpha: real[batch, head, query]; beta: real[batch, head, query]"


@pytest.mark.parametrize(
    "weights",
    [
        "alpha[q] * softmax(score) + beta[q]",
        "alpha[q] * softmax(2 * score) / 2 - beta[q] * sigmoid(score) - relu(score)",
        "beta[q] * softplus(score) / sum(softplus(score) for k) + alpha[q] * softmax(score)",
        "alpha[q] * softmax(score)",
    ],
)
def test_sums(weights: str, target: str) -> None:
    """Each summand runs in kernels of its own."""
    torch.manual_seed(5)
    inputs: dict[str, Any] = {"alpha": torch.rand(2, 4, 60), "beta": torch.randn(2, 4, 60)}
    attention = compile_attention(pattern(weights, inputs=ROW), backend="triton", strict=True)
    launches = check(attention, operands(60, heads=(4, 2), batch=2), inputs, with_lse=False)
    assert stages(launches) >= {"forward", *BACKWARD}
    plan = attention.plan(60, heads=4, kv_heads=2, batch=2, device="cuda", **inputs)
    assert plan.executor == "triton"
    assert plan.fallback is None


def test_a_nested_division_by_sums_runs_as_tiles_in_torch() -> None:
    text = pattern("softmax(score) ** 2 / sum(softmax(score) ** 2 for k)")
    attention = compile_attention(text, backend="triton")
    assert (
        attention.plan(60, heads=2, device="cuda").fallback
        == "there are no kernels for weights that need all keys of a row"
    )
    with recorded() as launches:
        attention(*operands(60).values())
    assert not launches
    with pytest.raises(UnsupportedError, match="strict: the weights of `weighed` need 2 passes"):
        compile_attention(text, backend="triton", strict=True)


def test_key_counts_in_bricks_run_as_tiles_in_torch() -> None:
    text = "pattern weighed\n    tokens y: 8, x: 8\n    visible abs(q.y - k.y) < 2 and abs(q.x - k.x) < 2\n"
    text += "    weights sigmoid(score) / count(visible for k)\n"
    plan = compile_attention(text, backend="triton").plan(64, heads=2, device="cuda")
    assert plan.fallback == "there are no kernels for counts of keys, unless each row sees a few ranges of keys"
