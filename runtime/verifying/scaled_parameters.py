"""Smaller values for the parameters of a pattern, with which few tokens show all of its relation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnc.runtime.verifying.condition_lines import constants
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.meaning.bind import bind
from attnc.spec.program import BoundProgram, Parameter, ParameterRead, Program, Value

KEPT = 3
"""Counts up to this are not scaled: three of many blocks stay three."""

LARGEST = 24
"""Values are divided until none is larger."""

DRAWS = 400
"""The number of draws of small values; `require` refuses most of them."""

SMALL_VALUES = (1, 2, 2, 3, 3, 4, 4, 5, 6, 8)
STRETCHES = ((8, 2), (16, 2), (64, 3))
"""Extents of a grid, one of which is long."""

ACROSS = 4
"""The other extents of a grid that is as long as a constant of the text."""

LONGEST_CONSTANT = 128
"""Grids are made as long as constants up to this."""


@dataclass(frozen=True, slots=True)
class ScaledChoice:
    """Values for the parameters; `how` says how they follow from those that were asked for, empty where they do."""

    bound: BoundProgram
    how: str = ""


def own(program: Program, given: Mapping[str, object], preset: str | None) -> ScaledChoice:
    """Return the values that the user gave, the preset's and the defaults.

    Where a parameter has no value and no preset was asked for, the first preset gives it. Raises SpecError where there
    is no value for a parameter.
    """
    try:
        return ScaledChoice(bind(program, given, preset))
    except SpecError as error:
        if preset is not None or not program.presets or {d.code for d in error.diagnostics} != {"A802"}:
            raise
    first = program.presets[0].name
    return ScaledChoice(bind(program, given, first), f"preset {first}")


def scaled(choice: ScaledChoice, fixed: frozenset[str]) -> Iterator[ScaledChoice]:
    """Yield smaller values: in proportion, then by axis, then drawn; `fixed` names parameters that keep theirs."""
    seen: set[str] = set()
    for values, how in _candidates(choice.bound, fixed):
        if repr(values) in seen or values == dict(choice.bound.values):
            continue
        seen.add(repr(values))
        found = _bound(choice.bound.program, values)
        if found is not None:
            yield ScaledChoice(found, how)


def _bound(program: Program, values: Mapping[str, object]) -> BoundProgram | None:
    try:
        return bind(program, values)
    except (SpecError, EvaluationError):
        return None


def _candidates(bound: BoundProgram, fixed: frozenset[str]) -> Iterator[tuple[dict[str, Value], str]]:
    values = dict(bound.values)
    names = [p.name for p in bound.program.parameters if p.type.kind == "int" and p.name not in fixed]
    largest = max((v for name in names for v in _entries(values[name])), default=0)
    factor = 2
    while largest // factor > LARGEST:
        factor *= 2
    while factor <= largest:
        yield {**values, **{name: _divided(values[name], factor) for name in names}}, f"divided by {factor}"
        factor *= 2
    axes = _axes(bound)
    if axes:
        yield from _as_long_as_constants(bound, axes, names)
        yield {**values, **_by_axis(bound, axes, names)}, "divided by what they share along each axis"
        yield from _stretched(values, axes, names)
    drawn = random.Random(0)
    for _ in range(DRAWS):
        yield {**values, **_drawn(values, names, axes, drawn)}, "small values in the same order"


def counts(bound: BoundProgram) -> list[int]:
    """Return the integers among the parameters, of lists too."""
    return [v for p in bound.program.parameters if p.type.kind == "int" for v in _entries(bound.values[p.name])]


def _entries(value: Value) -> Iterator[int]:
    if isinstance(value, tuple):
        for item in value:
            yield from _entries(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _mapped(value: Value, table: Mapping[int, int]) -> Value:
    if isinstance(value, tuple):
        return tuple(_mapped(item, table) for item in value)
    assert isinstance(value, int)
    return table[value]


def _divided(value: Value, factor: int) -> Value:
    return _mapped(value, {v: v if v <= KEPT else max(2, v // factor) for v in _entries(value)})


def _axes(bound: BoundProgram) -> list[str]:
    """The parameters that are extents of the grid, in its order."""
    if not bound.program.segments:
        return []
    named = [axis.extent for segment in bound.program.segments for axis in segment.axes]
    return [extent.name for extent in named if isinstance(extent, ParameterRead)]


def _by_axis(bound: BoundProgram, axes: list[str], names: list[str]) -> dict[str, Value]:
    """Each extent and the entries of lists that belong to its axis, without the factor that they share."""
    values: dict[str, Value] = {}
    given = {name: bound.values[name] for name in names}
    lists = {name: value for name, value in given.items() if isinstance(value, tuple) and len(value) == len(axes)}
    shared = []
    for i, axis in enumerate(axes):
        along = [bound.values[axis], *(value[i] for value in lists.values())]
        shared.append(max(math.gcd(*(v for v in along if isinstance(v, int) and v > 1)), 1))
        extent = bound.values[axis]
        assert isinstance(extent, int)
        values[axis] = extent // shared[i]
    for name, entries in lists.items():
        values[name] = tuple(max(1, v // n) for v, n in zip(entries, shared, strict=True) if isinstance(v, int))
    return {name: value for name, value in values.items() if name in names}


def _stretched(values: dict[str, Value], axes: list[str], names: list[str]) -> Iterator[tuple[dict[str, Value], str]]:
    for long, short in STRETCHES:
        for stretched in axes:
            extents: dict[str, Value] = {axis: long if axis == stretched else short for axis in axes}
            for factor in (1, 4, 16):
                rest = {name: _divided(values[name], factor) for name in names if name not in axes}
                found = {**values, **rest, **{name: v for name, v in extents.items() if name in names}}
                yield found, "a small grid, long along one axis"


def _as_long_as_constants(
    bound: BoundProgram, axes: list[str], names: list[str]
) -> Iterator[tuple[dict[str, Value], str]]:
    """Grids along which a distance reaches the largest number that the relation's text holds, with small blocks."""
    longest = max((n for n in constants(bound.program) if n <= LONGEST_CONSTANT), default=0)
    if longest <= LARGEST or not set(axes) <= set(names):
        return
    values = dict(bound.values)
    rest = {name: values[name] for name in names if name not in axes}
    factor = max((v for value in rest.values() for v in _entries(value)), default=1) // ACROSS
    for stretched in reversed(axes):
        extents: dict[str, Value] = {axis: longest if axis == stretched else ACROSS for axis in axes}
        small = {name: _divided(value, max(factor, 1)) for name, value in rest.items()}
        yield {**values, **small, **extents}, "a small grid, as long along one axis as a constant of the text"


def _drawn(values: Mapping[str, Value], names: list[str], axes: list[str], drawn: random.Random) -> dict[str, Value]:
    """Small values in the order of the old ones."""
    old = sorted({v for name in names for v in _entries(values[name]) if v > 1})
    new = sorted(drawn.choice(SMALL_VALUES) for _ in old)
    table = {**dict(zip(old, new, strict=True)), **{v: v for v in (0, 1)}}
    table |= {v: v for name in names for v in _entries(values[name]) if v < 0}
    found = {name: _mapped(values[name], table) for name in names}
    return {**found, **{axis: drawn.choice((2, 3, 4, 6, 8)) for axis in axes if axis in names}}


def changed(choice: ScaledChoice, asked: BoundProgram) -> list[Parameter]:
    """Return the parameters with another value than was asked for."""
    return [p for p in asked.program.parameters if choice.bound.values[p.name] != asked.values[p.name]]
