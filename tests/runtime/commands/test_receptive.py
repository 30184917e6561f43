"""`attnc receptive`: the library's patterns against dense masks, printed text, JSON keys, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnc import Attention, UnsupportedError, compile_attention
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.cli import main
from attnc.runtime.commands import console
from attnc.runtime.patterns.layers import layer_of
from command_calls import run_json
from receptive_fields import Mask, check_reach

HEADS = 4

LIBRARY: list[tuple[str, dict[str, Any]]] = [
    ("block_diffusion", {"block": 4}),
    ("blocked", {"block": 12}),
    ("causal", {}),
    ("combiner", {"segment": 10}),
    ("davit_window", {"height": 9, "width": 11, "window": 4}),
    ("dilated_window", {"window": 5, "dilation": 3}),
    ("document", {}),
    ("freeswim", {"frames": 4, "height": 6, "width": 8, "reach": [2, 3]}),
    ("full", {}),
    ("halo", {"height": 12, "width": 8, "block": 4, "halo": 1}),
    ("landmark", {"block": 10}),
    ("log_sparse", {"segment": 16, "window": 64}),
    ("long_lora", {"groups": 5}),
    ("longformer", {"window": 4, "dilation": [1, 3]}),
    ("moa", {"alpha": [16, 0, -40], "beta": [0, 0.5, 1], "block": 8}),
    ("neighborhood_1d", {"window": 5, "dilation": 2}),
    ("neighborhood_2d", {"height": 10, "width": 13}),
    ("neighborhood_3d", {"frames": 5, "height": 4, "width": 7, "window": 3}),
    ("power", {"window": 2, "block": 3}),
    ("prefix_lm", {}),
    ("radial", {"frames": 4, "per_frame": 30, "block": 8}),
    ("s2_attention", {"block": 4, "local_blocks": 2, "vertical_stride": 4}),
    ("sliding_tile", {"frames": 4, "height": 6, "width": 8, "tile": [2, 3, 4], "kernel": [2, 3, 8]}),
    ("sliding_window", {"window": 9, "sinks": 2}),
    ("sparse_fixed", {"segment": 16, "summary": 4, "groups": 3}),
    ("sparse_transformer", {"stride": 8}),
    ("streaming", {"window": 9, "last": 5}),
    ("strided", {"stride": 8, "local": 8}),
    ("svg", {"frames": 4, "per_frame": 30, "block": 8}),
]


def dense(attention: Attention, n: int, heads: int, inputs: dict[str, Any]) -> Mask:
    """Return the union of the heads' masks."""
    masks = [attention.mask(n, head=head, heads=heads, **inputs) for head in range(heads)]
    seen: Mask = np.logical_or.reduce([(m[0] if m.dim() == 3 else m).numpy() for m in masks])
    return seen


