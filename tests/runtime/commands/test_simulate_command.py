"""`attnc simulate`: printed text, JSON, sweeps, comparisons, break-even, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnc import compile_attention
from attnc.compiler.simulation.machine import find_machine, machine_names
from attnc.compiler.simulation.simulation import Rung
from attnc.runtime.cli import main
from attnc.runtime.simulate.simulating import break_even
from command_calls import run_json

PROMISED = {
    *("pattern", "params", "device", "dtype", "shape", "baseline", "element_density", "tiles", "schedule", "rungs"),
    *("predicted_ms", "dense_ms", "calibrated", "break_even_length", "growth"),
}


def test_documented_json_keys(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(
        capsys, "simulate", "sliding_window", "-p", "window=512", "--len", "16384", "--heads", "4"
    )
    assert status == 0
    assert values.keys() >= PROMISED
    assert values["pattern"] == "sliding_window" and values["params"] == {"window": 512, "sinks": 0}
    assert values["device"] == "h100-sxm" and values["dtype"] == "bfloat16" and values["calibrated"] is False
    visible = 16384 * 512 - 512 * 511 // 2
    assert values["visible"] == 4 * visible
    assert values["element_density"] == pytest.approx(visible / 16384**2)
    assert values["tiles"].keys() == {"total", "live", "full", "partial"}
    assert values["schedule"].keys() >= {"q_tile", "k_tile", "order"}
    assert [rung["name"] for rung in values["rungs"]] == ["element", "tile", "balanced", "predicted"]
    assert all(rung["lost_to"] for rung in values["rungs"])
    assert values["growth"].startswith("O(n·w) with w = 512")
    assert 512 < values["break_even_length"] < 2048
    simulation = compile_attention("sliding_window", window=512).simulate(16384, heads=4)
    assert values["predicted_ms"] == simulation.predicted_ms and values["dense_ms"] == simulation.dense_ms


def test_printed_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "causal", "--len", "4096"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    expected_lines = [
        "causal: forward on NVIDIA H100",
        "times not calibrated",
        "element",
        "1.00×",
        "schedule  forward: tiles",
    ]
    for line in (
        *expected_lines,
        "next best",
        "growth    O(n²); visible pairs n·(n + 1)/2",
        "visible pairs as its rival",
    ):
        assert line in out


def test_patterns_machines_and_baselines_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "causal", "--len", "2048", "--device", "h100,a100", "--compare", "sliding_window"]
    status, values = run_json(capsys, *arguments, "-q", "window=256", "--baseline", "both")
    assert status == 0
    labels = [(full["pattern"], full["device"], full["baseline"]) for full in (values, *values["compared"])]
    assert labels == [
        ("causal", "h100-sxm", "full"),
        ("causal", "h100-sxm", "causal"),
        ("causal", "a100-80", "full"),
        ("sliding_window", "h100-sxm", "full"),
        ("sliding_window", "a100-80", "full"),
    ]
    assert values["compared"][2]["params"]["window"] == 256
    assert main(["simulate", "causal", "--len", "2048", "--device", "h100,a100"]) == 0
    assert "causal on a100-80" in capsys.readouterr().out


def test_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "simulate", "sliding_window", "-p", "window=256", "--sweep", "len=1k..8k")
    assert status == 0
    assert [full["shape"]["queries"] for full in values["sweep"]] == [1024, 2048, 4096, 8192]
    elements = [full["rungs"][0]["speedup"] for full in values["sweep"]]
    assert elements == sorted(elements)
    _, values = run_json(capsys, "simulate", "sliding_window", "--len", "4096", "--sweep", "window=64..256")
    assert [full["params"]["window"] for full in values["sweep"]] == [64, 128, 256]
    assert main(["simulate", "causal", "--sweep", "len=1k..2k"]) == 0
    assert "len=2,048" in capsys.readouterr().out


def test_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    _, values = run_json(
        capsys, "simulate", "neighborhood_2d", "--grid", "64,48", "-p", "window=[8,8]", "--order", "bricks"
    )
    assert (values["params"]["height"], values["params"]["width"]) == (64, 48)
    assert values["shape"]["queries"] == 64 * 48
    assert values["break_even_length"] is None and "grid" in values["break_even_note"]
    assert len(values["schedule"]["q_brick"]) == 2
    assert values["growth_law"]["fitted"] and values["growth"].startswith("about 64·n^1.0")
    assert main(["show", "neighborhood_2d", "--grid", "8,8"]) == 0
    assert "64" in capsys.readouterr().out


def test_decoding_reads_visible_keys(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--len", "65536", "--pass", "decode", "--heads", "8", "--kv-heads", "2"]
    _, dense = run_json(capsys, "simulate", "causal", *arguments)
    _, window = run_json(capsys, "simulate", "sliding_window", "-p", "window=1024", *arguments)
    assert window["shape"]["queries"] == 1 and window["shape"]["keys"] == 65536
    assert dense["rungs"][1]["speedup"] == 1 and window["rungs"][1]["speedup"] == 64
    assert window["bytes"]["moved"] < dense["bytes"]["moved"] / 50


def test_examples_of_inputs_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "document", "--len", "999"]) == 0
    assert "input     doc: 3 documents of 333, 333 and 333 tokens" in capsys.readouterr().out


def test_the_local_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    _, values = run_json(capsys, "simulate", "causal", "--device", "cpu", "--len", "2048", "--baseline", "full")
    assert values["device"] == "cpu" and values["dtype"] == "float32"
    assert 1 <= values["rungs"][3]["speedup"] <= values["rungs"][0]["speedup"] < 2


def test_a_machine_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[3] / "compiler" / "simulation" / "machines" / "h100-sxm.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(name="double", title="Twice an H100")
    for figure in ("sms", "l2_bytes_per_clock"):
        data["figures"][figure]["value"] *= 2
    mine = tmp_path / "double.json"
    mine.write_text(json.dumps(data), encoding="utf-8")
    _, full = run_json(capsys, "simulate", "full", "--len", "65536")
    _, two = run_json(capsys, "simulate", "full", "--len", "65536", "--device", str(mine))
    assert two["device"] == "double"
    assert two["predicted_ms"] == pytest.approx(full["predicted_ms"] / 2, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causal", "--len", "0"], "--len 0: give a whole number, at least 1"),
        (["causal", "--len", "-5"], "--len -5: give a whole number, at least 1"),
        (["causal", "--len", "8q"], "argument --len: '8q' is not a whole number: write it as in 8192, 8k or 1m"),
        (["causal", "--heads", "0"], "--heads 0: give"),
        (["causal", "--batch", "0"], "--batch 0: give"),
        (["causal", "--head-dim", "-1"], "--head-dim -1: give"),
        (["causal", "--heads", "6", "--kv-heads", "4"], "--heads 6 must be a multiple of --kv-heads 4"),
        (["causal", "--device", "h1000"], "unknown machine `h1000`: did you mean `h100`?"),
        (["causal", "--device", "none.json"], "none.json: No such file"),
        (["causal", "--tile", "100x64"], "a q tile of 100 is not supported: use a power of two"),
        (
            ["causal", "--tile", "1024x1024"],
            "tiles of 1024×1024 with head dimensions 128 and 128 in bfloat16 do not fit h100-sxm",
        ),
        (["causal", "--tile", "big"], "--tile big: write queries by keys, as in --tile 128x64"),
        (["causal", "--order", "bricks"], "the relation reads no grid of tokens"),
        (["causal", "--order", "random"], "--order random: use one of natural, bricks, residues"),
        (["causal", "--pass", "training"], "--pass training: use one of forward, backward, decode"),
        (["causal", "--dtype", "int8"], "--dtype int8: use one of"),
        (["causal", "--baseline", "flash"], "--baseline flash: use one of full, causal, both"),
        (["full", "--baseline", "causal"], "`full` shows keys behind their queries"),
        (["causal", "--sweep", "len"], "--sweep len: write a name and a range"),
        (["causal", "--sweep", "len=4k..1k"], "the range must start at 1 or above"),
        (["causal", "--sweep", "windw=1..2"], "has no parameter `windw`"),
        (["causal", "--grid", "3"], "`causal` has no grid"),
        (["neighborhood_2d", "--grid", "30,48", "--len", "100"], "has 1,440 tokens"),
        (["neighborhood_2d", "--grid", "30"], "has 2 axes: y, x"),
        (["neighborhood_2d", "--grid", "0,4"], "write whole numbers above 0"),
        (["neighborhood_2d", "--grid", "30,48", "-p", "height=3"], "-p height=3: --grid 30,48 sets `height` too"),
        (["neighborhood_2d", "-p", "height=9", "-p", "width=9", "--sweep", "len=1k..2k"], "is fixed by its parameters"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert main(["simulate", *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["diagnostics"]


class Fake:
    def __init__(self, speedup: float, pairs: float = 2.0) -> None:
        self.speedup = speedup
        self.rungs = [Rung("element", pairs, "")]


@pytest.mark.parametrize(("first", "even"), [(1, 64), (64, 64), (65, 72), (1000, 1024), (1025, 1152), (5000, None)])
def test_break_even(first: int, even: int | None) -> None:
    def simulation_at(n: int) -> Any:
        return Fake(2.0 if n >= first else 0.5)

    assert break_even(simulation_at, 4096) == even


def test_break_even_needs_a_difference_from_the_rival() -> None:
    """Noise of the model is no win: up to 512 tokens a window of 512 shows the same pairs as causal attention."""

    def simulation_at(n: int) -> Any:
        return Fake(1.5, pairs=1.0 if n <= 512 else 2.0)

    assert break_even(simulation_at, 4096) == 576
    values = compile_attention("sliding_window", window=512)
    even = break_even(lambda n: values.simulate(n, baseline="causal"), 16384)
    assert even is not None and values.simulate(even).rung("element").speedup > 1


@pytest.mark.parametrize(
    ("spec", "baseline"),
    [
        ("causal", "causal"),
        ("sliding_window", "causal"),
        ("moba", "causal"),
        ("full", "full"),
        ("pattern p()\n    visible k <= q + 1\n", "full"),
        ("gla", "causal"),
        ("hybrid_window_linear", "causal"),
    ],
)
def test_the_default_rival(spec: str, baseline: str) -> None:
    params: dict[str, Any] = {"window": 64} if spec == "sliding_window" else {}
    assert compile_attention(spec, **params).simulate(2048, heads=2).baseline == baseline


def test_both_rivals_are_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    window = ["simulate", "sliding_window", "-p", "window=256", "--len", "4k"]
    _, values = run_json(capsys, *window)
    assert values["shape"]["queries"] == 4096 and values["baseline"] == "causal"
    for baseline in ("full", "causal"):
        _, alone = run_json(capsys, *window, "--baseline", baseline)
        rival = values["rivals"][baseline]
        assert rival["dense_ms"] == alone["dense_ms"] and rival["speedup"] == alone["speedup"]
        assert rival["ideal_dense_ms"] == alone["ideal_dense_ms"]
    _, values = run_json(capsys, "simulate", "full", "--len", "1k")
    assert values["rivals"]["causal"] is None and values["rivals"]["full"]["speedup"] == values["speedup"]
    _, values = run_json(capsys, "simulate", "gla", "--len", "1k")
    assert values["rivals"]["full"] is None and values["rivals"]["causal"]["speedup"] == values["speedup"]


def test_a_pattern_that_is_its_own_rival(capsys: pytest.CaptureFixture[str]) -> None:
    _, values = run_json(capsys, "simulate", "causal", "--len", "1k")
    assert values["break_even_length"] is None
    assert values["break_even_note"] == "at this length it has the same visible pairs as its rival, causal attention"


def test_machines_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name.partition("-")[0] in text for name in machine_names())
    assert find_machine("h100").title in str(find_machine("h100"))


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    arguments = ["simulate", "sliding_window", "-p", "window=128", "--len", "2048", "--sweep", "len=1k..2k"]
    assert main([*arguments, "--compare", "causal", "-o", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: sliding_window, ")
    text = path.read_text(encoding="utf-8")
    assert "sliding_window" in text and "O(n·w) with w = 128" in text and "causal" in text
    assert list(tmp_path.iterdir()) == [path]
    values = json.loads(text.split('type="application/json"', 1)[1].split(">", 1)[1].split("</script>", 1)[0])
    assert {point["length"] for point in values["points"]} == {1024, 2048, 4096}
    assert {point["value"] for point in values["points"]} == {64, 128, 256}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "report.txt"], "-o report.txt: the report is an HTML page; its name must end in .html"),
        (["-o", "x.html", "--slider", "windw"], "--slider windw: `sliding_window` has no whole-number parameter"),
    ],
)
def test_reports_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "sliding_window", "-p", "window=64", "--len", "512", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
