"""The command line: printed text, promised JSON keys and exit codes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnc import __version__
from attnc.runtime.cli import COMMANDS, main
from attnc.runtime.commands.list_patterns import FAMILIES, entries
from attnc.runtime.texts.library import library_names
from attnc.runtime.verifying import accuracy
from attnc.runtime.verifying.call_cases import CallCase
from command_calls import run_json

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "src")}

# --- usage -----------------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"attnc {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert set(COMMANDS) <= {line.split()[0] for line in out.splitlines() if line.startswith("    ") and line.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--verbose"],
            "no command; the commands are cache, check, doctor, emit, explain, fmt, list, receptive, same",
        ),
        (
            ["train", "a.attn"],
            "there is no command `train`; the commands are cache, check, doctor, emit, explain, fmt, list, receptive",
        ),
        (["chekc"], "there is no command `chekc`: did you mean `check`?"),
        (["show"], "the following arguments are required: SPEC; `attnc show --help`"),
        (["show", "causal", "--lne", "5"], "unrecognized arguments: --lne 5"),
        (["show", "causal", "--len", "many"], "argument --len: 'many' is not a whole number"),
        (["show", "causal", "--len", "0"], "--len 0: give a whole number, at least 1"),
        (["show", "causal", "--head", "-1"], "--head -1: give a whole number, at least 0"),
        (["show", "causal", "-o", "a.png"], "-o a.png: the picture is an SVG; its name must end in .svg"),
        (["show", "causal", "-o", "none/a.svg"], "none/a.svg: No such file or directory"),
        (["show", "sliding_windw"], "the library has no pattern `sliding_windw`: did you mean `sliding_window`?"),
        (["show", "missing.attn"], "cannot read missing.attn: No such file or directory"),
        (["show", "sliding_window", "-p", "window"], "-p window: write it as -p NAME=VALUE, as in -p window=512"),
        (["show", "sliding_window", "-p", "window=ten"], "-p window=ten: not a value; write a number"),
        (["show", "sliding_window", "-p", "window=NaN"], "-p window=NaN: not a value"),
        (["show", "sliding_window", "-p", 'window="5"'], "not a value"),
        (["show", "sliding_window", "-p", "window=1/0"], "not a value"),
        (["show", "sliding_window", "-p", "window=True"], "-p window=True: not a value; write true"),
        (["show", "sliding_window", "-p", "window=2", "-p", "window=3"], "-p window is given twice"),
        (["show", "sliding_window", "-p", "strict=true"], "no pattern has a parameter of that name"),
        (["show", "sliding_window", "-p", "windw=5"], "did you mean `window`?"),
        (["show", "sliding_window", "-p", "window=0"], "`sliding_window` requires `window >= 1"),
        (["show", "sliding_window", "-p", "window=[7,7]"], "`window` expects an integer"),
        (["show", "sliding_window", "--preset", "mistrl"], "did you mean `mistral`?"),
        (["show", "document", "--input", "docs=1"], "`document` has no input `docs`: did you mean `doc`?"),
        (["show", "document", "--input", "doc=[[0],[0,1]]"], "--input doc: write a JSON list of int values"),
        (["show", "blocked", "--len", "8", "--keys", "0"], "--keys 0: give a whole number, at least 1"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err and "\x1b" not in err


def test_bad_usage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "show", "sliding_windw")
    assert status == 2
    (diagnostic,) = values["diagnostics"]
    assert {"code", "severity", "message", "file", "line", "column", "help"} == diagnostic.keys()


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attnc.runtime.cli._run", lambda arguments: interrupt())
    assert main(["list"]) == 130


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m attnc list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.stderr == ""


def test_a_terminal_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["show", "causal", "--len", "8"]) == 0
    stdout.seek(0)
    assert "########" in stdout.read()


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_reports_errors_of_compilation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "root.attn"
    path.write_text("pattern root\n    align end\n    visible q - k < floor(sqrt(q) + sqrt(k))\n")
    assert main(["check", str(path)]) == 1
    assert "A701" in capsys.readouterr().err


def test_check_of_good_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.attn", str(files / "good.attn")]) == 0
    assert capsys.readouterr() == ("2 files checked, no errors\n", "")


def test_check_shows_the_position_and_the_remedy(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.attn", "bad.attn"]) == 1
    out, err = capsys.readouterr()
    assert out == "2 files checked, 1 error\n"
    assert "--> bad.attn:2:22" in err and "^^" in err


def test_check_suggests_a_file_beside_and_one_of_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "boundaries.attn").write_text("def near(x, y) = x - y < 3\n")
    path = tmp_path / "root.attn"
    path.write_text("use boundary (near)\nuse windos (shifted)\n\npattern root\n    visible near(q, k)\n")
    assert main(["check", str(path)]) == 1
    stderr = capsys.readouterr().err
    assert "did you mean `boundaries`?" in stderr and "did you mean `windows`?" in stderr


def test_check_as_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "check", "good.attn") == (0, {"schema": 1, "diagnostics": []})
    status, values = run_json(capsys, "check", "bad.attn")
    assert status == 1
    (diagnostic,) = values["diagnostics"]
    assert {"code", "severity", "message", "file", "line", "column", "help"} == diagnostic.keys()
    assert (diagnostic["file"], diagnostic["line"], diagnostic["column"]) == ("bad.attn", 2, 22)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "is a directory; name the files in it"),
        ("none.attn", "none.attn: No such file or directory"),
        ("causal", "`attnc show causal` draws the library's pattern of that name"),
    ],
)
def test_check_of_a_path_that_is_no_file(
    name: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", name, "bad.attn"]) == 2
    out, err = capsys.readouterr()
    assert message in err and "bad.attn:2:22" in err
    assert out == "1 file checked, 1 error in it, 1 file not read\n"


def test_check_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for text, status in (("pattern a\n    visible k == q\n", 0), ("pattern a\n    visible kk <= q\n", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
        assert main(["check", "-"]) == status
    out, err = capsys.readouterr()
    assert out == "1 file checked, no errors\n1 file checked, 1 error\n"
    assert "<stdin>:2:" in err


def test_check_of_a_missing_file_fails(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.attn", "none.attn"]) == 2
    assert capsys.readouterr().out == "1 file checked, no errors in it, 1 file not read\n"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: attnc") and "verify" in out
    assert not err


def test_explain_of_a_pattern_points_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "sliding_window"]) == 2
    assert "`attnc show sliding_window` draws it" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"\x00\x01\xff", b"\xff\xfe", b"pattern a\n\tvisible true\n"])
def test_check_of_binary_data(data: bytes, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "odd.attn").write_bytes(data)
    assert main(["check", "odd.attn"]) == 1
    assert "error[A00" in capsys.readouterr().err


def test_list_does_not_load_torch() -> None:
    code = "import sys; from attnc.runtime.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_is_grouped_by_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    blocks = capsys.readouterr().out.rstrip().split("\n\n")
    heads = [block.splitlines()[0].partition(":")[0] for block in blocks]
    assert heads == list(FAMILIES)
    lines = [line.strip() for block in blocks for line in block.splitlines()[1:]]
    assert len(lines) == len(library_names())
    parts = [line.partition("  ") for line in lines]
    assert any(
        call == "sliding_window(window = 4096, sinks = 0)" and summary.lstrip().startswith("A causal window of")
        for call, _, summary in parts
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scores"], {"alibi", "fox", "softcap"}),
        (["video"], {"neighborhood_3d", "sliding_tile", "vsa", "lingen_ma"}),
        (["VIDEO", "text"], {"sliding_tile", "radial"}),
        (["2309.17453"], {"streaming", "sliding_window"}),
    ],
)
def test_list_of_a_family_or_of_words(words: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "list", *words)
    names = {pattern["name"] for pattern in values["patterns"]}
    assert status == 0 and expected <= names
    assert "causal" not in names and len(names) < len(library_names())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grid"], None),
        (["scorse"], "did you mean `scores`?"),
        (["retentoin"], "did you mean `retention`?"),
        (["zzzz"], "the families are masks, grids, scores"),
        (["video", "ALiBi"], "use fewer words"),
    ],
)
def test_list_of_words_without_a_match(
    words: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["list", *words])
    err = capsys.readouterr().err
    assert (status, err == "") == ((0, True) if message is None else (2, False))
    assert message is None or message in err


def test_every_pattern_of_the_library_has_a_summary_and_a_source() -> None:
    for entry in entries():
        assert entry.summary.endswith((".", "…")) and entry.source, entry.program.name
        assert entry.family in FAMILIES


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "list")
    assert status == 0
    for pattern in values["patterns"]:
        assert {"name", "family", "summary", "file", "inputs", "presets", "source"} == pattern.keys()
        assert Path(pattern["file"]).is_file() and pattern["summary"]


# --- show ------------------------------------------------------------------------------------------------------------


def test_show(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "sliding_window", "-p", "window=6", "-p", "sinks=1", "--len", "24"]) == 0
    out, err = capsys.readouterr()
    golden = Path(__file__).parents[1] / "pictures" / "sliding_window_24_wide.txt"
    assert out == golden.read_text(encoding="utf-8")
    assert err == ""


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "show", "sliding_window", "-p", "window=6", "-p", "sinks=1", "--len", "24")
    assert status == 0
    assert (values["visible"], values["density"]) == (147, 147 / 576)
    assert values["row_counts"] == {"min": 1, "max": 7, "first_rows": [1, 2, 3, 4, 5, 6, 7, 7]}
    assert values["tiles"] == {"total": 36, "live": 18, "full": 0, "partial": 18, "q_tile": 4, "k_tile": 4}
    assert values["params"] == {"window": 6, "sinks": 1}


def test_show_counts_pairs_of_long_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    _, values = run_json(capsys, "show", "causal", "--len", "100000")
    assert values["visible"] == 100_000 * 100_001 // 2


def test_show_writes_the_svg(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "good.attn", "--len", "16", "-o", "near.svg"]) == 0
    assert capsys.readouterr().out.startswith("near.svg: 22.66 % visible, 58 of 256 pairs; 1 – 4 keys per row")
    assert (files / "near.svg").read_text(encoding="utf-8").startswith("<svg ")


def test_show_says_which_inputs_are_examples(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "document", "--len", "12"]) == 0
    assert "note      doc, an example: 3 documents of 4, 4 and 4 tokens\n" in capsys.readouterr().out


def test_show_takes_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    _, values = run_json(capsys, "show", "document", "--len", "4", "--input", "doc=[0,0,1,1]")
    assert (values["visible"], values["notes"]) == (6, [])
    _, values = run_json(capsys, "show", "prefix_lm", "--len", "4", "--input", "prefix=4")
    assert values["density"] == 1


def test_show_with_more_keys_than_queries(capsys: pytest.CaptureFixture[str]) -> None:
    _, values = run_json(capsys, "show", "causal", "--len", "2", "--keys", "5")
    assert values["row_counts"]["first_rows"] == [4, 5]


def test_show_takes_the_length_from_the_tokens(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "grid.attn").write_text("pattern grid\n    tokens y: 3, x: 5\n    visible q.y == k.y\n")
    _, values = run_json(capsys, "show", "grid.attn")
    assert (values["queries"], values["visible"]) == (15, 75)


def test_show_of_an_invalid_file_fails(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "bad.attn"]) == 1
    assert "bad.attn:2:22" in capsys.readouterr().err


def test_show_of_an_undefined_relation_fails(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "zero.attn").write_text("pattern zero\n    visible q % k == 1\n")
    assert main(["show", "zero.attn", "--len", "4"]) == 1
    assert "division by zero" in capsys.readouterr().err


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [CallCase(31, 31, 2, 6, 2, 16, 24), CallCase(17, 45, 1, 3, 1, 16, 16)]
    monkeypatch.setattr("attnc.runtime.commands.verify.awkward_cases", lambda bound, length, request: shapes)


@pytest.mark.parametrize("name", ["sliding_window", "document", "full", "affine_scaled", "differential"])
def test_verify(name: str, few_shapes: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", name]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"{name}: evaluator, reference and cpu executor agree\n")
    assert err == ""
    for tensor in accuracy.TENSORS:
        assert f"cpu        float32   {tensor}" in out


def test_verify_says_which_shapes_a_pattern_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [CallCase(9, 9, 1, 2, 1, 7, 7), CallCase(9, 9, 1, 2, 1, 6, 6)]
    monkeypatch.setattr("attnc.runtime.commands.verify.awkward_cases", lambda bound, length, request: shapes)
    assert main(["verify", "differential"]) == 0
    assert "dims 7/7  (left out: the pattern rejects it)" in capsys.readouterr().out


def test_verify_finds_a_wrong_executor(
    few_shapes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnc.runtime.api.attention import Attention

    call = Attention.__call__

    def wrong(self: Attention, *tensors: Any, **options: Any) -> Any:
        out, lse = call(self, *tensors, **options)
        return out * (1 + 1e-4), lse

    monkeypatch.setattr(Attention, "__call__", wrong)
    status, values = run_json(capsys, "verify", "causal")
    assert status == 1
    assert not values["agreed"]
    assert "out is off by" in values["diagnostics"][0]["message"]


def test_verify_finds_a_wrong_relation(
    few_shapes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnc.runtime.api.attention import Attention

    mask = Attention.mask

    def wrong(self: Attention, *arguments: Any, **options: Any) -> Any:
        return mask(self, *arguments, **options).logical_not()

    monkeypatch.setattr(Attention, "mask", wrong)
    assert main(["verify", "causal"]) == 1
    assert "query 0, key 0: the evaluator says visible" in capsys.readouterr().out


def test_a_nan_error_never_agrees() -> None:
    assert not accuracy.Error("out", float("nan"), 1.0, 2.0).agrees


@pytest.mark.parametrize("command", ["cache why", "receptive", "show", "simulate", "tune", "verify"])
def test_all_commands_read_lengths_alike(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "causal", "--len", "8q"]) == 2
    assert "argument --len: '8q' is not a whole number: write it as in 8192, 8k or 1m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["receptive", "sliding_window", "-p", "window=16"], "1,024 tokens"),
        (["show", "causal"], "1,024 queries × 1,024 keys"),
        (["simulate", "causal"], "1,024 tokens"),
    ],
)
def test_a_length_of_1k(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--len", "1k"]) == 0
    assert message in capsys.readouterr().out
