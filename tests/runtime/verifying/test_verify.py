"""`attnc verify` finds broken executors and relations, and reports what it never compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.cli import main
from attnc.runtime.texts.library import ModuleLoader, find
from attnc.runtime.verifying.accuracy import Error
from attnc.runtime.verifying.bounds import Bounds, BoundScope
from attnc.runtime.verifying.call_cases import CallCase, ShapeRequest, awkward_cases
from attnc.runtime.verifying.clauses import clauses_of
from attnc.runtime.verifying.drawn_inputs import draw
from attnc.runtime.verifying.exercise import Search, look
from attnc.runtime.verifying.hiding import hides_nothing
from attnc.runtime.verifying.scaled_parameters import ScaledChoice, requested_choice, scaled
from attnc.runtime.verifying.verification import ExecutorTrial, Verdict, remedy
from attnc.spec.load import load_program
from attnc.spec.program import BoundProgram

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNKED = """recurrence chunked(chunk: int = 64)
    state S: [dk, dv]
    state old: [dk, dv]
    step old = S if t % chunk == 0 else old
    step S = S + outer(k, v)
    read q @ old
"""

UNITS = """pattern units(block: int = 4, first: int = 0)
    align   end
    select near
        per     a = q // block
        over    b = k // block
        score   dot(mean(a.q), mean(b.k))
        keep    rank < 1
        always  a < first or a == b
    branch side[i in 0 .. 2]
        visible k in near and i < 3
    combine side[0] + side[1]
"""

PARTS = """pattern parts
    align   end
    select near
        score   dot(q, k)
        keep    rank < 4
    branch side[i in 0 .. 2]
        visible {}
    combine side[0] + side[1]
"""


def run_verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["verify", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def bound_of(text: str, **params: object) -> BoundProgram:
    entry = find(text)
    return requested_choice(load_program(entry.source, ModuleLoader(None), entry.name), params, None).bound


# --- broken executors and relations -----------------------------------------------------------------------------------


def broken_mask(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    mask = Attention.mask

    def wrong(self: Attention, *arguments: Any, **options: Any) -> torch.Tensor:
        return change(mask(self, *arguments, **options))

    monkeypatch.setattr(Attention, "mask", wrong)


def test_a_window_one_key_too_long_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_mask(monkeypatch, lambda mask: mask | (mask.roll(-1, -1) & mask.roll(-1, -2)))
    status, values = run_verify(capsys, "sliding_window")
    assert (status, values["agreed"]) == (1, False)
    assert "the evaluator says hidden" in values["diagnostics"][0]["message"]


def test_a_missing_window_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A causal triangle replaces the window: at 137 tokens the pattern's default window would hide no pair."""
    broken_mask(monkeypatch, lambda mask: torch.ones_like(mask).tril(mask.shape[-1] - mask.shape[-2]))
    status, values = run_verify(capsys, "sliding_window")
    assert (status, values["agreed"]) == (1, False)
    assert values["hidden_pairs_compared"] > 0


def test_a_selection_of_too_many_blocks_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_mask(monkeypatch, lambda mask: torch.ones_like(mask).tril(mask.shape[-1] - mask.shape[-2]))
    status, values = run_verify(capsys, "moba")
    assert status == 1
    assert any("the evaluator says hidden" in item["message"] for item in values["diagnostics"])


def test_a_wrong_branch_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern without a mask is compared by its outputs."""
    reference = Attention.reference

    def wrong(self: Attention, q: Any, k: Any, v: Any, **inputs: Any) -> Any:
        return reference(self, q, k, v.roll(1, -2), **inputs)

    monkeypatch.setattr(Attention, "reference", wrong)
    status, values = run_verify(capsys, "hybrid_window_linear")
    assert status == 1
    assert any("the evaluator's out differs" in item["message"] for item in values["diagnostics"])


@pytest.mark.parametrize(
    "mutant",
    ["k <= q and q - k < window + 1", "k <= q", "k <= q and q - k < window and k != 3"],
    ids=["one key too many", "a clause is dropped", "one key too few"],
)
def test_an_executor_with_another_relation_is_found(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mask is right; only the cpu executor computes another relation."""
    text = "pattern own(window: int = 4)\n    align   end\n    visible {}\n"
    file = tmp_path / "own.attn"
    file.write_text(text.format("k <= q and q - k < window"))
    wrong = compile_attention(text.format(mutant), window=4)
    call = Attention.__call__
    monkeypatch.setattr(Attention, "__call__", lambda _, *operands, **given: call(wrong, *operands, **given))
    status, values = run_verify(capsys, str(file))
    assert (status, values["agreed"]) == (1, False)
    assert values["diagnostics"][0]["message"].startswith("cpu float32: out is off by")