@pytest.mark.parametrize(("name", "params"), LIBRARY, ids=[name for name, _ in LIBRARY])
def test_the_library_against_dense_masks(name: str, params: dict[str, Any]) -> None:
    attention = compile_attention(name, **params)
    n = natural_length(attention.bound) or 130
    heads = head_count(attention.bound) or HEADS
    examples = example_inputs(attention.bound, n, n, {}, heads=heads, names=attention.relation_inputs)
    inputs = {name: example.tensor for name, example in examples.items()}
    layer, mask = layer_of(attention, n, heads, inputs), dense(attention, n, heads, inputs)
    for query in (0, n // 2, n - 1):
        check_reach([layer], [mask], [0], query)


@pytest.mark.parametrize("n", [1, 7, 130])
def test_lists_of_patterns_against_dense_masks(n: int) -> None:
    patterns = [
        compile_attention("sliding_window", window=4),
        compile_attention("power", window=2, block=4),
        compile_attention("blocked", block=9),
    ]
    kinds = [layer_of(pattern, n, 1, {}) for pattern in patterns]
    masks = [dense(pattern, n, 1, {}) for pattern in patterns]
    for order in ([0, 0, 1], [0, 1], [1, 0, 2], [2, 2]):
        check_reach(kinds, masks, order, n - 1)
        check_reach(kinds, masks, order, n // 3)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("davit_channel", {}, "`davit_channel` has keys that are not tokens"),
        ("hierarchical", {"group": 4}, "`hierarchical` has an attention that reads the output of another"),
    ],
)
def test_unsupported_patterns_are_refused(name: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        layer_of(compile_attention(name, **params), 16, 1, {})


def test_sequences_of_a_batch_entry_are_separate(capsys: pytest.CaptureFixture[str]) -> None:
    documents = "[[0,0,0,1,1,1,1,1],[0,1,2,3,4,5,6,7]]"
    _, values = run_json(capsys, "receptive", "document", "--input", f"doc={documents}", "--len", "8", "--query", "5")
    assert [layer["tokens"] for layer in values["layers"]] == [1, *[3] * 8]


# --- printed text ----------------------------------------------------------------------------------------------------


def test_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", "sliding_window", "-p", "window=512", "--layers", "3", "--path", "15000"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == (
        "sliding_window(window = 512, sinks = 0)\n"
        "16,384 tokens, query 16,383; it should see k <= q: 16,384\n"
        "\n"
        "layer     tokens     share   furthest all within\n"
        "    0          1 0.00610 %          0          0\n"
        "    1        512    3.12 %        511        511\n"
        "    2      1,023    6.24 %      1,022      1,022\n"
        "    3      1,534    9.36 %      1,533      1,533\n"
        "\n"
        "growth    tokens and all within, linear: 511 more with every layer (layers 1 – 32)\n"
        "result    not within 3 layers; it sees everything that it should from layer 33 on\n"
        "path      15,000: reaches the query after 3 layers, for example by 15,000 → 15,361 → 15,872 → 16,383\n"
    )


def test_powers_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", "power", "--layers", "9"]) == 0
    out = capsys.readouterr().out
    assert "growth    all within, exponential: what a layer adds doubles with every layer (layers 1 – 4)\n" in out
    assert "6 – 9: the same\n" in out
    assert "result    it sees everything that it should from layer 5 on\n" in out


def test_patterns_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "sliding_window",
        "-p",
        "window=5",
        "--times",
        "2",
        "--then",
        "power",
        "-p",
        "block=1",
        "-p",
        "window=1",
    ]
    status, values = run_json(capsys, "receptive", *arguments, "--len", "64", "--layers", "4", "--path", "0")
    assert status == 0
    assert [(p["pattern"], p["params"].get("window"), p["times"]) for p in values["patterns"]] == [
        ("sliding_window", 5, 2),
        ("power", 1, 1),
    ]
    window, power = (dense(compile_attention(*a, **p), 64, 1, {}) for a, p in CALLS)
    check_reach([layer_of(compile_attention(*a, **p), 64, 1, {}) for a, p in CALLS], [window, power], [0, 0, 1], 63)
    assert [layer["tokens"] for layer in values["layers"][:3]] == [1, 5, 9]
    (way,) = values["paths"]
    assert (way["tokens"][0], way["tokens"][-1]) == (0, 63)
    main(["receptive", *arguments, "--len", "64"])
    assert capsys.readouterr().out.startswith("layers in turn: 2 × sliding_window(window = 5, sinks = 0), power(win")


CALLS: list[tuple[tuple[str], dict[str, Any]]] = [
    (("sliding_window",), {"window": 5}),
    (("power",), {"window": 1, "block": 1}),
]


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(
        capsys, "receptive", "sparse_transformer", "-p", "stride=8", "--len", "64", "--layers", "4"
    )
    assert status == 0
    assert values["heads"] == 8
    assert (values["should_see"], values["wanted"], values["complete_from"], values["final_from"]) == (
        "k <= q",
        64,
        2,
        2,
    )
    assert [layer["layer"] for layer in values["layers"]] == [0, 1, 2, 3, 4]
    assert values["layers"][1] == {"layer": 1, "tokens": 15, "share": 15 / 64, "furthest": 56, "all_within": 8}
    assert values["growth"] == {"tokens": None, "all_within": None}
    assert values["notes"] == ["8 heads: a token counts as seeing what any head sees"]


