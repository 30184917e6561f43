"""Warnings about patterns that compile: each is given where it is due, and never for the library."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from attnc import PatternWarning, compile_attention
from attnc.compiler.warnings.pattern_warnings import warnings_of
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.source import SourceFile


def found(body: str, header: str = "", **params: object) -> list[Diagnostic]:
    source = SourceFile("p.attn", f"pattern p{header}\n{body}")
    return warnings_of(bind(load_program(source, lambda name, asking: None), params))


def said(body: str, header: str = "", **params: object) -> list[tuple[str, str]]:
    return [(d.code, d.message) for d in found(body, header, **params)]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("visible 0 < q - k < 5", "W001", "query 0 sees no key (1 of 192 queries)"),
        ("visible k % 7 == 0 and 3 <= q - k < 9", "W001", "query 0 sees no key (30 of 192 queries)"),
        (
            "visible q - k < 16",
            "W002",
            "every later key is visible, but only 15% of the earlier keys (among 192 tokens)",
        ),
        ("visible k <= q and (q * k) % 3 < 2", "W004", "a product reaches 1,099,509,530,625 at 1,048,576 tokens"),
        ("visible k <= q and k >= 0", "W006", "always true: `k` is at least 0, `0` is 0"),
        ("visible k <= q or q % 4 == 5", "W006", "always false: `q % 4` is between 0 and 3, `5` is 5"),
        ("visible k <= q\n    score scale * q * k", "W008", "the score reads no vectors"),
        ("visible k <= q\n    let far = q - k\n    score -0.5 * abs(far)", "W008", "the score reads no vectors"),
        ("visible k <= q and not k + 1 < 1", "W006", "always false: `k + 1` is at least 1, `1` is 1"),
    ],
)
def test_a_warning(line: str, code: str, says: str) -> None:
    (warning,) = found(f"    {line}\n")
    assert (warning.code, warning.severity) == (code, Severity.WARNING)
    assert warning.message.startswith(says)
    assert warning.help
    assert warning.primary.span.line == 2 + line.count("\n")


@pytest.mark.parametrize(
    "line",
    [
        "visible k <= q",
        "visible 0 <= q - k < 16",
        "visible abs(q - k) < 16",
        "visible true",
        "visible k >= q",
        "visible q // 64 * (k // 64) < 5 or q == k",
        "visible k <= q and k % 2 <= q % 2",
        "visible k <= q\n    score scale * dot(q, k) - 0.5 * (q - k)",
        "visible k <= q\n    input table: real[64]\n    score table[(q - k) % 64]",
        "visible k <= q\n    score 0",
        "visible k <= q\n    score 1 if q == k else 0",
    ],
)
def test_no_warning(line: str) -> None:
    assert said(f"    {line}\n") == []


def test_a_default_that_switches_off_is_no_warning() -> None:
    assert said("    visible k <= q and (k < sinks or q - k < 9)\n", "(sinks: int = 0)") == []


def test_grids_are_sampled_completely() -> None:
    grid = "    tokens  y: 6, x: side\n    visible abs(q.y - k.y) <= 1 and q.x > k.x\n"
    ((code, message),) = said(grid, "(side: int = 8)")
    assert (code, message) == ("W001", "query 0 sees no key (6 of 48 queries): its output is 0")
    assert said(grid, "(side: int = 8)", side=4000) == []  # too large for a sample


def test_patterns_with_inputs_or_branches_are_not_sampled() -> None:
    assert said("    input   doc: int[token]\n    visible doc[q] < doc[k]\n") == []
    branches = "    branch a\n        visible 0 < q - k < 3\n    branch b\n        visible q == k\n    combine a + b\n"
    assert said(branches) == []


# --- warnings of `compile_attention` ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("neighborhood_1d", {"window": 8}, "window of 8 is not centred: it has 4 before the query and 3 after it"),
        ("neighborhood_2d", {"height": 9, "width": 9, "window": [7, 4]}, "window of 4 is not centred"),
        (
            "neighborhood_2d",
            {"height": 9, "width": 9, "window": [7, 8], "stride": [1, 3]},
            "window of 8 is not centred",
        ),
        ("neighborhood_3d", {"frames": 9, "height": 9, "width": 9, "window": [4, 3, 3]}, "window of 4 is not centred"),
    ],
)
def test_even_windows_are_warned_of_when_compiled(name: str, params: dict[str, Any], says: str) -> None:
    with pytest.warns(PatternWarning, match=rf"`{name}`, .*{name}\.attn:\d+: .*{says}.*\(W009\)") as told:
        compile_attention(name, **params)
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("neighborhood_1d", {"window": 7}),
        ("neighborhood_1d", {"window": 8, "causal": True}),  # the window ends at the query
        ("neighborhood_1d", {"window": 8, "stride": 4}),  # the window is centred on the four queries that share it
        ("neighborhood_2d", {"height": 8, "width": 9, "window": [8, 7]}),  # the window is the whole axis
        ("sliding_window", {"window": 8}),
    ],
)
def test_windows_without_a_warning(name: str, params: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_attention(name, **params)


def test_a_score_of_positions_is_warned_of_when_compiled() -> None:
    with pytest.warns(PatternWarning, match=r"`p`, <spec>:3: the score reads no vectors.*`dot\(q, k\)`.*\(W008\)"):
        compile_attention("pattern p\n    visible k <= q\n    score scale * q * k\n")
