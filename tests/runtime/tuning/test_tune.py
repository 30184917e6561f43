"""Tuning: measured once, kept, taken by every process; what it takes is right whatever it is, and said in the plan."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnc import ArgumentError, ArgumentTypeError, compile_attention, save_tuned
from attnc.compiler.planning.recipes import read_recipe
from attnc.runtime.attention import Attention
from attnc.runtime.cli import main
from attnc.runtime.disk.store import store
from attnc.runtime.tuning import timer
from attnc.runtime.tuning import tune as tuning
from attnc.runtime.tuning.records import KIND, MODEL, Record, read_record
from attnc.runtime.tuning.tables import load_table, table_bytes
from attnc.runtime.tuning.timer import Clock, compared, is_faster

TIME = "60s"
"""Far more than twenty-five rounds take, which are the most."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of patterns that were measured, each as often as it was."""
    found: list[str] = []
    real = tuning._measured

    def noted(call: Any, *args: Any) -> Any:
        found.append(call.name)
        return real(call, *args)

    monkeypatch.setattr(tuning, "_measured", noted)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, float]], None]]:
    """Times that are told, not measured, by a piece of the text of an option; the model's choice takes 1 ms, and so do
    others unless `other` says it.
    """
    times: dict[str, float] = {}

    def of_option(option: str) -> float:
        told = (ms for part, ms in times.items() if part in option)
        return next(told, 1.0 if option == MODEL else times.get("other", 1.0))

    def milliseconds(self: Clock, run: Any) -> float:
        run()
        (choices,) = run.args
        return max(sum(of_option(option) for _, option in choices), 1e-3)

    monkeypatch.setattr(timer.Clock, "milliseconds", milliseconds)

    def tell(told: dict[str, float]) -> None:
        times.clear()
        times.update(told)

    yield tell


def vectors(n: int = 300, heads: int = 2, *, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, n, 16, generator=draw).requires_grad_(gradients) for _ in range(3))
    return q, k, v


def record_of(attend: Attention, **options: Any) -> Record:
    (entry,) = store().entries()
    assert entry.kind == KIND
    assert entry.payload is not None
    found = read_record(entry.payload)
    assert found is not None
    return found


def test_the_first_call_measures_and_the_next_does_not(runs: list[str]) -> None:
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    out = attend(q, k, v)
    assert runs == ["sliding_window"]
    attend(q, k, v)
    attend(*vectors(290))  # of the same bucket
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
    """What the second process does, it does from the cache: no measurement, and the option that was kept."""
    text = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