# --- parts that were not compared -------------------------------------------------------------------------------------


def test_a_clause_that_no_pair_exercises_fails(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_verify(capsys, "sliding_window", "-p", "window=50", "--len", "20")
    assert (status, values["agreed"]) == (1, False)
    assert values["lengths"] == ["20"]
    assert [c["text"] for c in values["clauses"] if not (c["exercised"] or c["reason"])] == ["q - k < window"]
    assert "`q - k < window` (visible) was never false" in values["diagnostics"][0]["message"]


def test_an_unproved_relation_without_hidden_pairs_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wide.attn"
    file.write_text("pattern wide\n    align   end\n    visible q - k < 4 or q - k >= 4\n")
    status, values = run_verify(capsys, str(file))
    assert (status, values["hidden_pairs_compared"], values["hides_nothing"]) == (1, 0, "")
    assert "no hidden pair was compared" in values["diagnostics"][-1]["message"]


def test_a_reset_that_never_happens_is_not_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At token 0 the state is empty, so chunks of 64 tokens change no call of 12 tokens."""
    file = tmp_path / "chunked.attn"
    file.write_text(CHUNKED)
    status, values = run_verify(capsys, str(file), "--len", "12")
    assert (status, values["agreed"]) == (1, False)
    assert "`t % chunk == 0` (step) was never true" in values["diagnostics"][0]["message"]
    status, values = run_verify(capsys, str(file), "-p", "chunk=5", "--dtype", "float32")
    assert (status, values["params"]) == (0, {"chunk": 5})
    assert [c["exercised"] for c in values["clauses"]] == [True]


STEP = """recurrence own
    input x: int[{}]
    state S: [dk, dv]
    step S = S if {} else S + outer(k, v)
    read q @ S
"""


@pytest.mark.parametrize(
    ("dims", "condition", "shape"),
    [
        ("batch, token", "x == 3", "length 12, batch 1, heads 2/1"),
        ("batch, token", "x > 100 or x % 8 == 5", "length 12, batch 1, heads 2/1"),
        ("batch, token", "0 > x", "length 12, batch 1, heads 2/1"),
        ("batch", "x >= 3", "length 12, batch 2, heads 2/1"),
        ("head", "x != 7", "length 12, batch 1, heads 2/1"),
        ("batch, token", "head != 5", "length 12, batch 1, heads 7/1"),
        ("batch, token", "kv_head != 1", "length 12, batch 1, heads 3/3"),
        ("batch, token", "head < 5 and x == 3", "length 12, batch 1, heads 7/1"),
        ("batch, token", "t % 97 == 96", "length 99, batch 1, heads 2/1"),
    ],
)
def test_a_call_is_found_for_constants_of_the_text(dims: str, condition: str, shape: str) -> None:
    """The search chooses inputs that contain the constants, and as many heads and tokens as conditions need."""
    outcome = Search(lambda _: None, ShapeRequest()).run(ScaledChoice(bound_of(STEP.format(dims, condition))))
    assert outcome is not None and outcome.is_complete
    assert all(clause.is_exercised for clause in outcome.clauses)
    assert str(outcome.case).startswith(shape)


@pytest.mark.parametrize(
    ("condition", "requested", "says"),
    [
        ("head != 5", ShapeRequest(heads=4), "; use --heads 7"),
        ("t % 97 == 96", ShapeRequest(length=13), "; use --len 99 or more"),
        ("t != 0", ShapeRequest(length=13), "; use another --len"),
        (
            "x == 3",
            ShapeRequest(length=1),
            "; no example of `x` exercises it: compare a call of your own with `.reference`",
        ),
    ],
)
def test_the_remedy_fits_the_clause(condition: str, requested: ShapeRequest, says: str) -> None:
    outcome = Search(lambda _: None, requested).run(ScaledChoice(bound_of(STEP.format("batch, token", condition))))
    assert outcome is not None
    (clause,) = [clause for clause in outcome.clauses if not clause.is_settled]
    assert remedy(outcome, clause) == says


def test_a_step_of_an_input_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.attn"
    file.write_text(STEP.format("batch, token", "x == 3"))
    status, values = run_verify(capsys, str(file), "--len", "9", "--dtype", "float32")
    assert (status, values["agreed"], values["tokens_compared"]) == (0, True, 18)


def test_the_reference_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Dense torch of anything but plain attention is the reference executor itself, so it is no second opinion."""
    executors = []
    for name in ("causal", "alibi"):
        status, values = run_verify(capsys, name, "--len", "9")
        assert status == 0
        executors.append({e["executor"] for e in values["errors"]})
    assert executors == [{"reference", "cpu"}, {"cpu"}]


def test_uncompared_parts_are_missing() -> None:
    bound = bound_of("causal")
    verdict = Verdict(look(ScaledChoice(bound), CallCase(4, 4, 1, 1, 1, 4, 4)), is_plain=False, pairs=16, hidden=6)
    case = verdict.look.case
    verdict.errors.append(ExecutorTrial("cpu", "float16", case, Error("dq", 5.0, float("inf"), float("inf"))))
    assert not verdict.agrees
    assert verdict.missing == [
        "dq in float16 was compared with nothing, because torch's result is not finite",
        "no output was compared with the evaluator",
    ]


def test_options_without_a_call_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "block_diffusion", "--len", "13"]) == 2
    assert "`block_diffusion` rejects calls of this length" in capsys.readouterr().err


