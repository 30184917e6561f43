"""The short tier covers every test function and every kind of kernel text, and contains no slow test."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

import tiers
from attnc.runtime.texts.library import library_names
from emitted_kernels import EMITTED, kinds_of
from text_kinds import Kind, smallest_cover


def case_of(name: str) -> str:
    return f"tests/stdlib_patterns/test_every_file.py::test_every_file_by_kernels[{name}-interpreter]"


def test_every_function_keeps_a_case_in_six() -> None:
    names = [f"a.py::one[{i}]" for i in range(13)] + ["a.py::two", "b.py::one[x]"]
    short = tiers.short_names(names)
    assert short <= set(names)
    assert {"a.py::two", "b.py::one[x]"} <= short
    assert sum(name.startswith("a.py::one") for name in short) == 3
    assert short == tiers.short_names(reversed(names))


def test_the_cases_of_a_matrix_spread_over_both_of_its_sides() -> None:
    names = [f"a.py::one[{row}-{column}]" for row in range(40) for column in range(6)]
    short = tiers.short_names(names)
    assert len(short) == 40
    assert {name[-2] for name in short} == set("012345")


@pytest.mark.parametrize("name", ["a.py::one", "a.py::one[x@y]", "a.py::one[x]"])
def test_groups_are_no_part_of_a_name(name: str) -> None:
    assert tiers.plain_name(name) == name
    assert tiers.plain_name(f"{name}@compiling") == name


def test_kept_cases_are_in_the_short_tier() -> None:
    names = [case_of(name) for name in library_names()]
    assert tiers.kept_cases() <= set(names)
    assert tiers.kept_cases() <= tiers.short_names(names)


@pytest.mark.slow
@EMITTED
def test_every_kind_of_kernel_text_is_in_the_short_tier() -> None:
    """If a kind is missing, write `smallest_cover(patterns)` to tests/short_tier.json."""
    patterns: defaultdict[Kind, set[str]] = defaultdict(set)
    for name in library_names():
        for kind in kinds_of(name):
            patterns[kind].add(case_of(name))
    assert len(patterns) > 40
    missing = {kind[0]: sorted(names) for kind, names in patterns.items() if not names & tiers.kept_cases()}
    assert not missing, smallest_cover(patterns)


def test_files_are_units_and_functions_of_long_files() -> None:
    scopes = pytest.importorskip("scopes")
    names = [f"a.py::one[{i}]" for i in range(scopes.MOST_TESTS)] + ["a.py::two", "b.py::one[x::y]", "b.py::two"]
    large = scopes.large_files(names)
    assert large == {"a.py"}
    assert {scopes.unit_of(name, large) for name in names} == {"a.py::one", "a.py::two", "b.py"}


def test_units_with_slow_tests_come_first() -> None:
    scopes = pytest.importorskip("scopes")
    slowest = next(iter(scopes.slow_seconds()))
    assert scopes.estimated_seconds([slowest]) > scopes.estimated_seconds(["a.py::two"] * 2) > 0


def test_durations() -> None:
    """`make durations` writes the file, one tier after the other."""
    measured = json.loads(tiers.DURATIONS.read_text(encoding="utf-8")) if tiers.DURATIONS.exists() else {}
    if not measured.keys() >= {"all", "short"}:
        pytest.skip("the durations of both tiers have not been measured")
    assert len(measured["slowest_all"]) == tiers.LISTED
    assert measured["short"]["seconds"] < 8 * 60
    slow = {name: seconds for name, seconds in measured["slowest_short"].items() if seconds > tiers.MOST_SECONDS}
    assert not slow


@pytest.mark.parametrize("tier", ["short", "all"])
def test_a_run_says_what_it_will_run(tier: str) -> None:
    assert tiers.announcement(tier).startswith(f"tier {tier}: ")
