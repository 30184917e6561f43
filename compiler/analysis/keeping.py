"""The number of items that a selection keeps."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil, floor, isfinite

from attnc.compiler.ir import Apply, Const, Index, Number, Ranking, Ratio, Value


def most_kept(keep: Value, known: Callable[[Index], Index] | None = None) -> int | None:
    """Return n for the condition `rank < n` or `rank <= n - 1`, where `known` makes n a constant; None otherwise."""
    match keep:
        case Apply(op="lt" | "le" as op, operands=(Ranking(name="rank"), limit)):
            number = _constant(limit, known or (lambda node: node))
            return None if number is None else max(ceil(number) if op == "lt" else floor(number) + 1, 0)
        case _:
            return None


def _constant(node: Value, resolve: Callable[[Index], Index]) -> Fraction | None:
    match node:
        case Ratio(num=num, den=den):
            match resolve(num), resolve(den):
                case Const(value=numerator), Const(value=denominator):
                    return Fraction(numerator, denominator)
            return None
        case Number(value=value) if isfinite(value):
            return Fraction(value)
        case _:
            return None