def test_the_text_names_what_was_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "sliding_window", "-p", "window=50", "--len", "20"]) == 1
    out = capsys.readouterr().out
    assert "visible q - k < window  never false" in out
    assert out.endswith("sliding_window: NOT VERIFIED: something was never compared\n")


# --- sizes and options ------------------------------------------------------------------------------------------------


def test_default_parameters_are_kept_if_possible(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_verify(capsys, "sliding_window", "-p", "window=20", "-p", "sinks=2")
    assert (status, values["scaled"], values["params"]) == (0, "", {"window": 20, "sinks": 2})
    assert values["lengths"][0] == "32"
    assert all(clause["exercised"] for clause in values["clauses"])


def test_large_parameters_are_scaled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "sliding_window", "-p", "window=40000"]) == 0
    out = capsys.readouterr().out
    assert "parameters scaled down (divided by 2048): window = 19 in place of window = 40000" in out


def test_options_set_the_shape(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_verify(capsys, "causal", "--len", "9", "--heads", "4", "--kv-heads", "2", "--dtype", "float16")
    assert status == 0
    assert values["shapes"] == ["length 9, batch 1, heads 4/2, dims 4/4"]
    assert {e["dtype"] for e in values["errors"] if e["executor"] == "cpu"} == {"float16"}


def test_a_given_grid_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_verify(capsys, "neighborhood_2d", "--grid", "4,5", "-p", "window=3")
    assert status == 0
    assert (values["params"]["height"], values["params"]["width"], values["scaled"]) == (4, 5, "")
    assert set(values["lengths"]) == {"20"}


@pytest.mark.parametrize(
    ("option", "says"),
    [(["--len", "0"], "--len 0: give a whole number"), (["--heads", "3", "--kv-heads", "2"], "must be a multiple")],
)
def test_options_are_checked(option: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "causal", *option]) == 2
    assert says in capsys.readouterr().err


# --- components of verify ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "truth"),
    [
        ("k < 0", False),
        ("q >= 0", None),
        ("q < queries", None),
        ("q + queries >= keys", True),
        ("k <= q + queries", True),
        ("k >= 0", True),
        ("q >= keys", False),
        ("head < heads", True),
        ("kv_head >= kv_heads", False),
        ("k % 4 < 5", True),
        ("abs(q - k) < 0", False),
        ("q >= keys - 1", None),
        ("k <= q", None),
        ("k % 4 < 3", None),
        ("k <= q or not false", True),
        ("min(q, 3) > 3", False),
        ("q % 4 // min(keys, 2) < 4", True),
        ("q % 4 // min(keys, 1/2) < 4", None),
    ],
)
def test_bounds_decide_clauses(line: str, truth: bool | None) -> None:
    bound = bound_of(f"pattern p\n    align   end\n    visible {line}\n")
    assert Bounds(bound).truth(bound.program.visible[0], BoundScope()) is truth


