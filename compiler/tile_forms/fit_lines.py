"""Fitting one line `clamp(shift + scale · ((slope · r + offset) // divisor), low, high)` to what rows ask of it.

For a given slope, divisor and scale, every row allows a range of offsets; the line exists where these ranges meet. So a
line that is found holds in every row that it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from attnc.compiler.tile_forms.arrays import Int64
from attnc.compiler.tile_forms.bounds import Line

FREE = 1 << 40
"""Past every column: where a row does not bound the line."""

MOST_CLASSES = 64
MOST_DIVISOR = 64
ROWS_PER_CLASS = 3
"""A table of offsets is a formula only if each is used in several rows."""

FEW = 96
"""Rows at either end in which a form must hold before all are asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The line must lie in `least ..= most` in each of these rows."""

    rows: Int64
    least: Int64
    most: Int64


@dataclass(frozen=True, slots=True)
class _Form:
    """All of a line but its offsets."""

    slope: int
    divisor: int
    classes: int
    scale: int
    shift: int


def exactly(rows: Int64, values: Int64) -> Asked:
    """These values."""
    return Asked(rows, values, values)


def fit_line(asked: Asked) -> Line | None:
    """The simplest line found, None where there is none."""
    bounded = (asked.least > -FREE) | (asked.most < FREE)
    asked = Asked(asked.rows[bounded], asked.least[bounded], asked.most[bounded])
    if not len(asked.rows):
        return Line(0, (0,))
    low, high = _clamps(asked)
    if low == high:
        return Line(0, (low,))
    inner = (asked.least == asked.most) & (asked.least > low) & (asked.least < high)
    rows, values = asked.rows[inner], asked.least[inner]
    some = np.unique(np.append(np.arange(len(asked.rows))[:FEW], np.arange(len(asked.rows))[-FEW:]))
    few = Asked(asked.rows[some], asked.least[some], asked.most[some])
    for form in _forms(rows, values, low, high, len(asked.rows)):
        if _offsets(form, few, low, high) is not None:
            offsets = _offsets(form, asked, low, high)
            if offsets is not None:
                return _with_clamps(form, offsets, asked, low, high)
    return None


def _clamps(asked: Asked) -> tuple[int, int]:
    """The lowest and highest value worth taking; `least` and `most` are met by clamping to them."""
    above, below = asked.most[asked.most < FREE], asked.least[asked.least > -FREE]
    if not len(above):
        return int(below.max()), int(below.max())
    low = int(above.min())
    return low, max(low, int(below.max(initial=low)))


def _forms(rows: Int64, values: Int64, low: int, high: int, asked: int) -> Iterator[_Form]:
    """Forms to try, simple ones first; `rows` have exact values between the clamps, which may be multiples as well."""
    yield from (_Form(slope, 1, 1, 1, 0) for slope in (0, 1, -1))
    multiples = [np.append(values, np.array(more, dtype=np.int64)) for more in ([low, high], [low], [high], [])]
    for scale, shift in dict.fromkeys([(1, 0), *map(_scale, multiples)]):
        scaled = (values - shift) // scale
        yield from (_Form(slope, divisor, 1, scale, shift) for slope, divisor in _slopes(rows, scaled))
    for classes in range(2, min(MOST_CLASSES, asked // ROWS_PER_CLASS) + 1):
        found = _slope_of_classes(rows, values, classes)
        if found is not None:
            yield _Form(*found, classes, 1, 0)


def _scale(values: Int64) -> tuple[int, int]:
    """The scale and shift of which all values are multiples."""
    if not len(values):
        return 1, 0
    scale = int(np.gcd.reduce(values - values[0]))
    return (scale, int(values[0]) % scale) if scale else (1, 0)


def _slopes(rows: Int64, values: Int64) -> Iterator[tuple[int, int]]:
    """Slopes and divisors that pass within one of the first value and the last."""
    if len(rows) < 2:
        return
    run, rise = int(rows[-1] - rows[0]), int(values[-1] - values[0])
    for divisor in range(1, MOST_DIVISOR + 1):
        middle = rise * divisor // run
        for slope in (middle, middle + 1):
            if gcd(slope, divisor) == 1 and abs(slope * run - rise * divisor) < divisor:
                yield slope, divisor


def _slope_of_classes(rows: Int64, values: Int64, classes: int) -> tuple[int, int] | None:
    """The slope from the first row to the last of its class, where one turn of the classes is a whole number."""
    if len(rows) < 2:
        return 0, 1
    last = int(rows[-1] - (rows[-1] - rows[0]) % classes)
    at = int(np.searchsorted(rows, last))
    if rows[at] != last:
        at = int(np.flatnonzero(rows % classes == rows[0] % classes)[-1])
    if not at:
        return None
    run, rise = int(rows[at] - rows[0]), int(values[at] - values[0])
    shared = gcd(run, rise)
    return (rise // shared, run // shared) if classes % (run // shared) == 0 else None


def _offsets(form: _Form, asked: Asked, low: int, high: int) -> tuple[int, ...] | None:
    """An offset a class, as near 0 as its rows allow; None where they allow none."""
    least = np.full(form.classes, -FREE * form.divisor)
    most = -least
    number = asked.rows % form.classes
    start, end = form.slope * asked.rows, form.divisor
    bound = asked.least > low
    floor = -((form.shift - asked.least) // form.scale)
    np.maximum.at(least, number[bound], (end * floor - start)[bound])
    bound = asked.most < high
    ceiling = (asked.most - form.shift) // form.scale
    np.minimum.at(most, number[bound], (end * ceiling + end - 1 - start)[bound])
    if (least > most).any():
        return None
    return tuple(np.clip(0, least, most).tolist())


def _with_clamps(form: _Form, offsets: tuple[int, ...], asked: Asked, low: int, high: int) -> Line:
    """The line with those clamps that a row needs."""
    line = Line(form.slope, offsets, form.divisor, form.scale, form.shift)
    values = line.unclamped(asked.rows)
    needs_low, needs_high = bool((values < asked.least).any()), bool((values > asked.most).any())
    return replace(line, low=low if needs_low else None, high=high if needs_high else None)