from attnc import compile_attention
attend = compile_attention("sliding_window", window=40, tune="60s")
torch.manual_seed(1)
attend(*(torch.randn(1, 2, 300, 16) for _ in range(3)))
print(attend.plan(300, heads=2, head_dim=16).reasons[0])
"""
    said = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "tuned `sliding_window` in" in said[0]
    assert "tuned `sliding_window` in" not in said[1]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert len(list(folder.glob("tuned-*.json"))) == 1


def test_the_fastest_is_taken_and_is_right(clock: Callable[[dict[str, float]], None]) -> None:
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
        chosen = record.choices[""]
        assert part in chosen
        plan = attend.plan(300, heads=2, head_dim=16)
        assert chosen == MODEL or f"{chosen}, 0.500 ms; the model's choice takes 1.000 ms" in plan.reasons[0]
        store().clear()


def test_what_is_hardly_faster_is_not_taken(clock: Callable[[dict[str, float]], None]) -> None:
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
    """Whatever is tried, results stay; branches have knobs of their own."""
    attend = compile_attention(name, tune=TIME, **params)
    if inputs is None:
        from attnc.runtime.example_inputs import example_inputs

        made = example_inputs(attend.bound, 300, 300, {}, heads=2, sizes={"dk": 16, "dv": 16})
        inputs = {n: one.tensor.float() for n, one in made.items()}
    q, k, v = vectors()
    out = attend(q, k, v, **inputs)
    plain = compile_attention(name, **params)
    assert torch.allclose(out, plain(q, k, v, **inputs), atol=1e-5)
    (entry,) = store().entries()
    assert entry.payload is not None
    found = read_record(entry.payload)
    assert found is not None
    assert found.trials


def test_sequences_in_one_have_records_of_their_own(clock: Callable[[dict[str, float]], None]) -> None:
    """`cu_seqlens` makes another form of the pattern, which has a key of its own."""
    clock({"other": 0.5})
    attend = compile_attention("power", window=1, block=16, tune=TIME)
    q, k, v = vectors()
    cuts = torch.tensor([0, 100, 230, 300])
    attend.tune(q, k, v)
    found = attend.tune(q, k, v, cu_seqlens=cuts)
    assert isinstance(found, Record)
    assert dict(found.key.parts)["form"] == "packed"
    out = attend(q, k, v, cu_seqlens=cuts)
    assert torch.allclose(out, attend.reference(q, k, v, cu_seqlens=cuts), atol=1e-5)
    forms = {entry.payload["key"]["form"] for entry in store().entries() if entry.payload is not None}
    assert forms == {"whole", "packed"}


@pytest.mark.parametrize("name", ["moba", "retention", "document"])
def test_nothing_to_choose_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention(name, tune=TIME)
    inputs: dict[str, Any] = {"doc": torch.arange(64)[None] // 20} if name == "document" else {}
    with caplog.at_level(logging.INFO, logger="attnc"):
        attend(*vectors(64), **inputs)
    assert f"`{name}`: there is nothing to tune" in caplog.text
    assert store().entries() == []


@pytest.mark.parametrize("tune", ["1ms", "30ms"])
def test_too_short_a_time_is_said(tune: str, caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention("sliding_window", window=40, tune=tune)
    q, k, v = vectors(1500, 16)
    out = attend(q, k, v)
    assert "too short to measure 7 rounds of two schedules" in caplog.text
    assert store().entries() == []
    assert torch.equal(out, compile_attention("sliding_window", window=40)(q, k, v))


def test_results_that_differ_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Callable[[dict[str, float]], None]
) -> None:
    """A schedule that is wrong, were there one, is found by its results."""
    clock({"other": 0.1})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    real = Attention._called

    def wrong(self: Attention, *args: Any, **options: Any) -> Any:
        out = real(self, *args, **options)
        tried = any(option != MODEL for _, option in self._options.tune.choices)
        return out * 1.01 if tried and isinstance(out, Tensor) else out

    monkeypatch.setattr(Attention, "_called", wrong)
    attend(*vectors())
    assert "gives other results than the model's choice" in caplog.text
    assert store().entries() == []


def test_an_option_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None]
) -> None:
    clock({"other": 0.1})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    real = Attention._called

    def failing(self: Attention, *args: Any, **options: Any) -> Any:
        if any("128" in option for _, option in self._options.tune.choices):
            raise RuntimeError("out of resources")
        return real(self, *args, **options)

    monkeypatch.setattr(Attention, "_called", failing)
    attend(*vectors())
    assert not any("128" in trial.option for trial in record_of(attend).trials)


# --- what others of the process see ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """Hooks on what autograd keeps are not called by what is tried."""
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors(gradients=True)
    out = checkpoint(attend, q, k, v, use_reentrant=reentrant)
    out.sum().backward()
    assert q.grad is not None
    (wanted,) = torch.autograd.grad(attend.reference(q, k, v).sum(), (q,))
    assert torch.allclose(q.grad, wanted, atol=1e-4)
    packed: list[Tensor] = []
    other = compile_attention("sliding_window", window=41, tune=TIME)

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        other(q, k, v)
    assert len(packed) == 5


def test_inputs_that_nothing_reads_may_want_gradients() -> None:
    text = "pattern p()\n    input w: real[head]\n    align end\n    visible k <= q and q - k < 9\n"
    attend = compile_attention(text, tune=TIME)
    w = torch.ones(2, requires_grad=True)
    attend(*vectors(gradients=True), w=w)
    attend(*vectors(200), w=w)
    assert store().entries()


def test_whatever_fails_while_measuring_the_call_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tuning, "_measured", failing)
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    assert torch.allclose(attend(q, k, v), attend.reference(q, k, v), atol=1e-5)
    assert "what was tried failed: OutOfMemoryError: no memory" in caplog.text
    with pytest.raises(ArgumentError, match="disagree"):  # but what is wrong with a call is said
        attend(q, k[:, :, :9], v)


def test_no_other_call_runs_by_what_is_tried() -> None:
    """Calls of other threads, and plans, are those of the model until something is chosen."""
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


def test_what_is_no_number_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    q[0, 0, 5] = float("nan")
    k[0, 1, 7] = float("inf")
    attend(q, k, v)
    assert "other results" not in caplog.text
    assert "results hold what is no number" in caplog.text
    assert store().entries() == []


def test_what_is_known_waits_for_nobody() -> None:
    compile_attention("sliding_window", window=40, tune=TIME)(*vectors())
    with store().alone(1.0) as alone:
        assert alone
        begun = time.perf_counter()
        compile_attention("sliding_window", window=40, tune="1s")(*vectors())
    assert time.perf_counter() - begun < 5


def test_branches_go_by_number(clock: Callable[[dict[str, float]], None]) -> None:
    """The same program with the names of its branches swapped has the same key, and the choices stay where they are."""
    clock({"other": 0.5})
    text = (
        "pattern p()\n    align end\n    visible k <= q\n    branch near\n        visible q - k < 40\n"
        "    branch far\n        visible (q - k) % 16 == 0\n    combine near + 2 * far\n"
    )
    swapped = text.replace("near", "tmp").replace("far", "near").replace("tmp", "far")
    one, other = (compile_attention(own, tune=TIME) for own in (text, swapped))
    found = one.tune(*vectors())
    assert isinstance(found, Record)
    assert set(found.choices) <= {"0", "1"}
    again = other.tune(*vectors())
    assert isinstance(again, Record)
    assert again.key == found.key
    q, k, v = vectors()
    assert torch.allclose(other(q, k, v), other.reference(q, k, v), atol=1e-5)


def test_a_plan_says_what_it_takes(clock: Callable[[dict[str, float]], None]) -> None:
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
        assert reasons[0] == f"the tuned choice `{option}` is none here: the model's choice"


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
def test_trials_that_are_none(change: dict[str, Any]) -> None:
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


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_is_shipped(tmp_path: Path, clock: Callable[[dict[str, float]], None], runs: list[str]) -> None:
    """Every process that has the table takes its choices, whatever its own cache says, and measures nothing."""
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    out = attend(q, k, v)
    record = record_of(attend)
    assert read_recipe(record.choices[""]) is not None
    path = tmp_path / "table.json"
    path.write_bytes(table_bytes([record]))
    assert path.read_bytes() == table_bytes(load_table(path).records.values())
    store().clear()
    runs.clear()
    other = compile_attention("sliding_window", window=40, tune=path)
    assert torch.equal(other(q, k, v), out)
    assert record.choices[""] in other.plan(300, heads=2, head_dim=16).reasons[0]
    assert torch.equal(pickle.loads(pickle.dumps(other))(q, k, v), out)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), out)
    assert (runs, store().entries()) == ([], [])
    compile_attention("sliding_window", window=41, tune=str(path))(q, k, v)  # not in the table: the model's
    assert (runs, store().entries()) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "[]\n" + text,
        lambda text: text.replace("tiles", "tales", 1),
        lambda text: text[: len(text) // 2],
        lambda text: "import os\n",
        lambda text: '["a", "b"]\n',
        lambda text: "[" * 100_000,
    ],
)
def test_a_table_that_is_none(
    change: Callable[[str], str], tmp_path: Path, clock: Callable[[dict[str, float]], None]
) -> None:
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    attend(*vectors())
    path = tmp_path / "table.json"
    path.write_text(change(table_bytes([record_of(attend)]).decode()))
    with pytest.raises(ArgumentError, match=r"table\.json, line [12], is no line of a table"):
        compile_attention("causal", tune=path)


def test_a_table_of_another_machine_is_told_of_once(
    tmp_path: Path, clock: Callable[[dict[str, float]], None], caplog: pytest.LogCaptureFixture
) -> None:
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    attend(*vectors())
    save_tuned(tmp_path / "table.json", record_of(attend))
    other = compile_attention("sliding_window", window=41, tune=tmp_path / "table.json")
    for n in (200, 300, 700):
        other(*vectors(n))
    told = [r.getMessage() for r in caplog.records if "table of tuned choices" in r.getMessage()]
    assert len(told) == 1
    assert "parameters: sinks=0, window=41, there sinks=0, window=40" in told[0]


@pytest.mark.parametrize("bucket", ["x/../../../../evil", "A B", "ü", "", "q1-k1-lanes1-square-more"])
def test_a_table_leads_nowhere_else(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table made by hand, whose digests fit."""
    compile_attention("sliding_window", window=40, tune=TIME)(*vectors())
    (entry,) = store().entries()
    assert entry.payload is not None
    found = read_record(entry.payload)
    assert found is not None
    (tmp_path / "table.json").write_bytes(table_bytes([replace(found, bucket=bucket)]))
    before = sorted(tmp_path.rglob("*"))
    assert main(["cache", "load", str(tmp_path / "table.json")]) == 2
    assert "holds no tuned choices" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "option", ["tiles 1", "tiles 4096", "grid", "residues", "whole, triangles in halves", "rm -rf /", ""]
)
def test_a_choice_that_is_none_leaves_it_to_the_model(option: str, clock: Callable[[dict[str, float]], None]) -> None:
    """An entry that somebody has written by hand, with a digest that fits."""
    clock({})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    attend(q, k, v)
    (entry,) = store().entries()
    assert entry.payload is not None
    store().write(entry.kind, entry.name, {**entry.payload, "choices": {"": option, "other": "x"}})
    again = compile_attention("sliding_window", window=40, tune="0s")
    assert again.tuned is not None
    again.tuned.look_again()
    assert torch.allclose(again(q, k, v), again.reference(q, k, v), atol=1e-5)


