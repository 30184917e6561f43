"""`attnc fmt`, `explain` and `same`: printed text, written files, JSON keys and exit codes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from attnc.runtime.cli import main
from attnc.spec.codes import CODES
from command_calls import run_json

# --- fmt -------------------------------------------------------------------------------------------------------------

MESSY = "pattern near\n  visible  0<=q-k<4   # near\n"
NEAT = "pattern near\n    visible 0 <= q - k < 4  # near\n"


def test_fmt_writes_the_canonical_form(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messy = files / "messy.attn"
    messy.write_text(MESSY)
    messy.chmod(0o640)
    assert main(["fmt", "good.attn", "messy.attn"]) == 0
    assert capsys.readouterr().out == "messy.attn: formatted\n2 files read, 1 changed\n"
    assert messy.read_text() == NEAT
    assert messy.stat().st_mode & 0o777 == 0o640
    assert main(["fmt", "messy.attn"]) == 0
    assert sorted(path.name for path in files.iterdir()) == ["bad.attn", "good.attn", "messy.attn"]


def test_fmt_check_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "messy.attn").write_text(MESSY)
    assert main(["fmt", "--check", "good.attn"]) == 0
    assert main(["fmt", "--check", "good.attn", "messy.attn"]) == 1
    assert capsys.readouterr().out.endswith("messy.attn: is not formatted\n2 files read, 1 would change\n")
    assert (files / "messy.attn").read_text() == MESSY
    status, values = run_json(capsys, "fmt", "--check", "messy.attn")
    assert status == 1
    assert values == {"schema": 1, "changed": ["messy.attn"], "diagnostics": []}


def test_fmt_writes_unix_line_ends(files: Path) -> None:
    (files / "windows.attn").write_bytes(NEAT.replace("\n", "\r\n").encode())
    assert main(["fmt", "windows.attn"]) == 0
    assert (files / "windows.attn").read_bytes() == NEAT.encode()


def test_fmt_leaves_invalid_files_unchanged(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "broken.attn").write_text("pattern near\n  visible 0<=\n")
    assert main(["fmt", "broken.attn"]) == 1
    assert "error[A102]" in capsys.readouterr().err
    assert (files / "broken.attn").read_text() == "pattern near\n  visible 0<=\n"
    assert main(["fmt", "missing.attn"]) == 2
    assert main(["fmt", "."]) == 2
    capsys.readouterr()
    status, values = run_json(capsys, "fmt", "broken.attn")
    assert (status, values["diagnostics"][0]["code"]) == (1, "A102")


def test_fmt_of_stdin_is_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(MESSY.encode())))
    assert main(["fmt", "-"]) == 0
    assert capsys.readouterr().out == NEAT


# --- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["A201", "a201", "error[A201]"])
def test_explain_prints_a_page(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", written]) == 0
    assert capsys.readouterr().out.startswith("# A201: unknown name\n")


def test_explain_lists_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{code}  {title}" for code, title in CODES.items()]
    assert run_json(capsys, "explain")[1]["codes"] == CODES
    assert run_json(capsys, "explain", "A905")[1]["title"] == CODES["A905"]


def test_explain_of_an_unknown_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "A210x"]) == 2
    assert "did you mean `A210`" in capsys.readouterr().err
    assert main(["explain", "../README"]) == 2


# --- same ------------------------------------------------------------------------------------------------------------

BLOCKS = "pattern b\n    visible q // 8 == k // 8\n"
EQUAL = {
    "one text in two forms": (
        ["causal", "pattern c\n    visible not k > q\n"],
        "for every length: both have one normal",
    ),
    "dilation 1 is a window": (
        ["sliding_window", "dilated_window", "-p", "window=64", "-q", "window=64", "-q", "dilation=1"],
        "for every length: the pairs of 131 tokens decide",
    ),
    "sinks of StreamingLLM": (
        ["sliding_window", "streaming", "-p", "window=9", "-p", "sinks=3", "-q", "window=9", "-q", "sinks=3"],
        "for every length: Presburger arithmetic (isl) proves it",
    ),
    "neighbourhoods with stride = window are blocks": (
        [
            "neighborhood_1d",
            BLOCKS.replace("b\n", "b\n    require keys % 8 == 0\n", 1),
            "-p",
            "window=8",
            "-p",
            "stride=8",
        ],
        "for every length that `require` allows: Presburger arithmetic (isl) proves it",
    ),
    "causal windows, but for lengths that `require` refuses": (
        ["causal", "pattern c\n    require keys <= 10\n    visible 0 <= q - k < 20\n"],
        "for every length that `require` allows: Presburger",
    ),
    "a size that the relation does not read": (
        ["full", "pattern c\n    require dk % 2 == 0\n    visible k < keys\n"],
        "for every length: Presburger",
    ),
    "gaps that only heads of one group have": (
        ["s2_attention", "s2_attention", "-p", "vertical_stride=8", "-q", "dense_heads=0"],
        "for every length: both have one normal form, for 8 heads, 1 or 2 to a kv head",
    ),
    "blocked is windows in blocks": (["blocked", BLOCKS, "-p", "block=8"], "for every length"),
}


@pytest.mark.parametrize("name", sorted(EQUAL))
def test_equal_patterns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = EQUAL[name]
    status = main(["same", *arguments])
    out = capsys.readouterr().out
    assert status == 0, out
    assert f" are equal {says}" in out


def test_patterns_equal_only_in_trials_are_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "causal", "pattern c\n    visible q * q >= k * k\n"]) == 2
    says = "for all lengths up to 2,048; longer ones are not proved (a product is beyond Presburger arithmetic)"
    assert f"they have the same visible pairs {says}" in capsys.readouterr().out


def test_freeswim_equals_a_neighbourhood(capsys: pytest.CaptureFixture[str]) -> None:
    """FreeSwim is a neighbourhood over one frame, with the reach as its width on both sides."""
    swim = ["-p", "frames=1", "-p", "height=6", "-p", "width=9", "-p", "reach=[1,2]"]
    near = ["-q", "height=6", "-q", "width=9", "-q", "window=[3,5]"]
    status = main(["same", "freeswim", "neighborhood_2d", *swim, *near])
    assert status == 0, capsys.readouterr().out


def test_different_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sliding_window", "sliding_window", "-p", "window=64", "-q", "window=65"]
    assert main(["same", *arguments]) == 1
    out = capsys.readouterr().out
    assert "query 64 sees key 0 in the second sliding_window and not in the first sliding_window" in out
    status, values = run_json(capsys, "same", *arguments)
    assert (status, values["equal"], values["witness"]) == (1, False, {"q": 64, "k": 0, "head": 0})
    assert run_json(capsys, "same", "causal", "causal")[1]["equal"]


def test_patterns_that_differ_at_late_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "causal", "pattern c\n    visible k <= q and (keys < 5000 or k != 17)\n"]) == 1
    assert "differ: among 5,000 tokens, in head 0, query 17 sees key 17 in causal" in capsys.readouterr().out
    lists = ["-p", "alpha=[0,64]", "-p", "beta=[0.5,0]", "-q", "alpha=[0,64]", "-q", "beta=[0.5,0.01]"]
    status, values = run_json(capsys, "same", "moa", "moa", *lists)
    assert (status, values["length"], values["witness"]) == (1, 6400, {"q": 128, "k": 64, "head": 1})


def test_proofs_without_islpy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "islpy", None)
    blocks = BLOCKS.replace("b\n", "b\n    require keys % 8 == 0\n", 1)
    assert main(["same", "neighborhood_1d", blocks, "-p", "window=8", "-p", "stride=8"]) == 2
    out = capsys.readouterr().out
    says = "for the 20 lengths that `require` allows up to 160; longer ones are not proved"
    assert f"they have the same visible pairs {says}" in out
    assert "(`pip install 'attnc[proofs]'` may prove it for every length)" in out
    dilated = ["-p", "window=64", "-q", "window=64", "-q", "dilation=1"]
    assert main(["same", "sliding_window", "dilated_window", *dilated]) == 0
    assert "for every length: the pairs of 131 tokens decide" in capsys.readouterr().out
    assert main(["same", "causal", "pattern c\n    visible k <= q and (keys < 150 or k != 17)\n"]) == 1
    assert "among 150 tokens" in capsys.readouterr().out


def test_kv_heads_differ_from_heads_under_grouping(capsys: pytest.CaptureFixture[str]) -> None:
    by_kv_head, by_head = (f"pattern p\n    visible {name} == 0 or q == k\n" for name in ("kv_head", "head"))
    assert main(["same", by_kv_head, by_head]) == 1
    assert "in head 1 with 2 heads per kv head, query 0 sees key 1 in the first p" in capsys.readouterr().out
    assert run_json(capsys, "same", by_kv_head, by_head)[1]["group"] == 2
    assert main(["same", by_kv_head, by_kv_head.replace("== 0", "< 1")]) == 0
    by_count = "pattern p\n    visible head < heads or q == k\n"
    assert main(["same", by_count, "full"]) == 0
    assert ", for 8 heads, 1 or 2 to a kv head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["causal", "pattern p\n    visible 0 <= q - k < dk\n"], "`p` reads the size `dk`, which is decided by a call"),
        (
            ["full", "pattern p\n    require keys < 1\n    visible k < keys\n"],
            "`require` refuses all lengths up to 160",
        ),
        (["moa", "moa", "-p", "alpha=[0,64]", "-p", "beta=[0.5,0]", "-q", "alpha=[1]", "-q", "beta=[0]"], "2 heads"),
        (["causal", "neighborhood_2d", "-q", "height=4", "-q", "width=4", "-q", "window=3", "-p", "x=3"], "x"),
    ],
)
def test_errors_of_same(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", *arguments]) == 2
    assert says in capsys.readouterr().err
