"""`attnc verify` of the library's patterns: each clause is exercised, and hidden pairs are compared."""

from __future__ import annotations

import json

import pytest

from attnc.runtime.cli import main
from attnc.runtime.library import library_names

REASONS = {
    "a recurrence updates a state token by token: there are no pairs to hide",
    "the keys are not tokens",
    "the pattern sees every key",
}
"""The reasons that a pattern without hidden pairs may give."""

NOT_RUN = {
    "radial": "`gap % (128 // reach) == 0` needs five frames of 64 tokens, which the evaluator rounds too slowly",
    "rectified": "`first = 0` decides `a < first`, which verify does not see; no pair is hidden by all branches",
    "routing_transformer": "`q in asked[c]` of the branch `memory` is asked only of rows for which it holds",
}
"""Patterns that verify refuses to call verified (exit 1), and why."""

COVERED = sorted({*library_names()} - NOT_RUN.keys())


def test_names_that_are_not_run_are_patterns() -> None:
    assert NOT_RUN.keys() <= {*library_names()}


def test_what_is_not_verified_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    """The quickest of `NOT_RUN`; where this passes, it belongs to the others."""
    assert main(["verify", "routing_transformer", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert any("was never" in item["message"] for item in found["diagnostics"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", COVERED)
def test_verify(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["verify", name, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0, [item["message"] for item in found["diagnostics"]]
    assert found["agreed"]
    assert found["lengths"]
    reason = found["hides_nothing"]
    assert found["hidden_pairs_compared"] > 0 or reason in REASONS or reason.endswith("` sees every key")
    assert found["hidden_pairs_compared"] <= found["pairs_compared"]
    assert all(clause["exercised"] or clause["reason"] for clause in found["clauses"])
    assert found["pairs_compared"] or found["rows_compared"] or found["tokens_compared"]
