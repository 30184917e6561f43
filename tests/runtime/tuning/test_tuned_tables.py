"""Tables of tuned choices: shipped, loaded, of another machine, damaged."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnc import ArgumentError, compile_attention, save_tuned
from attnc.compiler.planning.recipes import read_recipe
from attnc.runtime.cli import main
from attnc.runtime.disk.store import store
from attnc.runtime.tuning.records import read_record
from attnc.runtime.tuning.tuned_tables import load_table, table_bytes
from tuned_calls import TIME, record_of, vectors


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
    with pytest.raises(ArgumentError, match=r"table\.json, line [12], is not a line of a table"):
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
