"""Axes of the report's charts."""

from __future__ import annotations

import pytest

from attnc.runtime.report.chart_svg import MOST_TICKS, log_scale, short


def test_ends_stand_at_the_ends() -> None:
    scale = log_scale([10, 1000], 0, 100)
    assert [scale.at(value) for value in (10, 100, 1000)] == pytest.approx([0, 50, 100])
    assert log_scale([10, 10_000], 0, 100).ticks() == [10, 100, 1000, 10_000]


def test_a_short_decimal_axis_has_ticks_between() -> None:
    assert log_scale([3, 120], 0, 100).ticks() == [5, 10, 20, 50, 100]
    assert log_scale([4096, 16384], 0, 100, base=2).ticks() == [4096, 8192, 16384]


def test_values_beyond_an_axis_are_clamped() -> None:
    scale = log_scale([10, 1000], 0, 100)
    assert (scale.at(1), scale.at(1e6)) == (0, 100)


@pytest.mark.parametrize("values", [[], [1], [5, 5], [1, 1e30], [1e-9, 1e-3], [1.01, 999], [0, 4]])
@pytest.mark.parametrize("base", [2, 10])
def test_every_axis_has_some_ticks_and_not_too_many(values: list[float], base: int) -> None:
    scale = log_scale(values, 0, 100, base=base)
    assert 1 <= len(scale.ticks()) <= MOST_TICKS
    assert all(0 <= scale.at(tick) <= 100 for tick in scale.ticks())


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512"), (1000, "1,000"), (1024, "1k"), (3 << 20, "3M"), (1 << 31, "2G"), (0.5, "0.5")]
)
def test_lengths_are_abbreviated(number: float, text: str) -> None:
    assert short(number) == text
