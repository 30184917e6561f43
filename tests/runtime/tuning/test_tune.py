"""Tuning measures once, stores the choice for every process, keeps results correct, and is stated in the plan."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.choices.choice_source import read_wanted
from attnc.runtime.choices.records import MODEL, Record, read_record
from attnc.runtime.disk.store import store
from attnc.runtime.tuning.timer import LEAST
from attnc.runtime.tuning.tuner import _enough
from tuned_calls import TIME, record_of, vectors


def test_the_first_call_measures_and_the_next_does_not(runs: list[str]) -> None:
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    out = attend(q, k, v)
    assert runs == ["sliding_window"]
    attend(q, k, v)
    attend(*vectors(290))  # falls into the same bucket
    assert runs == ["sliding_window"]
    record = record_of(attend)
    assert record.bucket == "q512-k512-lanes2-square"
    assert record.stage == "forward"
    options = [trial.option for trial in record.trials]
    assert options[0] == MODEL
    assert 2 <= len(options) <= 5
    assert all(trial.rounds >= 3 and trial.low <= trial.median <= trial.high for trial in record.trials)
    assert all(trial.predicted is not None and trial.predicted > 0 for trial in record.trials)
    assert torch.allclose(out, attend.reference(q, k, v), atol=1e-5)
    assert "tuned for q512-k512-lanes2-square" in str(attend.plan(300, heads=2, head_dim=16))
    assert "not tuned for q1024" in str(attend.plan(1000, heads=2, head_dim=16))


def test_another_process_measures_nothing(folder: Path) -> None:
    """A second process reads the cache: it measures nothing and takes the stored option."""
    text = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
from attnc import compile_attention
attend = compile_attention("sliding_window", window=40, tune="60s")
torch.manual_seed(1)
attend(*(torch.randn(1, 2, 300, 16) for _ in range(3)))
print(attend.plan(300, heads=2, head_dim=16).reasons[0])
"""
    outputs = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "tuned `sliding_window` in" in outputs[0]
    assert "tuned `sliding_window` in" not in outputs[1]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(list(folder.glob("tuned-*.json"))) == 1


def test_the_fastest_option_is_taken_and_correct(clock: Callable[[dict[str, float]], None]) -> None:
    q, k, v = vectors(gradients=True)
    for part in ("tiles 128", "whole", "tiles 256"):
        clock({part: 0.5})
        attend = compile_attention("sliding_window", window=40, tune=TIME)
        assert attend.tuned is not None
        attend.tuned.look_again()
        attend.tune(q, k, v)
        record = record_of(attend)
        out = attend(q, k, v)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        want = attend.reference(q, k, v)
        wanted = torch.autograd.grad(want.sum(), (q, k, v))
        assert torch.allclose(out, want, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(grads, wanted, strict=True))
        option = record.choices[""]
        assert part in option
        plan = attend.plan(300, heads=2, head_dim=16)
        assert option == MODEL or f"{option}, 0.500 ms; the model's choice takes 1.000 ms" in plan.reasons[0]
        store().clear()


def test_a_barely_faster_option_is_not_taken(clock: Callable[[dict[str, float]], None]) -> None:
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    clock({"other": 0.98})
    attend(*vectors())
    assert record_of(attend).choices == {"": MODEL}
    assert "the model's choice is the fastest of" in attend.plan(300, heads=2, head_dim=16).reasons[0]


def test_training_is_measured_with_its_backward(runs: list[str]) -> None:
    attend = compile_attention("causal", tune=TIME)
    attend(*vectors())
    assert record_of(attend).stage == "forward"
    attend(*vectors(gradients=True))
    assert record_of(attend).stage == "training"
    attend(*vectors())
    with torch.no_grad():
        attend(*vectors(gradients=True))
    assert record_of(attend).stage == "training"
    assert runs == ["causal", "causal"]


