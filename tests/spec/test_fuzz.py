"""Nearly right texts compile or are refused soon, and every diagnostic has a position (`make fuzz` runs more)."""

from __future__ import annotations

import random
import time

import pytest

import fuzzing
import mutants
from attnc.spec.codes import CODES
from attnc.spec.errors import AttncError

CASES, PARTS = 2000, 20


@pytest.mark.parametrize("part", range(PARTS))
def test_no_text_crashes_or_hangs(part: int) -> None:
    size = CASES // PARTS
    findings = fuzzing.run(part * size, (part + 1) * size)
    assert findings.cases == size
    assert not findings.faults, "\n".join(f"case {number}: {what}" for number, what in findings.faults)


def test_cases_are_reproducible_and_differ() -> None:
    texts = [mutants.text(seed) for seed in range(200)]
    assert texts == [mutants.text(seed) for seed in range(200)]
    assert len(set(texts)) > 190


def test_some_texts_are_right_and_many_codes_occur() -> None:
    findings = fuzzing.run(0, 300)
    assert findings.right > 10
    assert len(findings.codes) > 25


def test_sentences_follow_the_grammar() -> None:
    parsed = 0
    for seed in range(100):
        codes, fault = fuzzing.examine(mutants.sentence(random.Random(seed), 60))
        assert fault is None
        parsed += all(code > "A2" for code in codes)
    assert parsed > 50


@pytest.mark.parametrize("what", ["crash", "hang", "place"])
def test_faults_are_reported(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> list[object]:
        if what == "crash":
            raise RecursionError("deep")
        if what == "hang":
            end = time.process_time() + 3 * fuzzing.SECONDS
            while time.process_time() < end:
                pass
            return []
        raise AttncError("somewhere")

    monkeypatch.setattr(fuzzing, "_diagnosed", broken)
    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)
    ((number, fault),) = fuzzing.run(7, 8).faults
    assert number == 7
    assert {"crash": "RecursionError: deep", "hang": " s", "place": "no place"}[what] in fault


@pytest.mark.parametrize(
    "text", ["floor(log(128 / (2 - 2)))", "floor(log2(q / (k - k)))", "128 / 0", "floor(sqrt(1 / 0))", "q % (k - k)"]
)
def test_divisions_by_zero_are_no_crash(text: str) -> None:
    """Cases 22378 and others, found by `make fuzz`."""
    codes, fault = fuzzing.examine(f"pattern p\n    visible k <= q and k < {text}\n")
    assert fault is None
    assert all(code in CODES for code in codes)
