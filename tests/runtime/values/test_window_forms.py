"""Expressions specialised once for windows of every size: equal values, and nothing specialised in a warm call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc import compile_attention
from attnc.compiler.analysis.exact_evaluation import PairLanes
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import fold
from attnc.compiler.lowering.specialise import CallSizes, Slices, Window, specialise
from attnc.runtime.values import exact_block_values, window_forms
from attnc.runtime.values.window_forms import MOST, fits, form_of_window
from expression_trees import Tree
from relations import relations
from tiers import examples

SIZES = CallSizes({"heads": 4, "kv_heads": 2, "group": 2})


@settings(max_examples=examples(100))
@given(relations(), st.integers(1, 40), st.integers(0, 3), st.integers(0, 30))
def test_a_form_has_the_values_of_the_specialised_expression(tree: Tree, n_k: int, head: int, shift: int) -> None:
    node = fold.disjunction(trees.build(tree), fold.less(fold.place("q"), fold.sub(fold.extent("keys"), fold.const(3))))
    window = Window(0, 0, 8, n_k, shift)
    wanted = specialise(node, SIZES, Slices({}), window, batch=0, head=head, group=2)
    form = form_of_window(node, SIZES, window, 0, head, 2)
    assert form is not None
    rows, keys, active = np.arange(8), np.arange(n_k), np.ones((8, n_k), dtype=np.bool_)
    values = [
        PairLanes(rows, keys, variables, active, (8, n_k), {}).truths(expression)
        for expression, variables in ((wanted, {}), form)
    ]
    np.testing.assert_array_equal(values[0], values[1])


def test_the_forms_of_an_expression_are_bounded() -> None:
    node = fold.less(fold.place("k"), fold.extent("columns"))
    for size in range(3 * MOST):
        form_of_window(node, CallSizes({"columns": size}), Window(0, 0, 4, 4, 0), 0, 0, 1)
    assert len(window_forms._FORMS.of(node)) <= MOST


@pytest.mark.parametrize("power", range(26, 33))
def test_rounded_limits_do_not_change_what_fits(power: int) -> None:
    """A product that fits for the exact limits, but not for the next powers of two, still fits."""
    variable = window_forms._SHIFT
    product = fold.mul(fold.mul(variable, variable), fold.const(9))
    for limit in (1 << power, (1 << power) + 1, (3 << power) // 2):
        limits = {variable: (-5, limit)}
        assert fits(product, (4, 4), limits) == fits_word(product, (0, 4), (0, 4), limits)


def count_specialised(patch: pytest.MonkeyPatch) -> list[object]:
    """Record the expressions that are specialised from now on."""
    calls: list[object] = []
    for module, name in ((exact_block_values, "specialise"), (window_forms, "of_any_window")):
        function: Any = getattr(module, name)

        def counting(*args: Any, _function: Any = function, **options: Any) -> Any:
            calls.append(args[0])
            return _function(*args, **options)

        patch.setattr(module, name, counting)
    return calls


def test_a_longer_cache_specialises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = compile_attention("alibi")
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    attend.decode(q, k, v, kv_len=40)
    calls = count_specialised(monkeypatch)
    outs = {length: attend.decode(q, k, v, kv_len=length) for length in range(41, 50)}
    assert not calls
    for length, out in outs.items():
        wanted = attend.reference(q, k[:, :, :length], v[:, :, :length])
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


def test_warm_selections_specialise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params: dict[str, Any] = {
        "stages": [16, 4],
        "kept": [32, 16],
        "strides": [4, 1],
        "rows": 16,
        "sinks": 4,
        "window": 16,
    }
    attend = compile_attention("hip", **params)
    drawn = [[torch.randn(1, 2, 96, 8) for _ in range(3)] for _ in range(2)]
    attend.chosen(*drawn[0])
    calls = count_specialised(monkeypatch)
    chosen = attend.chosen(*drawn[1])
    assert not calls
    monkeypatch.undo()
    wanted = compile_attention("hip", **params).chosen(*drawn[1])
    assert chosen.keys() == wanted.keys()
    assert all(torch.equal(chosen[name], wanted[name]) for name in wanted)