# --- options and graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tune", ["fast", "2 hours", "-1s", "", "1e3s", -1.0, float("nan"), float("inf"), "9" * 400 + "s"]
)
def test_wishes_that_are_none(tune: Any) -> None:
    with pytest.raises(ArgumentError, match="tune is"):
        compile_attention("causal", tune=tune)


@pytest.mark.parametrize("tune", [None, True, ["2s"]])
def test_wishes_of_no_such_type(tune: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="tune is"):
        compile_attention("causal", tune=tune)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nothing\.json cannot be read: No such file"):
        compile_attention("causal", tune=tmp_path / "nothing.json")
    with pytest.raises(ArgumentError, match="no schedule to tune"):
        compile_attention("causal", backend="reference", tune="2s")
    with pytest.raises(ArgumentError, match="with a time to measure in"):
        compile_attention("causal").tune(*vectors())


def test_compiled_graphs_measure_nothing_but_take_what_is_known(
    clock: Callable[[dict[str, float]], None], runs: list[str]
) -> None:
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    first = compiled(q, k, v)
    assert (runs, store().entries()) == ([], [])
    out = attend(q, k, v)
    assert record_of(attend).choices[""] != MODEL
    assert torch.equal(compiled(q, k, v), out)
    assert torch.allclose(first, out, atol=1e-5)


