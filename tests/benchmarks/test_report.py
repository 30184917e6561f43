"""The report: current, the same every time, and of made-up results what they say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import benchmark_part
import pytest
import reading
import report
from benchmark_part import Row
from reading import Result

FACTS = {
    **{"torch": "2.99", "triton": "3.99", "python": "3.98", "commit": "abc1234", "device": "cpu: an abacus, 2 cores"},
    **{"date": "2026-01-02T03:04:05Z", "threads": 2, "load_before": 0.5, "rivals": {"fla-core": "9.9"}},
}


def _row(key: str, ours: float, dense: float, **more: object) -> Row:
    times = {"attnc": ours, "dense": dense, "flex": 2 * dense}
    return {"key": key, "ms": {name: {"median": x, "low": x, "high": x} for name, x in times.items()}, **more}


def _mask(name: str, ours: float, dense: float, dtype: str = "float32") -> Row:
    facts = {"pattern": name, "n": 4096, "d": 64, "dtype": dtype, "direction": "forward"}
    facts |= {"density": 0.25, "bound": 3.5}
    return _row(f"{name} n=4096 d=64 {dtype} forward", ours, dense, **facts)


def _result(name: str, rows: list[Row], complete: bool = True) -> Result:
    return Result(name, {**FACTS, "part": name, "complete": complete}, rows)


RESULTS = {
    one.part: one
    for one in (
        _result("cpu-windows-float32", [_mask("window 512", 1, 3), _mask("document", 2, 1)]),
        _result("cpu-windows-bfloat16", [_mask("window 512", 1, 3, "bfloat16"), {"key": "power", "ok": False}], False),
        _result(
            "cpu-compile",
            [
                {
                    "key": "new shapes, attnc",
                    "recompiles": 0,
                    "calls": [{"batch": 2, "n": 9, "first_ms": 5, "second_ms": 4}],
                },
                {
                    "key": "first call forward, attnc",
                    "first_ms": {x: {"median": 7.0} for x in ("cold", "warm", "next")},
                },
            ],
        ),
        _result(
            "cpu-simulator",
            [
                _mask(f"window {i}", i, 3 * i) | {"predicted": {"attnc": 1.1 * i}, "over_ideal": 1.0}
                for i in range(1, 6)
            ],
        ),
        _result(
            "cpu-routing",
            [
                _row(f"moba n={n} forward", 1, n / 6000, pattern="moba", n=n, direction="forward", dtype="float32")
                for n in (4096, 8192)
            ],
        ),
    )
}


def test_it_is_current() -> None:
    """`python benchmarks/report.py` writes it."""
    for path, text in report.written(reading.load()).items():
        assert path.read_text(encoding="utf-8") == text, path


def test_it_is_the_same_every_time() -> None:
    assert report.written(RESULTS) == report.written(dict(reversed(RESULTS.items())))


def test_what_it_says() -> None:
    text = report.written(RESULTS)[report.DOCS / "performance.md"]
    assert "| window 512 n=4096 d=64 float32 forward | ahead |" in text
    assert "| document n=4096 d=64 float32 forward | behind dense |" in text
    assert "Wrong, and so not timed: power." in text
    assert "Wrong results, which no speed makes up for: cpu-windows-bfloat16: power." in text
    assert "Stopped after 2 rows." in text
    assert "| 2 × 9 | 5.0 | 4.0 |" in text and "0 graphs compiled anew" in text
    assert "| first call forward, attnc | 7.0 | 7.0 | 7.0 |" in text
    assert "Nothing has been measured on a GPU here" in text
    assert "moba forward: 6,000 tokens" in report.written(RESULTS)[report.DOCS / "performance/lengths-cpu.svg"]
    assert "error 10 % at the median" in text and "Kendall's tau 1.00" in text
    assert "G9.flex | times compiled FlexAttention's speed, forward | PERFORMANCE 8, G9 | behind |" in text
    assert (
        "dense.flex | times compiled FlexAttention's speed, full and causal | PERFORMANCE 8, G1a | not measured" in text
    )


def test_every_figure_names_where_it_is_from() -> None:
    text = report.written(RESULTS)[report.DOCS / "performance.md"]
    for name in RESULTS:
        told = next(line for line in text.splitlines() if line.startswith(f"`{name}`:"))
        for fact in ("an abacus", "torch 2.99", "Triton 3.99", "commit abc1234", "2026-01-02", "fla-core 9.9"):
            assert fact in told


def test_pictures_are_svg_and_stand_in_the_page(tmp_path: Path) -> None:
    written = report.written(RESULTS)
    drawn = {path.name for path in written if path.suffix == ".svg"}
    assert drawn == {f"{name}-cpu.svg" for name in ("density", "predicted", "lengths")}
    for path, text in written.items():
        if path.suffix == ".svg":
            assert ElementTree.fromstring(text).tag.endswith("svg")
            assert f"(performance/{path.name})" in written[report.DOCS / "performance.md"]
    for result in RESULTS.values():
        benchmark_part.write(tmp_path / f"{result.part}.json", {**result.facts, "rows": result.rows})
    page = report.page(tmp_path)
    assert page.count("<svg") == 3
    assert page.startswith("<!doctype html>")


def test_check_tells_what_is_not_current(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "performance").mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(reading, "load", lambda: RESULTS)
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main() == 1
    assert "not current: docs/performance.md" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report.py"])
    assert report.main() == 0
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main() == 0
    (tmp_path / "docs" / "performance" / "old.svg").write_text("", encoding="utf-8")
    assert report.main() == 1