def test_growth_of_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["neighborhood_2d", "--grid", "64,64", "--layers", "4"]
    _, values = run_json(capsys, "receptive", *arguments)
    assert values["growth"]["tokens"] == {"kind": "polynomial", "step": 18, "degree": 2, "layers": 19}
    assert (values["tokens"], values["should_see"], values["complete_from"]) == (4096, "all", 20)


def test_patterns_that_never_see_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", "document", "--len", "12", "--path", "0"]) == 0
    out = capsys.readouterr().out
    assert "result    it never sees everything that it should: 4 of 12 tokens from layer 1 on\n" in out
    assert "path      0: never reached\n" in out
    assert "note      doc, an example: 3 documents of 4, 4 and 4 tokens\n" in out


def test_layers_beyond_the_limit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.compiler.receptive.fields.MOST_LAYERS", 20)
    assert main(["receptive", "sliding_window", "-p", "window=2", "--len", "500", "--path", "0"]) == 0
    out = capsys.readouterr().out
    assert "result    not within 20 layers\n" in out
    assert "path      0: not within 20 layers\n" in out


def test_long_tables_and_paths_are_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["receptive", "sliding_window", "-p", "window=2", "--len", "500", "--layers", "200", "--path", "400"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line[:5].strip().isdigit() for line in lines) == 40
    assert "    …" in lines
    assert lines[-1].endswith("by 400 → 401 → 402 → 403 → 404 → 405 → … → 495 → 496 → 497 → 498 → 499")


def test_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", "causal", "--len", "1", "--path", "0"]) == 0
    out = capsys.readouterr().out
    assert "1 – 8: the same" in out
    assert "path      0: reaches the query after no layers, for example by 0\n" in out


def test_progress_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.runtime.commands.receptive.OFTEN", -1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert main(["receptive", "sliding_window", "-p", "window=8", "--len", "20"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "receptive: 1 layer, 8 tokens",
        "receptive: 2 layers, 15 tokens",
        "receptive: 3 layers, 20 tokens",
    ]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SPEC"),
        (["causal", "--layers", "0"], "--layers 0: give a whole number, at least 1"),
        (["causal", "--layers", "-3"], "--layers -3: give a whole number, at least 1"),
        (["causal", "--len", "0"], "--len 0: give a whole number, at least 1"),
        (["causal", "--heads", "0"], "--heads 0: give a whole number, at least 1"),
        (["causal", "--times", "0"], "--times 0: give a whole number, at least 1"),
        (["causal", "--len", "8", "--query", "8"], "--query 8: the tokens are 0 to 7"),
        (["causal", "--len", "8", "--query", "-1"], "--query -1: the tokens are 0 to 7"),
        (["causal", "--len", "8", "--path", "9"], "--path 9: the tokens are 0 to 7"),
        (["causal", "--then", "cuasal"], "did you mean `causal`?"),
        (["causal", "--then", "power", "-p", "windw=2"], "did you mean `window`?"),
        (["bigbird"], "the input `random: int[head, rows, drawn]` is missing"),
        (["davit_channel"], "`davit_channel` has keys that are not tokens"),
        (["long_lora", "--len", "6"], "does not meet `require keys % groups == 0`"),
        (
            ["halo", "-p", "height=8", "-p", "width=8", "--then", "halo", "-p", "height=16", "-p", "width=8"],
            "the patterns have different lengths: 64 and 128 tokens",
        ),
        (
            ["neighborhood_2d", "-p", "height=8", "-p", "width=8", "--len", "60"],
            "--len 60: `neighborhood_2d` has 64 tokens with these parameters",
        ),
        (
            ["moa", "-p", "alpha=[0,64]", "-p", "beta=[0,0]", "--then", "moa", "-p", "alpha=[0]", "-p", "beta=[0]"],
            "the patterns' parameters are lists for 1 and 2 heads",
        ),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", *arguments]) == console.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_an_undefined_relation_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", "pattern zero\n    visible q % k == 1\n", "--len", "4"]) == console.FOUND
    assert "division by zero" in capsys.readouterr().err
