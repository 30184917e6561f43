"""`attnc tune` and `attnc cache`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnc.runtime.choices.records import KIND
from attnc.runtime.cli import main
from attnc.runtime.disk.store import store
from tuned_calls import TIME


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tune, explain, show, ship and clear a choice."""
    call = ["sliding_window", "-p", "window=40", "--len", "300", "--heads", "2", "--head-dim", "16", "--forward"]
    assert main(["cache", "why", *call]) == 1
    output = capsys.readouterr().out
    assert "not in the cache" in output
    table = tmp_path / "table.json"
    assert main(["tune", *call, "--time", TIME, "-o", str(table)]) == 0
    output = capsys.readouterr().out
    assert "q512-k512-lanes2-square, forward" in output
    assert "predicted" in output
    assert f"{table}: 1 bucket" in output
    assert main(["cache", "why", *call]) == 0
    assert "in the cache: q512" in capsys.readouterr().out
    other_call = ["sliding_window", "-p", "window=41", *call[3:]]
    assert main(["cache", "why", *other_call, "--json"]) == 1
    (answer,) = json.loads(capsys.readouterr().out)["calls"]
    assert not answer["found"]
    assert [line.partition(":")[0] for line in answer["differs_in"]] == ["parameters", "program"]
    assert main(["cache", "why", *other_call]) == 1
    assert "there sinks=0, window=40" in capsys.readouterr().out
    assert main(["cache", "show"]) == 0
    output = capsys.readouterr().out
    assert "sliding_window(sinks=0, window=40), float32 16/16" in output
    assert "1 entry" in output
    assert main(["cache", "path", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(store().folder)
    assert facts["entries"] == 1
    assert facts["triton_folder"]
    assert main(["tune", *call[:-1], "--time", TIME, "-o", str(table), "--json"]) == 0
    (tuned,) = json.loads(capsys.readouterr().out)["tuned"]
    assert tuned["stage"] == "training"
    assert tuned["trials"][0]["predicted"] > 0
    assert main(["cache", "clear"]) == 0
    assert "1 entry removed" in capsys.readouterr().out
    assert main(["cache", "load", str(table)]) == 0
    assert "1 of 1 entry stored in" in capsys.readouterr().out
    assert main(["cache", "why", *call]) == 0
    capsys.readouterr()
    assert main(["cache", "path"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("attnc ")
    assert "triton " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "causal", "--time", "soon"], "tune is 'soon'"),
        (["tune", "causal", "--time", "0s"], "write a time above 0"),
        (["tune", "causal", "--len", "0"], "--len 0: must be at least 1"),
        (["tune", "causal", "--device", "cuda"], "torch finds no GPU"),
        (["tune", "causal", "--heads", "3", "--kv-heads", "2"], "must be a multiple"),
        (["tune", "causal", "--head-dim", "0"], "--head-dim 0"),
        (["tune", "causal", "-o", "plain.tbl"], "use plain.json"),
        (["cache", "why", "moba"], "there is nothing to tune"),
        (["cache", "why", "retention"], "there is nothing to tune"),
        (["cache"], "the following arguments are required"),
        (["cache", "remove"], "invalid choice"),
        (["cache", "load", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_damaged_entries_are_shown(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    store().write(KIND, "a", {"x": 1})
    store().write("rates", "b", {"x": 1, "machine": "this", "source": "measured"})
    (folder / "tuned-c.json").write_bytes(b"import os")
    assert main(["cache", "show"]) == 0
    output = capsys.readouterr().out
    assert "written by another version of attnc, ignored" in output
    assert "damaged, ignored: it is not an entry of attnc" in output
    assert "measured" in output
