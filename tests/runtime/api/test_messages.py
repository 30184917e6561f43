"""Messages that recognise common mistakes: a misspelt option, a None, tensors in another layout, a bare count."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc import ArgumentError, ArgumentTypeError, LayoutWarning, SpecError, compile_attention
from attnc.runtime.cli import main

KEPT = """pattern p(topk: int = 4, block: int = 8)
    align end
    select chosen
        over b = k // block
        score dot(q, mean(b.k))
        from b.end <= q
        keep {keep}
    visible k in chosen and k <= q
"""
STATE = "recurrence r\n    state S: [dk, dv]\n    step S = {value}\n    read q @ S\n"


def zeros_of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def test_none_is_named_in_the_message() -> None:
    with pytest.raises(SpecError) as caught:
        compile_attention("sliding_window", window=None)
    assert "`window` is None, which is not a value" in str(caught.value)
    assert "its default is 4096" in str(caught.value)
    assert "help: omit `window` to use its default, or give `window`, an int" in str(caught.value)
    with pytest.raises(SpecError) as caught:
        compile_attention("neighborhood_2d", height=None, width=9)
    assert "`height` is None, which is not a value" in str(caught.value)
    assert "it has no default" in str(caught.value)


@pytest.mark.parametrize("keep", ["topk", "4", "topk * 2"])
def test_a_bare_count_in_keep_suggests_a_comparison(keep: str) -> None:
    with pytest.raises(SpecError) as caught:
        compile_attention(KEPT.format(keep=keep))
    assert f"help: `rank` is 0 for the best score: write `rank < {keep}`" in str(caught.value)
    compile_attention(KEPT.format(keep=f"rank < {keep}"))


@pytest.mark.parametrize(
    ("written", "intended"),
    [("sclae", "scale"), ("return_lsee", "return_lse"), ("cu_seqlen", "cu_seqlens"), ("dc", "doc")],
)
def test_a_misspelt_option_is_recognised(written: str, intended: str) -> None:
    attend, q = compile_attention("document"), zeros_of(1, 2, 8, 4)
    inputs: dict[str, Any] = {"doc": torch.zeros(1, 8).long(), written: 1}
    for call in (attend, attend.reference):
        with pytest.raises(ArgumentTypeError, match=f"has no input `{written}`: did you mean `{intended}`"):
            call(q, q, q, **inputs)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("S + outer(v, k)", "S + outer(k, v)"), ("outer(2 * v, k) + S", "outer(k, 2 * v) + S")],
)
def test_an_outer_product_the_other_way_round(wrong: str, right: str) -> None:
    with pytest.raises(SpecError) as caught:
        compile_attention(STATE.format(value=wrong))
    product = right.replace("S + ", "").replace(" + S", "")
    assert f"the axes are the other way round: write `{product}`" in str(caught.value)
    compile_attention(STATE.format(value=right))


# --- tensors in the order of flash-attention -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (zeros_of(2, 128, 8, 16), zeros_of(2, 128, 2, 16)),  # grouped heads
        (zeros_of(1, 1024, 8, 16), zeros_of(1, 1024, 8, 16)),  # more heads than any model has
    ],
)
def test_tensors_by_tokens_first_are_recognised(q: torch.Tensor, k: torch.Tensor) -> None:
    attend = compile_attention("pattern p\n    align start\n    visible abs(q - k) < 4\n")
    with pytest.warns(LayoutWarning, match=r"if the tensors are \(batch, tokens, heads, .*transpose\(1, 2\)") as warned:
        attend(q, k, k)
    assert {warning.filename for warning in warned} == {__file__}


def test_an_error_about_heads_mentions_the_layout() -> None:
    attend = compile_attention("causal")
    with pytest.raises(ArgumentError, match=r"q has 100 heads .*if the tensors are \(batch, tokens, heads"):
        attend(zeros_of(1, 100, 12, 16), zeros_of(1, 200, 4, 16), zeros_of(1, 200, 4, 16))
    with pytest.raises(ArgumentError, match=r"q has 6 heads .*multiple of kv heads$"):
        attend(zeros_of(1, 6, 64, 16), zeros_of(1, 4, 64, 16), zeros_of(1, 4, 64, 16))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n_q", "n_k"), [(32, 32, 5, 5), (128, 128, 1, 700), (64, 8, 16, 16), (256, 256, 8, 8)]
)
def test_usual_shapes_give_no_warning(heads: int, kv_heads: int, n_q: int, n_k: int) -> None:
    k = zeros_of(1, kv_heads, n_k, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_attention("causal")(zeros_of(1, heads, n_q, 8), k, k)


def test_the_warning_is_public() -> None:
    assert issubclass(attnc.LayoutWarning, UserWarning)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_no_entries(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path))
    assert main(["cache", "show"]) == 0
    assert main(["cache", "clear"]) == 0
    out = capsys.readouterr().out
    assert "no entries" in out
    assert "entrys" not in out