def test_autocast_and_a_disk_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What cannot be kept on disk is kept in the process."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "file"))
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*vectors())
    assert out.dtype == torch.bfloat16
    plan = attend.plan(300, heads=2, head_dim=16, dtype=torch.bfloat16)
    assert "tuned for q512-k512-lanes2-square" in plan.reasons[0]


STEPS = ("mkdir", "stat", "open", "scandir", "replace", "unlink", "chmod", "fdopen")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=["full", "read-only", "forbidden"])
@pytest.mark.parametrize("step", STEPS)
def test_whatever_the_disk_refuses_the_call_works(
    step: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Every call of a function of the system on the cache's folder fails, from the first one on."""
    real = getattr(os, step)

    def refuse(*args: Any, **options: Any) -> Any:
        if step == "fdopen" or (args and str(tmp_path) in os.fspath(args[0])):
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    with monkeypatch.context() as patched:
        patched.setattr(os, step, refuse)
        out = attend(q, k, v)
        again = attend(q, k, v)
        reasons = attend.plan(300, heads=2, head_dim=16).reasons
    assert torch.equal(out, again)
    assert torch.allclose(out, attend.reference(q, k, v), atol=1e-5)
    assert "tuned for q512-k512-lanes2-square" in reasons[0], "what was measured counts in this process"
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("attnc.runtime.disk")]
    assert len(warned) <= 1


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_tiles_of_kernels_are_tried(monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None]) -> None:
    """In the interpreter: what a GPU would do, but for the time."""
    pytest.importorskip("triton")
    monkeypatch.setattr("attnc.runtime.tuning.knobs.FIRST", 2)
    monkeypatch.setattr(timer, "MOST", 7)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=20, backend="triton", tune="60s")
    q, k, v = vectors(40, 1, gradients=True)
    out = attend(q, k, v)
    record = record_of(attend)
    assert dict(record.key.parts)["executor"] == "triton"
    assert {trial.knob for trial in record.trials} == {"forward", "dq", "dkdv"}
    assert all(choice != MODEL for choice in record.choices.values())
    assert any(trial.predicted is not None for trial in record.trials)
    assert torch.allclose(out, attend.reference(q, k, v), atol=1e-4)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    wanted = torch.autograd.grad(attend.reference(q, k, v).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(grads, wanted, strict=True))
    plan = str(attend.plan(40, head_dim=16, device="cuda"))
    for stage, choice in record.choices.items():
        assert choice == MODEL or f"sliding_window_{stage}: tiles of {choice}" in plan


