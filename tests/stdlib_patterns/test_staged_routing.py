"""HiP, DHSA and MMInference's grid: agreement with the evaluator, presets, and the cost of a call with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.spec.errors import SpecError
from attnc.spec.meaning.evaluate import Evaluator
from reference.dhsa import dhsa
from reference.hip import hip

pytestmark = pytest.mark.usefixtures("one_thread")

HIP: dict[str, Any] = {
    **{"stages": [8, 4], "kept": [16, 8], "strides": [2, 1]},
    **{"rows": 4, "sinks": 2, "window": 8},
}
CASES: dict[str, dict[str, Any]] = {
    "hip": HIP,
    "dhsa": {"rows": 4, "topk": 9, "near": 3, "first": 2},
    "mminference_grid": {"strides": [2, 3], "probe": 5},
}


def made(n_q: int, n_k: int) -> list[Tensor]:
    return [torch.randn(1, heads, n, 4, dtype=torch.float64) for heads, n in ((2, n_q), (1, n_k), (1, n_k))]


def pieces(n: int) -> dict[str, Any]:
    begin = torch.arange(n) // 5 * 5
    return {"begin": begin[None], "stop": (begin + 5).clamp(max=n)[None]}


@pytest.mark.parametrize(("n_q", "n_k"), [(29, 29), (7, 25)])
@pytest.mark.parametrize("name", CASES)
def test_the_evaluator_agrees(name: str, n_q: int, n_k: int) -> None:
    attend = compile_attention(name, **CASES[name])
    q, k, v = made(n_q, n_k)
    inputs: dict[str, Any] = pieces(n_k) if name == "dhsa" else {}
    counts = {"queries": n_q, "keys": n_k, "heads": 2, "kv_heads": 1, "dk": 4, "dv": 4}
    oracle = Evaluator(attend.bound, inputs={key: x.tolist() for key, x in inputs.items()}, **counts)
    wanted = torch.tensor(oracle.attend(*(x.tolist() for x in (q, k, v)))[0], dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, **inputs), wanted, rtol=1e-10, atol=1e-12)


def test_the_papers_settings() -> None:
    """At 2,100 tokens each stage leaves some tokens out."""
    q, k, v = (torch.randn(1, 1, 2100, 8, dtype=torch.float64) for _ in range(3))
    attend = compile_attention("hip", kept=[512, 128, 64], sinks=256)
    settings: dict[str, Any] = {"stages": [256, 32, 8], "strides": [4, 4, 1], "rows": 64, "sinks": 256, "window": 1024}
    seen, wanted = hip(q, k, v, kept=[512, 128, 64], **settings)
    assert torch.equal(attend.mask(2100, q=q, k=k), seen[:, 0])
    torch.testing.assert_close(attend(q, k, v), wanted, rtol=1e-10, atol=1e-11)


def test_presets_are_the_papers() -> None:
    values = [dict(compile_attention("hip", preset=name).bound.values) for name in (None, "first_layers")]
    assert values[0]["kept"] == (32768, 8192, 2048)
    assert values[1] == {**values[0], "kept": (32768, 8192, 4096)}


def test_the_last_queries_of_dhsa_one_by_one() -> None:
    """The last queries are a separate call whose blocks hold one query."""
    q, k, v = made(40, 40)
    settings, inputs = {**CASES["dhsa"], "rows": 1}, pieces(40)
    last = compile_attention("dhsa", **settings)(q[:, :, -6:], k, v, **inputs)
    _, wanted = dhsa(q, k, v, **inputs, **settings)
    torch.testing.assert_close(last, wanted[:, :, -6:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "params", [{"stages": [12, 4]}, {"window": 4}, {"strides": [0, 1]}, {"rows": 0}], ids=lambda x: next(iter(x))
)
def test_hip_requires(params: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"A805.*requires `all\(power_of_two"):
        compile_attention("hip", **{**HIP, **params})
