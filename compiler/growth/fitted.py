"""Laws fitted to counts, for relations without a derived law."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from attnc.compiler.growth.counts import UncountableError
from attnc.compiler.growth.periodic import Lengths, RelationVariant, total

LONGEST_SAMPLE = 1 << 14

LEAST = 3
"""Minimum number of lengths that a fit needs."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The fitted law `factor · n^exponent`; `residual`: the root mean square of log(count / fit)."""

    factor: float
    exponent: float
    residual: float

    def __str__(self) -> str:
        return f"about {self.factor:.3g}·n^{self.exponent:.2f}"


def fit(values: Mapping[int, int]) -> Fit | None:
    """Fit a law to numbers at several lengths, by least squares on logarithms; None for too few lengths."""
    points = {n: value for n, value in values.items() if value > 0}
    if len(points) < LEAST:
        return None
    x, y = np.log(list(points)), np.log(list(points.values()))
    slope, constant = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((y - slope * x - constant) ** 2)))
    return Fit(float(np.exp(constant)), float(slope), residual)


def sampled(variants: list[RelationVariant], lengths: Lengths, tile: int) -> dict[int, int]:
    """Count the visible pairs at powers of two, up to the longest length that can be counted."""
    result = {}
    for exponent in range(9, LONGEST_SAMPLE.bit_length()):
        n = (1 << exponent) // lengths.step * lengths.step
        if n and lengths.allowed(n):
            try:
                result[n] = total(variants, n, tile).pairs
            except UncountableError:
                break
    return result
