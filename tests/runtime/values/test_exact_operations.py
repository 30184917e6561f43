"""Every operation of integers has a text in Triton and a call in torch, and all tables agree with its record."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from attnc import compile_attention
from attnc.compiler.ir.integer_operations import INTEGER_FUNCTIONS, INTEGER_OPERATIONS, on_arrays
from attnc.compiler.kernels.index_text import HELPERS, TRITON_OPERATIONS, TritonOperation
from attnc.runtime.executors.flex.torch_tape import OPERATIONS
from attnc.spec.exact_operations import EXACT_FUNCTIONS, EXACT_OPERATIONS, ExactOperation
from attnc.spec.meaning.exact_arithmetic import INT_MAX, ArithmeticFault

ROOT = Path(__file__).parents[3]
NATURALS = [
    *(0, 1, 2, 3, 7, 8, 9, 99, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 52) + 3, (1 << 53) - 1, (1 << 53) + 1),
    *(3_037_000_499**2 - 1, 3_037_000_499**2, (1 << 62) - 1, 1 << 62, INT_MAX),
]


def operands_of(name: str) -> list[tuple[int, ...]]:
    function = INTEGER_FUNCTIONS[name]
    points = NATURALS if function.of_naturals else [sign * n for n in NATURALS for sign in (1, -1)]
    return list(product(points, repeat=len(function.parameters)))


def test_the_tables_are_total() -> None:
    assert INTEGER_OPERATIONS.keys() == TRITON_OPERATIONS.keys() == OPERATIONS.keys()
    texts = [text for text in TRITON_OPERATIONS.values() if text is not None]
    assert all(text.helper is None or text.helper in HELPERS for text in texts)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", INTEGER_FUNCTIONS)
def test_arrays_hold_the_values_of_the_record(name: str, wide: bool) -> None:
    points = operands_of(name)
    columns = [np.array(column, dtype=object if wide else np.int64) for column in zip(*points, strict=True)]
    values = on_arrays(name, *columns)
    assert values.dtype == columns[0].dtype
    assert values.tolist() == [INTEGER_FUNCTIONS[name].evaluate(*point) for point in points]


@pytest.mark.parametrize("name", INTEGER_FUNCTIONS)
def test_torch_computes_the_function(name: str) -> None:
    points = [point for point in operands_of(name) if max(map(abs, point)) < 1 << 62]
    columns = [torch.tensor(column) for column in zip(*points, strict=True)]
    assert OPERATIONS[name](*columns).tolist() == [INTEGER_FUNCTIONS[name].evaluate(*point) for point in points]


@pytest.mark.parametrize("name", INTEGER_OPERATIONS)
def test_sizes_bound_values(name: str) -> None:
    operation = INTEGER_OPERATIONS[name]
    for operands in product(range(-9, 10), repeat=len(operation.parameters)):
        size = operation.size(*map(abs, operands))
        try:
            value = operation.evaluate(*operands)
        except ArithmeticFault:
            continue
        if not isinstance(value, int):  # a negative power, which the IR writes as a quotient
            continue
        assert size is None or abs(value) <= size, operands
        assert not operation.natural([x >= 0 for x in operands]) or value >= 0, operands


@pytest.mark.parametrize("name", INTEGER_FUNCTIONS)
def test_the_name_stands_in_three_places(name: str) -> None:
    """The record and two texts; besides, vectorised values and bounds, laws that know the function, and hints."""
    besides = {
        "spec/reading",
        "compiler/ir/integer_operations.py",
        "compiler/analysis/box_values.py",
        "compiler/growth",
        "compiler/lowering",
    }
    files = {
        str(path.relative_to(ROOT))
        for folder in ("spec", "compiler", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        if f'"{name}"' in path.read_text()
    }
    places = {file for file in files if not file.startswith(tuple(besides))}
    assert places == {
        "spec/exact_operations.py",
        "compiler/kernels/index_text.py",
        "runtime/executors/flex/torch_tape.py",
    }


@pytest.fixture
def ones(monkeypatch: pytest.MonkeyPatch) -> ExactOperation:
    """A function that only has a record and its two texts."""
    function = ExactOperation(
        "ones", ("n",), int.bit_count, "integers", "int", natural=lambda _: True, size=lambda n: n.bit_length()
    )
    for table in (EXACT_FUNCTIONS, EXACT_OPERATIONS, INTEGER_FUNCTIONS, INTEGER_OPERATIONS):
        monkeypatch.setitem(table, function.name, function)
    monkeypatch.setitem(TRITON_OPERATIONS, function.name, TritonOperation("ones({0})"))
    monkeypatch.setitem(OPERATIONS, function.name, lambda n: sum(n >> i & 1 for i in range(63)))
    return function


def test_a_new_function_needs_a_record_and_two_texts(ones: ExactOperation) -> None:
    attend = compile_attention(
        "pattern cube\n"
        "    visible ones(xor(q, k)) <= 1 and ones(7) == 3\n"
        "    score   scale * dot(q, k) - ones(xor(q, k))\n"
    )
    n = 40
    expected = [[(q ^ k).bit_count() <= 1 for k in range(n)] for q in range(n)]
    assert attend.mask(n).tolist() == expected
    assert "ones(" in attend.source()["cube_forward"]
    positions = torch.meshgrid(*[torch.zeros(1, dtype=torch.int64)] * 2, *[torch.arange(n)] * 2, indexing="ij")
    assert attend.mask_mod(n, relation_only=True)(*positions)[0, 0].tolist() == expected
    q, k, v = torch.randn(3, 1, 2, n, 8).unbind()
    torch.testing.assert_close(attend(q, k, v), attend.reference(q, k, v))
