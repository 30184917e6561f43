"""`attnc verify` of the library's patterns: each clause is exercised, and hidden pairs are compared."""

from __future__ import annotations

import json

import pytest

from attnc.runtime.cli import main
from attnc.runtime.texts.library import library_names

REASONS = {
    "a recurrence updates a state token by token: there are no pairs to hide",
    "the keys are not tokens",
    "the pattern sees every key",
    "each key is seen by one of the branches `pooled`",
}
"""The reasons that a pattern without hidden pairs may give."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", library_names())
def test_verify(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["verify", name, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0, [item["message"] for item in report["diagnostics"]]
    assert report["agreed"]
    assert report["lengths"]
    reason = report["hides_nothing"]
    assert report["hidden_pairs_compared"] > 0 or reason in REASONS or reason.endswith("` sees every key")
    assert report["hidden_pairs_compared"] <= report["pairs_compared"]
    assert all(clause["exercised"] or clause["reason"] for clause in report["clauses"])
    assert report["pairs_compared"] or report["rows_compared"] or report["tokens_compared"]
