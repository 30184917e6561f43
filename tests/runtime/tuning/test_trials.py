"""Trials while a call is measured: their effect on other threads, and failures of a trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnc import ArgumentError, compile_attention
from attnc.runtime.choices.records import Record
from attnc.runtime.cli import main
from attnc.runtime.disk.store import store
from attnc.runtime.tuning import timer
from attnc.runtime.tuning import tuner as tuning
from attnc.runtime.tuning.timer import Clock
from tuned_calls import TIME, vectors


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """Saved-tensor hooks of the caller are not called during trials."""
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors(gradients=True)
    out = checkpoint(attend, q, k, v, use_reentrant=reentrant)
    out.sum().backward()
    assert q.grad is not None
    (wanted,) = torch.autograd.grad(attend.reference(q, k, v).sum(), (q,))
    assert torch.allclose(q.grad, wanted, atol=1e-4)
    packed: list[Tensor] = []
    untuned = compile_attention("sliding_window", window=41, tune=TIME)

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        untuned(q, k, v)
    assert len(packed) == 5


def test_unread_inputs_may_require_gradients() -> None:
    text = "pattern p()\n    input w: real[head]\n    align end\n    visible k <= q and q - k < 9\n"
    attend = compile_attention(text, tune=TIME)
    w = torch.ones(2, requires_grad=True)
    attend(*vectors(gradients=True), w=w)
    attend(*vectors(200), w=w)
    assert store().entries()


def test_a_failed_measurement_does_not_fail_the_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tuning, "_measured", failing)
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    assert torch.allclose(attend(q, k, v), attend.reference(q, k, v), atol=1e-5)
    assert "a trial failed: OutOfMemoryError: no memory" in caplog.text
    with pytest.raises(ArgumentError, match="disagree"):  # an error in the call itself still raises
        attend(q, k[:, :, :9], v)


def test_other_calls_do_not_use_options_under_trial() -> None:
    """Until an option is chosen, calls of other threads and plans use the model's choice."""
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    plain = compile_attention("sliding_window", window=40)
    q, k, v = vectors()
    want, plans = plain(q, k, v), []
    real = timer.Clock.milliseconds
    with pytest.MonkeyPatch.context() as patched:

        def milliseconds(self: Clock, run: Any) -> float:
            other = compile_attention("sliding_window", window=40, tune="0s")
            assert torch.equal(other(q, k, v), want)
            plans.append(other.plan(300, heads=2, head_dim=16).reasons[0])
            return real(self, run)

        patched.setattr(timer.Clock, "milliseconds", milliseconds)
        attend(q, k, v)
    assert len(plans) > 20
    assert set(plans) == {"not tuned for q512-k512-lanes2-square: the model's choice"}


def test_nonfinite_results_blame_no_option(caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    q[0, 0, 5] = float("nan")
    k[0, 1, 7] = float("inf")
    attend(q, k, v)
    assert "other results" not in caplog.text
    assert "results are not finite" in caplog.text
    assert store().entries() == []


def test_a_tuned_call_waits_for_no_lock() -> None:
    compile_attention("sliding_window", window=40, tune=TIME)(*vectors())
    with store().alone(1.0) as alone:
        assert alone
        begun = time.perf_counter()
        compile_attention("sliding_window", window=40, tune="1s")(*vectors())
    assert time.perf_counter() - begun < 5


def test_choices_of_branches_are_stored_by_index(clock: Callable[[dict[str, float]], None]) -> None:
    """A program whose branches have swapped names has the same key, and the choices stay with the branch index."""
    clock({"other": 0.5})
    text = (
        "pattern p()\n    align end\n    visible k <= q\n    branch near\n        visible q - k < 40\n"
        "    branch far\n        visible (q - k) % 16 == 0\n    combine near + 2 * far\n"
    )
    swapped = text.replace("near", "tmp").replace("far", "near").replace("tmp", "far")
    first, renamed = (compile_attention(spec, tune=TIME) for spec in (text, swapped))
    record = first.tune(*vectors())
    assert isinstance(record, Record)
    assert set(record.choices) <= {"0", "1"}
    second_record = renamed.tune(*vectors())
    assert isinstance(second_record, Record)
    assert second_record.key == record.key
    q, k, v = vectors()
    assert torch.allclose(renamed(q, k, v), renamed.reference(q, k, v), atol=1e-5)


def test_a_plan_states_its_tuned_choice(clock: Callable[[dict[str, float]], None]) -> None:
    clock({})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    attend(*vectors())
    (entry,) = store().entries()
    assert entry.payload is not None
    for option in ("foo bar", "tiles 999", "formula"):
        store().write(entry.kind, entry.name, {**entry.payload, "choices": {"": option}})
        again = compile_attention("sliding_window", window=40, tune="0s")
        assert again.tuned is not None
        again.tuned.look_again()
        reasons = again.plan(300, heads=2, head_dim=16).reasons
        assert reasons[0] == f"the tuned choice `{option}` is not available here: the model's choice"


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": float("inf")},
        {"median": 10**400},
        {"median": float("nan")},
        {"low": -1.0},
        {"predicted": "soon"},
        {"option": 3},
    ],
)
def test_invalid_trials(change: dict[str, Any]) -> None:
    compile_attention("sliding_window", window=40, tune=TIME)(*vectors())
    (entry,) = store().entries()
    assert entry.payload is not None
    trials = [{**entry.payload["trials"][0], **change}]
    store().write(entry.kind, entry.name, {**entry.payload, "trials": trials})
    assert main(["cache", "show"]) == 0
    again = compile_attention("sliding_window", window=40, tune="0s")
    assert again.tuned is not None
    again.tuned.look_again()
    again(*vectors())
