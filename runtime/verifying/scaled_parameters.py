"""Smaller values for the parameters of a pattern, at which few tokens exercise all of its relation."""

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
"""Integers up to this are not scaled: a count of three blocks stays three."""

LARGEST = 24
"""Values are divided until none exceeds this."""

DRAWS = 400
"""The number of random sets of small values to try; `require` rejects most of them."""

SMALL_VALUES = (1, 2, 2, 3, 3, 4, 4, 5, 6, 8)
STRETCHES = ((8, 2), (16, 2), (64, 3))
"""Extents of a grid with one long axis: the long extent and the others."""

ACROSS = 4
"""The other extents of a grid with one axis as long as a constant of the text."""

LONGEST_CONSTANT = 128
"""The largest constant of the text for which a grid is made as long."""


@dataclass(frozen=True, slots=True)
class ScaledChoice:
    """Values for the parameters; `how` describes how they differ from the requested ones, empty where they do not."""

    bound: BoundProgram
    how: str = ""


def requested_choice(program: Program, params: Mapping[str, object], preset: str | None) -> ScaledChoice:
    """Return the values that the user gives, the preset's and the defaults.

    If a parameter has no value and no preset was requested, the first preset is used. Raises SpecError if a parameter
    has no value then.
    """
    try:
        return ScaledChoice(bind(program, params, preset))
    except SpecError as error:
        if preset is not None or not program.presets or {d.code for d in error.diagnostics} != {"A802"}:
            raise
    first = program.presets[0].name
    return ScaledChoice(bind(program, params, first), f"preset {first}")


def scaled(choice: ScaledChoice, fixed: frozenset[str]) -> Iterator[ScaledChoice]:
    """Yield smaller values: in proportion, then by axis, then random; parameters in `fixed` keep their values."""
    tried: set[str] = set()
    for values, how in _candidates(choice.bound, fixed):
        if repr(values) in tried or values == dict(choice.bound.values):
            continue
        tried.add(repr(values))
        bound = _bound(choice.bound.program, values)
        if bound is not None:
            yield ScaledChoice(bound, how)


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
        yield from _stretched_grids(values, axes, names)
    generator = random.Random(0)
    for _ in range(DRAWS):
        yield {**values, **_random_values(values, names, axes, generator)}, "small values in the same order"


def counts(bound: BoundProgram) -> list[int]:
    """Return the integers among the parameters, including those in lists."""
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
    """Return the parameters that are extents of the grid, in its order."""
    if not bound.program.segments:
        return []
    axis_extents = [axis.extent for segment in bound.program.segments for axis in segment.axes]
    return [extent.name for extent in axis_extents if isinstance(extent, ParameterRead)]


def _by_axis(bound: BoundProgram, axes: list[str], names: list[str]) -> dict[str, Value]:
    """Divide each extent, and the list entries of its axis, by their greatest common divisor."""
    values: dict[str, Value] = {}
    integers = {name: bound.values[name] for name in names}
    lists = {name: value for name, value in integers.items() if isinstance(value, tuple) and len(value) == len(axes)}
    shared = []
    for i, axis in enumerate(axes):
        axis_values = [bound.values[axis], *(value[i] for value in lists.values())]
        shared.append(max(math.gcd(*(v for v in axis_values if isinstance(v, int) and v > 1)), 1))
        extent = bound.values[axis]
        assert isinstance(extent, int)
        values[axis] = extent // shared[i]
    for name, entries in lists.items():
        values[name] = tuple(max(1, v // n) for v, n in zip(entries, shared, strict=True) if isinstance(v, int))
    return {name: value for name, value in values.items() if name in names}


def _stretched_grids(
    values: dict[str, Value], axes: list[str], names: list[str]
) -> Iterator[tuple[dict[str, Value], str]]:
    for long, short in STRETCHES:
        for long_axis in axes:
            extents: dict[str, Value] = {axis: long if axis == long_axis else short for axis in axes}
            for factor in (1, 4, 16):
                others = {name: _divided(values[name], factor) for name in names if name not in axes}
                candidate = {**values, **others, **{name: v for name, v in extents.items() if name in names}}
                yield candidate, "a small grid, long along one axis"


def _as_long_as_constants(
    bound: BoundProgram, axes: list[str], names: list[str]
) -> Iterator[tuple[dict[str, Value], str]]:
    """Yield grids with an axis as long as the largest constant in the relation's text, and with small blocks."""
    longest = max((n for n in constants(bound.program) if n <= LONGEST_CONSTANT), default=0)
    if longest <= LARGEST or not set(axes) <= set(names):
        return
    values = dict(bound.values)
    others = {name: values[name] for name in names if name not in axes}
    factor = max((v for value in others.values() for v in _entries(value)), default=1) // ACROSS
    for long_axis in reversed(axes):
        extents: dict[str, Value] = {axis: longest if axis == long_axis else ACROSS for axis in axes}
        small = {name: _divided(value, max(factor, 1)) for name, value in others.items()}
        yield {**values, **small, **extents}, "a small grid, as long along one axis as a constant of the text"


def _random_values(
    values: Mapping[str, Value], names: list[str], axes: list[str], generator: random.Random
) -> dict[str, Value]:
    """Return random small values in the order of the original values."""
    old = sorted({v for name in names for v in _entries(values[name]) if v > 1})
    new = sorted(generator.choice(SMALL_VALUES) for _ in old)
    table = {**dict(zip(old, new, strict=True)), **{v: v for v in (0, 1)}}
    table |= {v: v for name in names for v in _entries(values[name]) if v < 0}
    small = {name: _mapped(values[name], table) for name in names}
    return {**small, **{axis: generator.choice((2, 3, 4, 6, 8)) for axis in axes if axis in names}}


def changed(choice: ScaledChoice, requested: BoundProgram) -> list[Parameter]:
    """Return the parameters whose values differ from the requested ones."""
    return [p for p in requested.program.parameters if choice.bound.values[p.name] != requested.values[p.name]]
