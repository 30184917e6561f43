"""Parameter values: accepted values, refused values, and the messages about them."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from attnc.spec.errors import SpecError
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.program import Program
from attnc.spec.source import SourceFile

TEXT = """pattern p(window: int, decay: real = 1, causal: bool = true, tile: int[3] = 2, slope: real[head] = [1],
          axes: int = 2, step: int[axes] = [1, 1], stages: int[n] = [4, 2, 1],
          counts: int[n] = [1, 1, 1], share: unit = 0.9)
    let area = window * tile[0]
    require window >= 1 and area < 100
    require n <= 3 and all(i >= 0 for i in 0 .. axes * 100)
    require keys >= window
    visible q - k < window
    preset long(window = 64, decay = 1/3, tile = [1, 1, 1])
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return load_program(SourceFile("p.attn", TEXT), lambda name, asking: None)


def faults(program: Program, values: dict[str, Any], preset: str | None = None) -> list[tuple[str, int, str]]:
    with pytest.raises(SpecError) as caught:
        bind(program, values, preset)
    return [(d.code, d.primary.span.line, str(caught.value)) for d in caught.value.diagnostics]


def test_defaults_are_filled_in(program: Program) -> None:
    values = bind(program, {"window": 4}).values
    assert values["decay"] == 1 and isinstance(values["decay"], Fraction)
    assert values["tile"] == (2, 2, 2)
    assert list(values) == [p.name for p in program.parameters]


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (0.2, Fraction(1, 5)),
        (1e-5, Fraction(1, 10**5)),
        (3, 3),
        (Fraction(1, 3), Fraction(1, 3)),
        (Decimal("0.7"), Fraction(7, 10)),
    ],
)
def test_a_real_is_the_rational_it_spells(program: Program, value: Any, exact: Fraction) -> None:
    assert bind(program, {"window": 4, "decay": value}).values["decay"] == exact


def test_presets_lie_between_values_and_defaults(program: Program) -> None:
    bound = bind(program, {"decay": 0.5}, "long")
    assert (bound.values["window"], bound.values["decay"], bound.values["tile"]) == (64, Fraction(1, 2), (1, 1, 1))


def test_lists_and_single_numbers(program: Program) -> None:
    values = bind(
        program, {"window": 4, "tile": 3, "axes": 4, "step": 7, "slope": (0.1, 2), "stages": [9], "counts": [1]}
    ).values
    assert values["tile"] == (3, 3, 3)
    assert values["step"] == (7, 7, 7, 7)
    assert values["slope"] == (Fraction(1, 10), 2)
    assert values["stages"] == (9,)


def test_scalars_of_numpy(program: Program) -> None:
    numpy = pytest.importorskip("numpy")
    values = bind(
        program, {"window": numpy.int64(4), "decay": numpy.float64(0.1), "tile": numpy.array([1, 2, 3])}
    ).values
    assert (values["window"], values["decay"], values["tile"]) == (4, Fraction(1, 10), (1, 2, 3))


@pytest.mark.parametrize(
    ("values", "code", "line", "words"),
    [
        ({}, "A802", 1, "`window` is missing"),
        ({"window": 4, "widow": 3}, "A801", 1, "did you mean `window`"),
        ({"window": 4.0}, "A803", 1, "an integer, got 4.0"),
        ({"window": 512.0}, "A803", 1, "help: write `window=512`"),
        ({"window": 1e300}, "A803", 1, "help: "),
        ({"window": "512"}, "A803", 1, "help: write `window=512`"),
        ({"window": 2.5}, "A803", 1, "help: give `window`, an int"),
        ({"window": True}, "A803", 1, "an integer, got true"),
        ({"window": "4"}, "A803", 1, "an integer, got '4'"),
        ({"window": None}, "A802", 1, "is None, which is not a value"),
        ({"window": [4]}, "A803", 1, "an integer"),
        ({"window": 2**63}, "A803", 1, "64 bits"),
        ({"window": 10**5000}, "A803", 1, "64 bits"),
        ({"window": 4, "decay": math.nan}, "A803", 1, "finite"),
        ({"window": 4, "decay": Decimal("1e999999999")}, "A803", 1, "to 1e128 in size"),
        ({"window": 4, "causal": 1}, "A803", 1, "true or false"),
        ({"window": 4, "tile": [1, 2]}, "A803", 1, "a list of 3, got 2"),
        ({"window": 4, "slope": 2}, "A803", 1, "a list"),
        ({"window": 4, "slope": []}, "A803", 1, "at least one"),
        ({"window": 4, "share": 1.5}, "A803", 3, "from 0 to 1"),
        ({"window": 4, "counts": [1, 2]}, "A803", 3, "a list of 3"),
        ({"window": 0}, "A805", 5, "window = 0, tile = [2, 2, 2]"),
        ({"window": 2**62, "tile": 9}, "A901", 4, "64 bits"),
        ({"window": 4, "axes": 2_000, "step": 1}, "A908", 6, "more than 100000 steps"),
        ({"window": 4, "stages": [1] * 4, "counts": [1] * 4}, "A805", 6, "n <= 3"),
    ],
)
def test_refused(program: Program, values: dict[str, Any], code: str, line: int, words: str) -> None:
    ((fault_code, place, message),) = faults(program, values)
    assert (fault_code, place) == (code, line)
    assert words in message


def test_all_faults_are_collected(program: Program) -> None:
    assert [code for code, _, _ in faults(program, {"decay": "x", "width": 3}, "lnog")] == [
        "A801",
        "A804",
        "A802",
        "A803",
    ]
