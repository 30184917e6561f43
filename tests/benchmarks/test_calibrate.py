"""The microbenchmarks that the simulator's rates come from."""

from __future__ import annotations

from dataclasses import fields

import calibrate

from attnc.compiler.planning.rates import AMX, PLAIN, Rates

GIVEN = {"mask", "evaluate", "source", "spread"}
"""Rates that are not measured."""


def test_there_are_at_most_ten() -> None:
    assert len(calibrate.MICROBENCHMARKS) <= 10
    assert {one.rates for one in calibrate.MICROBENCHMARKS} == {one.name for one in fields(Rates)} - GIVEN


def test_the_middle_of_rates() -> None:
    found = calibrate.middle([AMX, PLAIN, AMX])
    assert found.call == AMX.call
    assert found.elements == AMX.elements
    assert found.choices == AMX.choices
