"""Tables of tuned choices: written, loaded, made on another machine, damaged."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnc import ArgumentError, compile_attention, save_tuned
from attnc.compiler.planning.recipes import read_recipe
from attnc.runtime.choices.records import read_record
from attnc.runtime.choices.tuned_tables import load_table, table_bytes
from attnc.runtime.cli import main
from attnc.runtime.disk.store import store
from tuned_calls import TIME, record_of, vectors


def test_another_process_takes_a_shipped_table(
    tmp_path: Path, clock: Callable[[dict[str, float]], None], runs: list[str]
) -> None:
    """A process with the table takes its choices, whatever its own cache holds, and measures nothing."""
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
    attend_with_table = compile_attention("sliding_window", window=40, tune=path)
    assert torch.equal(attend_with_table(q, k, v), out)
    assert record.choices[""] in attend_with_table.plan(300, heads=2, head_dim=16).reasons[0]
    assert torch.equal(pickle.loads(pickle.dumps(attend_with_table))(q, k, v), out)
    compiled = torch.compile(attend_with_table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), out)
    assert (runs, store().entries()) == ([], [])
    compile_attention("sliding_window", window=41, tune=str(path))(q, k, v)  # not in the table: the model's choice
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
def test_damaged_tables_are_refused(
    change: Callable[[str], str], tmp_path: Path, clock: Callable[[dict[str, float]], None]
) -> None:
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    attend(*vectors())
    path = tmp_path / "table.json"
    path.write_text(change(table_bytes([record_of(attend)]).decode()))
    with pytest.raises(ArgumentError, match=r"table\.json, line [12], is not a line of a table"):
        compile_attention("causal", tune=path)


def test_a_table_without_the_key_is_reported_once(
    tmp_path: Path, clock: Callable[[dict[str, float]], None], caplog: pytest.LogCaptureFixture
) -> None:
    clock({"other": 0.5})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    attend(*vectors())
    save_tuned(tmp_path / "table.json", record_of(attend))
    attend_with_table = compile_attention("sliding_window", window=41, tune=tmp_path / "table.json")
    for n in (200, 300, 700):
        attend_with_table(*vectors(n))
    messages = [r.getMessage() for r in caplog.records if "table of tuned choices" in r.getMessage()]
    assert len(messages) == 1
    assert "parameters: sinks=0, window=41, there sinks=0, window=40" in messages[0]


@pytest.mark.parametrize("bucket", ["x/../../../../evil", "A B", "ü", "", "q1-k1-lanes1-square-more"])
def test_invalid_bucket_names_write_no_file(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is written by hand and its digests are valid."""
    compile_attention("sliding_window", window=40, tune=TIME)(*vectors())
    (entry,) = store().entries()
    assert entry.payload is not None
    record = read_record(entry.payload)
    assert record is not None
    (tmp_path / "table.json").write_bytes(table_bytes([replace(record, bucket=bucket)]))
    before = sorted(tmp_path.rglob("*"))
    assert main(["cache", "load", str(tmp_path / "table.json")]) == 2
    assert "holds no tuned choices" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "option", ["tiles 1", "tiles 4096", "grid", "residues", "whole, triangles in halves", "rm -rf /", ""]
)
def test_an_invalid_stored_option_falls_back_to_the_model(
    option: str, clock: Callable[[dict[str, float]], None]
) -> None:
    """The entry is written by hand and its digest is valid."""
    clock({})
    attend = compile_attention("sliding_window", window=40, tune=TIME)
    q, k, v = vectors()
    attend(q, k, v)
    (entry,) = store().entries()
    assert entry.payload is not None
    store().write(entry.kind, entry.name, {**entry.payload, "choices": {"": option, "other": "x"}})
    second_attend = compile_attention("sliding_window", window=40, tune="0s")
    assert second_attend.tuned is not None
    second_attend.tuned.look_again()
    assert torch.allclose(second_attend(q, k, v), second_attend.reference(q, k, v), atol=1e-5)
