"""Exact expressions specialised once for windows of every size, and the check that 64 bits hold them.

An expression that reads no inputs depends on a window by a few numbers: its queries, its keys, and the position of its
first query. They become variables, so that a decoding step at a new length specialises nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from weakref import WeakKeyDictionary

import numpy as np

from attnc.compiler import ir
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import fold
from attnc.compiler.ir.array_evaluator import WORD
from attnc.compiler.lowering.lower_attention import TOKENS
from attnc.compiler.lowering.specialise import CallSizes, Window, of_any_window
from attnc.runtime.values.pair_blocks import Int64

MOST = 128
"""Maximum number of results kept for one expression."""

_SHIFT = ir.intern(ir.Var("the position of the first query", 0))
_LENGTHS = {name: ir.intern(ir.Var(f"number of {name}", 0)) for name in ("queries", "keys", TOKENS)}


class _Kept:
    """Results by key for each expression, dropped with the expression."""

    def __init__(self) -> None:
        self._results: WeakKeyDictionary[ir.Index, dict[Hashable, object]] = WeakKeyDictionary()

    def of(self, node: ir.Index) -> dict[Hashable, object]:
        """Return the results of an expression; too many are dropped."""
        results = self._results.get(node)
        if results is None or len(results) >= MOST:
            results = self._results[node] = {}
        return results


_FORMS, _FITTING = _Kept(), _Kept()


def form_of_window(
    node: ir.Index, sizes: CallSizes, window: Window, batch: int | ir.Var, head: int | ir.Var, group: int
) -> tuple[ir.Index, Mapping[ir.Var, Int64]] | None:
    """Return an expression as `specialise` does, with variables for the sizes of the window, and their values.

    None for an expression that reads inputs, or that has tables for one size.
    """
    forms = _FORMS.of(node)
    names = forms.get("sizes")
    if names is None:
        names = forms["sizes"] = _sizes_read(node)
    if not isinstance(names, frozenset):
        return None
    constants = tuple((name, sizes.values[name]) for name in sorted(names - _LENGTHS.keys()))
    shifted = bool(window.shift)
    key = batch, head, group, shifted, constants
    form = forms.get(key)
    if form is None:
        extents = _LENGTHS | {name: fold.const(value) for name, value in constants}
        shift = _SHIFT if shifted else fold.const(0)
        form = of_any_window(node, extents, shift=shift, batch=batch, head=head, group=group)
        forms[key] = "itself" if form is node else form  # an entry that held its key would never be dropped
    values = {"queries": window.n_q, "keys": window.n_k, TOKENS: sizes.values.get(TOKENS, window.n_k)}
    variables = {_LENGTHS[name]: np.array([[values[name]]]) for name in _LENGTHS.keys() & names}
    if shifted:
        variables[_SHIFT] = np.array([[window.shift]])
    return (form if isinstance(form, ir.Node) else node), variables  # type: ignore[return-value]  # forms of nodes


def _sizes_read(node: ir.Index) -> frozenset[str] | str:
    if any(isinstance(below, ir.Lookup | ir.DataRead | ir.RoundToInt | ir.UnitCondition) for below in node.below):
        return "none"
    return frozenset(below.name for below in node.below if isinstance(below, ir.Extent))


def fits(node: ir.Index, counts: tuple[int, int], limits: Mapping[ir.Var, tuple[int, int]]) -> bool:
    """Check that 64 bits hold every intermediate of an exact expression, its constants included.

    `counts`: the numbers of queries and keys; `limits`: the least and the greatest value of each variable. Numbers are
    checked up to the next powers of two first, so that one check serves many lengths.
    """
    rounded = {variable: (-_up(-low), _up(high)) for variable, (low, high) in limits.items()}
    return _fits(node, (_up(counts[0]), _up(counts[1])), rounded) or _fits(node, counts, limits)


def _fits(node: ir.Index, counts: tuple[int, int], limits: Mapping[ir.Var, tuple[int, int]]) -> bool:
    results = _FITTING.of(node)
    key = counts, tuple(limits.items())
    result = results.get(key)
    if result is None:
        queries, keys = counts
        result = all(map(_is_word, node.below)) and fits_word(node, (0, queries), (0, keys), limits)
        results[key] = result
    return bool(result)


def _up(number: int) -> int:
    """Return the least power of two that is not smaller, 0 for a number that is not positive."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


def _is_word(node: ir.Index) -> bool:
    """Check that the constants of a node, without those of its operands, fit in 64 bits."""
    match node:
        case ir.Const():
            return abs(node.value) < WORD
        case ir.Linear():
            return all(abs(n) < WORD for n in (node.constant, *(factor for _, factor in node.terms)))
        case ir.TableRead():
            return all(abs(n) < WORD for n in node.values)
        case _:
            return True


__all__ = ["fits", "form_of_window"]
