"""`attnc same` compares pairs and computed results, as its sentence states; each verdict can be checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import UnsupportedError, compile_attention
from attnc.compiler.comparison.equality import normal_forms
from attnc.compiler.lowering.lower import lower
from attnc.runtime.cli import main
from attnc.runtime.verifying.verdicts import Sameness, decide
from command_calls import run_json

BY_COUNT = "pattern p\n    visible heads + (q - k) != k\n"
ALIBI = "pattern e\n    visible 0 <= q - k < 9\n    score scale * dot(q, k) - 0.5 * (q - k)\n"
STATE = """pattern h
    branch near
        visible k <= q
    branch far
        state S: [dk, dv]
        step S = S + outer(k, v)
        read scale * q @ S
    combine near + far
"""
TWO = """pattern t
    branch a
        visible 0 <= q - k < 3
    branch b
        visible k <= q
    combine {}
"""
SQUARES = "pattern c\n    visible q * q >= k * k\n"


def sameness_of(
    spec: str, other_spec: str, *, relation_only: bool = False, heads: int | None = None, **params: Any
) -> Sameness:
    patterns = compile_attention(spec), compile_attention(other_spec, **params)
    return decide(*patterns, relation_only=relation_only, heads=heads)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 1, 3, 6])
def test_a_witness_holds_for_the_reported_number_of_heads(
    heads: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if heads is None else ["--heads", str(heads)]
    status, values = run_json(capsys, "same", BY_COUNT, "full", *options)
    assert (status, values["equal"], values["heads"]) == (1, False, heads or 8)
    q, k, head = (values["witness"][name] for name in ("q", "k", "head"))
    counts = {"heads": values["heads"], "kv_heads": values["heads"] // values["group"]}
    masks = [compile_attention(spec).mask(values["length"], head=head, **counts) for spec in (BY_COUNT, "full")]
    assert masks[0][q, k] != masks[1][q, k]


def test_the_text_names_the_number_of_heads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", BY_COUNT, "full"]) == 1
    assert "differ: among 5 tokens and 8 heads, in head 0, query 0 sees key 4 in full" in capsys.readouterr().out
    assert main(["same", BY_COUNT, BY_COUNT.replace("heads", "3"), "--heads", "3"]) == 0
    assert ", for 3 heads" in capsys.readouterr().out


def test_heads_that_require_refuses_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    four = "pattern a\n    require heads == 4\n    visible head < heads or q == k\n"
    assert main(["same", four, "full"]) == 2
    assert "`require` refuses 8 heads: pass another number of heads" in capsys.readouterr().err
    assert main(["same", four, "full", "--heads", "4"]) == 0
    assert main(["same", "full", "full", "--heads", "0"]) == 2
    lists = ["-p", "alpha=[0,64]", "-p", "beta=[0.5,0]", "-q", "alpha=[0,64]", "-q", "beta=[0.5,0]"]
    assert main(["same", "moa", "moa", *lists, "--heads", "4"]) == 2
    assert "heads is 4: the patterns have per-head lists for 2 heads" in capsys.readouterr().err


# --- scores, weights and values --------------------------------------------------------------------------------------


def test_equal_pairs_with_other_scores_differ(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [ALIBI, "sliding_window", "-q", "window=9"]
    assert main(["same", *arguments]) == 1
    out = capsys.readouterr().out
    assert "equal" not in out
    assert "e and sliding_window have the same visible pairs for every length" in out
    assert "they differ in scores: among 24 tokens and 8 heads, in head" in out
    status, values = run_json(capsys, "same", *arguments)
    assert (status, values["equal"], values["relation_equal"], values["differs_in"]) == (1, False, True, ["scores"])
    assert set(values["witness"]) == {"q", "k", "head"}
    assert main(["same", *arguments, "--relation"]) == 0
    assert "have the same visible pairs for every length" in capsys.readouterr().out
    status, values = run_json(capsys, "same", *arguments, "--relation")
    assert (status, values["equal"], values["relation_equal"], values["compared"]) == (0, True, True, ["relation"])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("score 2 * scale * dot(q, k)", "scores"),
        ("weights softmax(score, extra = 1)", "weights"),
        ("value 2 * v", "values"),
        ("value k", "values"),
    ],
)
def test_every_part_is_compared(line: str, part: str) -> None:
    verdict = sameness_of(f"pattern c\n    visible k <= q\n    {line}\n", "causal")
    assert (verdict.equal, verdict.relation_equal, verdict.differs_in) == (False, True, (part,))


def test_a_reported_row_differs_in_the_reference() -> None:
    verdict = sameness_of("alibi", "causal")
    row = verdict.row
    assert row is not None
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((1, verdict.heads, row.length, 8), generator=draw, dtype=torch.float64) for _ in range(3))
    outs = [compile_attention(spec).reference(q, k, v)[0, row.head, row.q] for spec in ("alibi", "causal")]
    assert float((outs[0] - outs[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(("score", "equal"), [("dot(k, q) * scale", True), ("0.5 * (scale * dot(q, k)) * 2", None)])
def test_rewritten_scores_are_equal_or_undecided(score: str, equal: bool | None) -> None:
    verdict = sameness_of(f"pattern c\n    visible k <= q\n    score {score}\n", "causal")
    assert (verdict.equal, verdict.relation_equal, verdict.row) == (equal, True, None)


def test_equality_in_random_calls_alone_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    far = "pattern c\n    visible k <= q\n    score scale * dot(q, k) - max(q - k - 1000, 0)\n"
    assert main(["same", far, "causal"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("undecided whether c and causal are the same: they have the same visible pairs for ")
    assert "the normal forms of their scores differ; results are equal in drawn calls of 24 tokens" in out
    status, values = run_json(capsys, "same", far, "causal")
    assert (status, values["equal"], values["relation_equal"], values["equal_up_to"]) == (2, None, True, 24)


def test_inputs_with_other_names_differ() -> None:
    text = "pattern p\n    input {0}: real[head]\n    visible k <= q\n    score scale * dot(q, k) * {0}\n"
    first, second = text.format("a"), text.format("b")
    assert sameness_of(first, first).equal
    assert sameness_of(first, second).equal is False


def test_normal_forms_ignore_names() -> None:
    bound = lower(compile_attention(STATE).bound)
    renamed = STATE.replace("far", "past").replace("near", "local").replace("S", "M").replace("pattern h", "pattern g")
    assert normal_forms(bound) == normal_forms(lower(compile_attention(renamed).bound))


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_equality_up_to_a_length_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "causal", SQUARES]) == 2
    out = capsys.readouterr().out
    assert "are equal" not in out
    assert "they have the same visible pairs for all lengths up to 2,048; longer ones are not proved" in out
    for options in ([], ["--relation"]):
        status, values = run_json(capsys, "same", "causal", SQUARES, *options)
        assert (status, values["equal"], values["relation_equal"], values["equal_up_to"]) == (2, None, None, 2048)


# --- selections, inputs, documents, states ---------------------------------------------------------------------------


def test_a_selection_is_not_called_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "moba", "causal", "--relation"]) == 2
    err = capsys.readouterr().err
    assert "`moba` selects keys by content (`chosen`): its pairs differ from call to call" in err
    assert "input" not in err
    assert sameness_of("moba", "moba").equal


def test_selections_are_compared_in_random_calls() -> None:
    small = compile_attention("moba", block=4, topk=2)
    assert decide(small, compile_attention("moba", block=4, topk=3)).equal is False
    assert decide(small, compile_attention("causal")).equal is False


def test_relations_that_read_inputs_differ_in_a_random_call(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = sameness_of("prefix_lm", "causal", relation_only=True)
    assert verdict.equal is False
    assert verdict.witness is not None
    turned = "pattern p\n    input prefix: int[batch]\n    visible not (k >= prefix and k > q)\n"
    verdict = sameness_of("prefix_lm", turned)
    assert (verdict.equal, verdict.relation_equal) == (None, None)
    assert "`prefix_lm` reads inputs" in verdict.undecided
    assert sameness_of("prefix_lm", "prefix_lm", relation_only=True).equal
    assert main(["same", "prefix_lm", turned]) == 2
    assert "the normal forms of their relation differ; `prefix_lm` reads inputs" in capsys.readouterr().out


def test_an_input_without_an_example_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "rectified", "causal"]) == 2
    err = capsys.readouterr().err
    assert "not decided, because no call can be drawn: the input `neighbour: bool[rows, cols]` is missing" in err
    assert "--input" not in err


def test_keys_other_than_tokens_are_compared_in_random_calls() -> None:
    verdict = sameness_of("davit_channel", "causal")
    assert (verdict.equal, verdict.relation_equal) == (False, None)
    assert verdict.differs_in == ("scores", "values", "branches")
    with pytest.raises(UnsupportedError, match="keys that are not tokens"):
        sameness_of("davit_channel", "causal", relation_only=True)


def test_documents_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "document", "causal"]) == 1
    assert "with a border of documents before token 1, query 1 sees key 0 in causal" in capsys.readouterr().out
    _, values = run_json(capsys, "same", "document", "causal", "--relation")
    q, k = values["witness"]["q"], values["witness"]["k"]
    doc = (torch.arange(values["length"]) >= values["border"]).long()[None]
    assert compile_attention("causal").mask(values["length"])[q, k]
    assert not compile_attention("document").mask(values["length"], doc=doc)[0, q, k]
    named = "pattern d\n    align end\n    input doc: int[batch, token]\n    documents doc\n    visible not q < k\n"
    assert sameness_of("document", named).equal
    diagonal = "pattern d\n    input doc: int[batch, token]\n    documents doc\n    visible q == k\n"
    assert sameness_of(diagonal, "pattern d\n    visible q == k\n").equal is None  # no document border hides a pair


def test_a_state_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", STATE, "causal"]) == 1
    assert "h and causal differ in branches and states" in capsys.readouterr().out
    assert main(["same", STATE, "causal", "--relation"]) == 2
    assert "`h` has a branch with a state, `far`, which has no pairs" in capsys.readouterr().err
    assert sameness_of(STATE, STATE).equal
    assert sameness_of(STATE, STATE.replace("S + outer", "0.5 * S + outer")).differs_in == ("states",)
    assert sameness_of("retention", "retention").equal


@pytest.mark.parametrize(
    ("spec", "message"), [("retention", "is a recurrence"), ("hybrid_window_linear", "with a state")]
)
def test_a_state_has_no_pairs_to_compare(spec: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", spec, spec, "--relation"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "which has no pairs; compare everything that the patterns compute" in err
    assert sameness_of(spec, spec).equal


def test_a_pair_is_visible_in_any_branch() -> None:
    assert sameness_of(TWO.format("a + b"), "causal", relation_only=True).equal
    assert sameness_of(TWO.format("a + b"), "causal").equal is False
    assert sameness_of(TWO.format("a + b"), TWO.format("b + a")).equal


def test_branches_are_compared_one_by_one() -> None:
    narrow, wider = TWO.format("a + b"), TWO.format("a + b").replace("< 3", "< 4")
    assert sameness_of(narrow, wider, relation_only=True).equal  # the other branch shows the pair
    assert sameness_of(narrow, wider).equal is False