@pytest.mark.parametrize(
    ("name", "params", "inputs"),
    [
        ("alibi", {}, {}),
        ("prefix_lm", {}, {"prefix": torch.tensor([40])}),
        ("differential", {}, None),
        ("sparse_transformer", {"stride": 16}, {}),
    ],
)
def test_scores_documents_and_branches(name: str, params: dict[str, Any], inputs: dict[str, Any] | None) -> None:
    """No option changes the results; branches have options of their own."""
    attend = compile_attention(name, tune=TIME, **params)
    if inputs is None:
        from attnc.runtime.call.example_inputs import example_inputs

        examples = example_inputs(attend.bound, 300, 300, {}, heads=2, sizes={"dk": 16, "dv": 16})
        inputs = {n: example.tensor.float() for n, example in examples.items()}
    q, k, v = vectors()
    out = attend(q, k, v, **inputs)
    plain = compile_attention(name, **params)
    assert torch.allclose(out, plain(q, k, v, **inputs), atol=1e-5)
    (entry,) = store().entries()
    assert entry.payload is not None
    record = read_record(entry.payload)
    assert record is not None
    assert record.trials


def test_packed_sequences_have_separate_records(clock: Callable[[dict[str, float]], None]) -> None:
    """`cu_seqlens` gives another form of the pattern, which has a key of its own."""
    clock({"other": 0.5})
    attend = compile_attention("power", window=1, block=16, tune=TIME)
    q, k, v = vectors()
    cuts = torch.tensor([0, 100, 230, 300])
    attend.tune(q, k, v)
    record = attend.tune(q, k, v, cu_seqlens=cuts)
    assert isinstance(record, Record)
    assert dict(record.key.parts)["form"] == "packed"
    out = attend(q, k, v, cu_seqlens=cuts)
    assert torch.allclose(out, attend.reference(q, k, v, cu_seqlens=cuts), atol=1e-5)
    forms = {entry.payload["key"]["form"] for entry in store().entries() if entry.payload is not None}
    assert forms == {"whole", "packed"}


@pytest.mark.parametrize("name", ["moba", "retention", "document"])
def test_patterns_without_options_are_reported(name: str, caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention(name, tune=TIME)
    inputs: dict[str, Any] = {"doc": torch.arange(64)[None] // 20} if name == "document" else {}
    with caplog.at_level(logging.INFO, logger="attnc"):
        attend(*vectors(64), **inputs)
    assert f"`{name}`: there is nothing to tune" in caplog.text
    assert store().entries() == []


@pytest.mark.parametrize(
    "seconds, once, knobs, named", [(2, 3.1, 1, "120s"), (2, 0.01, 1, "4s"), (0.001, 0.01, 2, "720ms")]
)
def test_the_suggested_time_suffices_for_two_schedules(seconds: float, once: float, knobs: int, named: str) -> None:
    assert _enough(seconds, once, knobs) == named
    enough = read_wanted(named).seconds
    assert enough >= 2 * knobs * (LEAST + 1) * once


@pytest.mark.parametrize("tune", ["1ms", "30ms"])
def test_too_short_a_time_is_reported(tune: str, caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention("sliding_window", window=40, tune=tune)
    q, k, v = vectors(1500, 16)
    out = attend(q, k, v)
    short = re.search("too short to measure 7 rounds of two schedules, by forward; use ([0-9]+m?s)", caplog.text)
    assert short is not None
    assert store().entries() == []
    named, tried = (read_wanted(time).seconds for time in (short[1], tune))
    assert named >= 2 * tried
    assert torch.equal(out, compile_attention("sliding_window", window=40)(q, k, v))


def test_options_with_other_results_are_rejected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Callable[[dict[str, float]], None]
) -> None:
    """An option that computed a wrong result would be rejected by comparing results."""
    clock({"other": 0.1})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    real = CompiledAttention.run

    def wrong(self: CompiledAttention, *args: Any, **options: Any) -> Any:
        results = real(self, *args, **options)
        tried = any(option != MODEL for _, option in self.options.tune.choices)
        return results._replace(out=results.out * 1.01) if tried else results

    monkeypatch.setattr(CompiledAttention, "run", wrong)
    attend(*vectors())
    assert "gives other results than the model's choice" in caplog.text
    assert store().entries() == []


def test_a_failing_option_is_skipped(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None]
) -> None:
    clock({"other": 0.1})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    real = CompiledAttention.run

    def failing(self: CompiledAttention, *args: Any, **options: Any) -> Any:
        if any("128" in option for _, option in self.options.tune.choices):
            raise RuntimeError("out of resources")
        return real(self, *args, **options)

    monkeypatch.setattr(CompiledAttention, "run", failing)
    attend(*vectors())
    assert not any("128" in trial.option for trial in record_of(attend).trials)
