"""A short run of `make hunt`: random patterns as text and as Python closures, which must agree."""

from __future__ import annotations

import random

import pytest

from attnc.runtime.api.attention import Attention
from hunting import hunt
from hunting.attentions import attention
from hunting.calls import Mismatch, check_case
from tiers import examples

CASES = {"cpu": 60, "triton": 6, "hostile": 20, "plans": 6}


@pytest.mark.parametrize("part", [part for part in CASES if part != "triton"])
def test_drawn_cases_agree(part: str) -> None:
    outcomes = [outcome for seed in range(examples(CASES[part])) for outcome in hunt.PARTS[part](seed)]
    assert outcomes.count("agreed") > len(outcomes) // 2


def test_drawn_cases_agree_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="kernels need Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcomes = [outcome for seed in range(examples(CASES["triton"])) for outcome in hunt.PARTS["triton"](seed)]
    assert outcomes.count("agreed") > len(outcomes) // 2


def test_cases_are_the_same_every_time() -> None:
    texts = [hunt.draw("cpu", seed)[0].text for seed in range(50)]
    assert texts == [hunt.draw("cpu", seed)[0].text for seed in range(50)]
    assert len(set(texts)) > 45


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Attention.__call__

    def wrong(self: Attention, *tensors: object, **more: object) -> object:
        result = call(self, *tensors, **more)  # type: ignore[call-overload]
        return (result[0] * 1.001, *result[1:]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(Attention, "__call__", wrong)
    rng = random.Random(0)
    with pytest.raises(Mismatch, match="out differs"):
        for _ in range(10):
            check_case(attention(rng), rng, "cpu", 20)
