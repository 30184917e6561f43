"""Machine descriptions: the built-in ones, and the messages about a description that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnc.compiler.simulation.machine import (
    ALIASES,
    FIGURES,
    MAY_BE_ZERO,
    MachineError,
    find_machine,
    machine_names,
    read_machine,
)

H100 = json.loads(
    (Path(__file__).parents[3] / "compiler" / "simulation" / "machines" / "h100-sxm.json").read_text(encoding="utf-8")
)


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(json.dumps(H100))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize("name", [*machine_names(), *ALIASES])
def test_every_built_in_machine_names_the_sources_of_its_figures(name: str) -> None:
    machine = find_machine(name)
    assert machine.figures.keys() == FIGURES.keys()
    assert all(value > 0 or key in MAY_BE_ZERO for key, value in machine.figures.items())
    assert len(machine.sources) == len(FIGURES) + sum(map(len, machine.tables.values()))
    assert all(len(source) > 8 for source in machine.sources.values())
    text = str(machine)
    assert all(figure in text for figure in FIGURES)


def test_common_gpus_are_built_in() -> None:
    assert {"a100-80", "h100-sxm", "h200", "b200"} <= set(machine_names())
    h100, h200 = find_machine("H100"), find_machine("h200")
    # the published peak, computed from the figures: 989 TFLOP/s of bf16
    assert h100.sms * h100.hertz * h100.tensor_flop("bfloat16") == pytest.approx(989e12, rel=0.005)
    assert find_machine("a100").sms * find_machine("a100").hertz * 2048 == pytest.approx(312e12, rel=0.005)
    b200 = find_machine("b200")
    assert b200.sms * b200.hertz * b200.tensor_flop("bfloat16") == pytest.approx(2250e12, rel=0.005)
    assert h200["hbm_tb_per_s"] > h100["hbm_tb_per_s"] and h200.sms == h100.sms


def test_a_file_describes_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(changed(lambda d: d.update(name="mine", title="Mine")), encoding="utf-8")
    assert find_machine(str(path)).name == "mine"
    with pytest.raises(OSError, match="none"):
        find_machine(str(tmp_path / "none.json"))


def test_the_next_larger_head_dimension_is_used() -> None:
    machine = find_machine("h100")
    shares = [machine.kernel_share(d) for d in (16, 64, 65, 128, 512)]
    assert shares == [machine.tables["kernel_share"][key] for key in ("64", "64", "128", "128", "256")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "mine.json: not JSON"),
        ("[" * 100_000, "mine.json: not JSON"),
        ("[1]", "the file holds [1]; write an object with schema"),
        ("{}", "`schema` is missing; write 1"),
        (changed(lambda d: d.update(schema=2)), "`schema` is 2; write 1"),
        (changed(lambda d: d.update(kind="tpu")), "`kind` is 'tpu'; write \"gpu\""),
        (changed(lambda d: d.update(name="")), "`name` is ''; write a text"),
        (changed(lambda d: d.pop("figures")), "`figures` is missing"),
        (changed(lambda d: d["figures"].update(sm=1)), "unknown figure `sm`: did you mean `sms`?"),
        (changed(lambda d: d["figures"].pop("sms")), "`sms` is missing; write"),
        (changed(lambda d: d["figures"].update(sms=132)), "`sms` is 132; write"),
        (changed(lambda d: d["figures"]["sms"].update(value=0)), "`sms` is 0; write a number above 0"),
        (changed(lambda d: d["figures"]["sms"].update(value=-1)), "`sms` is -1; write a number above 0"),
        (changed(lambda d: d["figures"]["sms"].update(value=True)), "`sms` is True; write"),
        (changed(lambda d: d["figures"]["sms"].update(value="132")), "`sms` is '132'; write"),
        (changed(lambda d: d["figures"]["sms"].update(source=7)), "`sms.source` is 7; write a text"),
        (changed(lambda d: d["figures"]["sms"].update(value=float("inf"))), "`sms` is inf; write"),
        (changed(lambda d: d["figures"]["sms"].update(value=float("nan"))), "`sms` is nan; write"),
        (changed(lambda d: d["figures"].update(kernel_share={})), "`kernel_share` is {}; write"),
        (
            changed(lambda d: d["figures"]["kernel_share"].update(wide={"value": 1, "source": "x"})),
            "`kernel_share` is",
        ),
    ],
)
def test_errors_name_the_faulty_figure(text: str, said: str) -> None:
    with pytest.raises(MachineError, match=r"mine\.json") as caught:
        read_machine(text, "mine.json")
    assert said in str(caught.value)


def test_an_unknown_machine() -> None:
    with pytest.raises(MachineError, match=r"unknown machine `h1000`: did you mean `h100`\?; use a100-80, b200"):
        find_machine("h1000")


def test_a_dtype_without_a_rate() -> None:
    with pytest.raises(MachineError, match="h100-sxm has no tensor rate for float64"):
        find_machine("h100").tensor_flop("float64")
