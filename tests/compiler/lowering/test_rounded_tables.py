"""Tables of `floor` and `ceil`: estimates for all arguments at once, scalar arithmetic where they are ambiguous."""

from __future__ import annotations

import numpy as np
import pytest

from attnc import compile_attention
from attnc.compiler.ir import RoundToInt
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.lowering import float_tables
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault
from plan_calls import lowered

FORMULAS = [
    "log2(abs(q - k) + 1) * 4",
    "log(max(q - k, 1) / 8) / log(16) * 8 + 8",
    "sqrt(q * 4) / 2 + 1 / 2",
    "sqrt(q) * sqrt(q)",
    "(q + 1) ** 0.5",
    "exp(q)",
    "exp(-q) * 100",
    "log2(q) - log2(7)",
    "sqrt(abs(q - 50)) * 0.1",
    "-min(sqrt(q), abs(log2(q) - 3))",
    "min(sqrt(q), 8, q / 3) + max(sqrt(q), 1 / 2, log2(q))",
]


def whole(formula: str, function: str = "floor") -> RoundToInt:
    """Return the node of a formula."""
    pattern = lowered(f"pattern p\n    align end\n    visible {function}({formula}) > k\n")
    (node,) = (node for node in walk(pattern.attend.visible) if isinstance(node, RoundToInt))
    return node


def one_by_one(node: RoundToInt, argument: int) -> int | None:
    try:
        return float_tables._entry(node, argument)
    except (ArithmeticFault, EvaluationError):
        return None


@pytest.mark.parametrize("function", ["floor", "ceil"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_entries_equal_scalar_arithmetic(formula: str, function: str) -> None:
    node = whole(formula, function)
    arguments = np.arange(-3, 700)
    entries, valid = float_tables._entries(node, arguments)
    for i, entry, is_valid in zip(arguments.tolist(), entries.tolist(), valid.tolist(), strict=True):
        assert (entry if is_valid else None) == one_by_one(node, i)


def test_few_entries_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make hunt`, part plans, case 14: a million entries took 11.8 s in scalar arithmetic."""
    scalar, evaluated = float_tables._entry, set()

    def counted(node: RoundToInt, at: int) -> int:
        evaluated.add(at)
        return scalar(node, at)

    monkeypatch.setattr(float_tables, "_entry", counted)
    node = whole("log2(abs(k) + 1) * 4")
    _, data = float_tables._table.__wrapped__(node, 1, 1_000_000)
    assert data.array[-1] == 79
    assert 0 < len(evaluated) < 100


def test_the_longest_range_with_values_is_kept() -> None:
    node = whole("sqrt(q * (100 - q))")
    first, data = float_tables._table.__wrapped__(node, -5, 120)
    assert (first, len(data.array)) == (0, 121)


def test_values_beyond_64_bits_are_an_error_where_they_are_read() -> None:
    """`exp(q)` once ended in an OverflowError of NumPy, and `exp(-q) * 100` in an AssertionError."""
    attend = compile_attention("pattern p\n    align end\n    visible floor(exp(q)) > k\n")
    assert attend.plan(40, heads=1).visible == attend.mask(40).sum()
    with pytest.raises(EvaluationError, match="outside `floor`"):
        attend.mask(50)
    attend = compile_attention("pattern p\n    align end\n    visible floor(exp(-q) * 100) > k\n")
    assert attend.plan(700, heads=1).visible == attend.mask(700).sum() > 0