# --- the command -----------------------------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tuned, explained, shown, shipped, cleared."""
    call = ["sliding_window", "-p", "window=40", "--len", "300", "--heads", "2", "--head-dim", "16", "--forward"]
    assert main(["cache", "why", *call]) == 1
    said = capsys.readouterr().out
    assert "not in the cache" in said
    table = tmp_path / "table.json"
    assert main(["tune", *call, "--time", TIME, "-o", str(table)]) == 0
    said = capsys.readouterr().out
    assert "q512-k512-lanes2-square, forward" in said
    assert "predicted" in said
    assert f"{table}: 1 bucket" in said
    assert main(["cache", "why", *call]) == 0
    assert "in the cache: q512" in capsys.readouterr().out
    other = ["sliding_window", "-p", "window=41", *call[3:]]
    assert main(["cache", "why", *other, "--json"]) == 1
    (answer,) = json.loads(capsys.readouterr().out)["calls"]
    assert not answer["found"]
    assert [line.partition(":")[0] for line in answer["differs_in"]] == ["parameters", "program"]
    assert main(["cache", "why", *other]) == 1
    assert "there sinks=0, window=40" in capsys.readouterr().out
    assert main(["cache", "show"]) == 0
    said = capsys.readouterr().out
    assert "sliding_window(sinks=0, window=40), float32 16/16" in said
    assert "1 entry" in said
    assert main(["cache", "path", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(store().folder)
    assert facts["entries"] == 1
    assert facts["triton_folder"]
    assert main(["tune", *call[:-1], "--time", TIME, "-o", str(table), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tuned"]
    assert found["stage"] == "training"
    assert found["trials"][0]["predicted"] > 0
    assert main(["cache", "clear"]) == 0
    assert "1 entry removed" in capsys.readouterr().out
    assert main(["cache", "load", str(table)]) == 0
    assert "1 of 1 entry put into" in capsys.readouterr().out
    assert main(["cache", "why", *call]) == 0
    capsys.readouterr()
    assert main(["cache", "path"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("attnc ")
    assert "triton " in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "causal", "--time", "soon"], "tune is 'soon'"),
        (["tune", "causal", "--time", "0s"], "write a time above 0"),
        (["tune", "causal", "--len", "0"], "--len 0: it must be at least 1"),
        (["tune", "causal", "--device", "cuda"], "torch sees no GPU here"),
        (["tune", "causal", "--heads", "3", "--kv-heads", "2"], "no multiple"),
        (["tune", "causal", "--head-dim", "0"], "--head-dim 0"),
        (["tune", "causal", "-o", "plain.tbl"], "name it plain.json"),
        (["cache", "why", "moba"], "there is nothing to tune"),
        (["cache", "why", "retention"], "there is nothing to tune"),
        (["cache"], "the following arguments are required"),
        (["cache", "remove"], "invalid choice"),
        (["cache", "load", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_damaged_entries_are_shown(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    store().write(KIND, "a", {"x": 1})
    store().write("rates", "b", {"x": 1, "machine": "this", "source": "measured"})
    (folder / "tuned-c.json").write_bytes(b"import os")
    assert main(["cache", "show"]) == 0
    said = capsys.readouterr().out
    assert "of another version, ignored" in said
    assert "damaged, ignored: it is no entry of attnc" in said
    assert "measured" in said


# --- the timer -------------------------------------------------------------------------------------------------------


def test_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in every round until one is hopeless; nothing past the moment; what is not warm is not measured."""
    order: list[str] = []
    times = {"a": 3.0, "b": 1.0, "c": 9.0}
    names: dict[Any, str] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in times:
        runs[name] = lambda name=name: order.append(name)  # type: ignore[misc]
        names[runs[name]] = name

    def milliseconds(self: Clock, run: Any) -> float:
        run()
        return times[names[run]]

    monkeypatch.setattr(timer.Clock, "milliseconds", milliseconds)
    warmed: list[str] = []

    def warm(name: str, run: Callable[[], object]) -> bool:
        warmed.append(name)
        return name != "skipped"

    runs["skipped"] = lambda: order.append("skipped")
    found = compared(runs, Clock(torch.device("cpu")), float("inf"), warm)
    assert warmed == ["a", "b", "c", "skipped"]
    assert "skipped" not in order
    assert {name: set(own) for name, own in found.items()} == {"a": {3.0}, "b": {1.0}, "c": {9.0}}
    assert {name: len(own) for name, own in found.items()} == {"a": timer.MOST, "b": timer.MOST, "c": 3}
    assert order[:9] == ["a", "b", "c", *"bca", *"cab"]
    assert list(compared(runs, Clock(torch.device("cpu")), 0.0, warm)) == ["a"]
    times |= {"a": 3000.0, "b": 1000.0}
    soon = time.perf_counter() + 45.5  # seven rounds of a, and of what is as slow, take 42 s; with b besides 49 s
    assert list(compared(runs, Clock(torch.device("cpu")), soon, warm)) == ["a", "b"]


def test_alike_is_not_faster() -> None:
    """Of runs that take the same time, one in a hundred may be taken for faster, however noisy the machine is."""
    draw = random.Random(0)
    wrong = 0
    for _ in range(2000):
        drift = [draw.choice((1.0, 1.0, 3.0)) for _ in range(25)]
        one, other = ([x * draw.lognormvariate(0, 0.3) for x in drift] for _ in range(2))
        wrong += is_faster(one, other)
    assert wrong <= 30
    assert is_faster([0.9] * 7, [1.0] * 7)
    assert not is_faster([0.9] * 6, [1.0] * 6)
    assert not is_faster([0.9] * 6 + [1.1], [1.0] * 7)
    assert is_faster([0.9] * 22 + [1.1] * 3, [1.0] * 25)


def test_the_clock_flushes_and_measures() -> None:
    clock = Clock(torch.device("cpu"))
    clock._flushed.fill_(1)
    assert clock.milliseconds(lambda: None) < 50
    assert int(clock._flushed.max()) == 0


def test_no_environment_is_needed() -> None:
    """A process without a home folder tunes, and says once that nothing is kept."""
    text = "from attnc import compile_attention; import torch\n"
    text += "a = compile_attention('sliding_window', window=40, tune='60s')\n"
    text += "[a(*(torch.randn(1, 2, n, 16) for _ in range(3))) for n in (100, 300, 900)]"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/nonexistent/home", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    if os.getuid() == 0:
        assert "Traceback" not in done.stderr
    else:
        assert done.stderr.count("nothing is lost but time") == 1