@pytest.mark.parametrize(
    ("align", "line", "truth"),
    [
        ("align   start", "q < keys", None),
        ("align   start", "q >= 0 and q < queries", True),
        ("", "q < keys", None),
        ("", "q >= 0", True),
        ("", "q < keys or k > q", True),
    ],
)
def test_bounds_of_queries_follow_align(align: str, line: str, truth: bool | None) -> None:
    """Without `align`, a relation that reads both positions requires as many queries as keys."""
    bound = bound_of(f"pattern p\n    {align}\n    visible {line}\n")
    assert Bounds(bound).truth(bound.program.visible[0], BoundScope()) is truth


@pytest.mark.parametrize(
    ("align", "line"),
    [("end", "q >= 0"), ("end", "k <= q or q < 0"), ("start", "q < keys"), ("start", "k <= q and q < keys")],
)
def test_more_queries_than_keys_show_a_clause(
    align: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.attn"
    file.write_text(f"pattern own\n    align   {align}\n    visible {line}\n")
    status, values = run_verify(capsys, str(file), "--dtype", "float32")
    assert (status, values["hides_nothing"]) == (0, "")
    assert "24→12" in values["lengths"][0] or "32→16" in values["lengths"][0]
    assert all(clause["exercised"] for clause in values["clauses"])


@pytest.mark.parametrize("name", ["causal", "moba", "fox", "graphormer"])
def test_awkward_shapes_have_more_queries_if_the_pattern_allows(name: str) -> None:
    """`fox` reads a gate at the query, which does not exist before key 0; `graphormer` has no `align`."""
    cases = awkward_cases(bound_of(name), None, ShapeRequest())
    assert any(case.n_q > case.n_k for case in cases) == (name in ("causal", "moba"))


def test_bounds_cover_units_and_indices() -> None:
    """`a < first` with `first = 0` is never true; `i < 3` for branches 0 and 1 always is."""
    bound = bound_of(UNITS)
    reasons = {clause.text: clause.reason for clause in clauses_of(bound)}
    decided = "the ranges of indices and sizes decide"
    assert reasons["a < first"] == f"always false: {decided}"
    assert reasons["i < 3"] == f"always true: {decided}"
    assert not reasons["a == b"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("(k in near) == (i == 1)", "each key is seen by one of the branches `side`"),
        ("k in near if i == 1 else k not in near", ""),
        ("(k in near and k % 2 == 0) != (i == 0)", "each key is seen by one of the branches `side`"),
        ("k in near or k % 2 == i", ""),
        ("k in near and i == 1", ""),
        ("(k in near) == (i == 1) and k <= q", ""),
    ],
)
def test_branches_that_see_every_key_together(line: str, says: str) -> None:
    """A condition that is written twice counts as two conditions: a cover that is not proved is not claimed."""
    assert hides_nothing(bound_of(PARTS.format(line))) == says


def test_grids_cover_constants_of_the_relation() -> None:
    choice = requested_choice(load_program(find("radial").source, ModuleLoader(None), "radial"), {}, None)
    grids = [(c.bound.values["frames"], c.bound.values["per_frame"]) for c in islice(scaled(choice, frozenset()), 8)]
    assert (4, 128) in grids


def test_scaled_parameters_meet_requirements() -> None:
    choice = requested_choice(load_program(find("sliding_tile").source, ModuleLoader(None), "sliding_tile"), {}, None)
    assert choice.how == "preset hunyuan"
    first = next(scaled(choice, frozenset()))
    assert first.bound.values != choice.bound.values
    fixed = next(scaled(choice, frozenset({"frames"})))
    assert fixed.bound.values["frames"] == 30


def test_sizes_of_inputs_are_the_least_that_the_pattern_allows() -> None:
    bound = bound_of("sparse_d", block=4)
    inputs = draw(bound, CallCase(10, 14, 1, 2, 1, 4, 4))
    assert inputs["map"].tensor.shape == (1, 2, 3, 4)
