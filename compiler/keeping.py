"""How many places a selection keeps."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil, floor, isfinite

from attnc.compiler.ir import Apply, Const, Index, Number, Ranking, Ratio, Value


def most_kept(keep: Value, known: Callable[[Index], Index] | None = None) -> int | None:
    """n of `rank < n` or `rank <= n - 1`, where it is a constant, or one of what is `known`; None for anything else."""
    match keep:
        case Apply(op="lt" | "le" as op, operands=(Ranking(name="rank"), limit)):
            number = _constant(limit, known or (lambda node: node))
            return None if number is None else max(ceil(number) if op == "lt" else floor(number) + 1, 0)
        case _:
            return None


def _constant(node: Value, known: Callable[[Index], Index]) -> Fraction | None:
    match node:
        case Ratio(num=num, den=den):
            match known(num), known(den):
                case Const(value=above), Const(value=below):
                    return Fraction(above, below)
            return None
        case Number(value=value) if isfinite(value):
            return Fraction(value)
        case _:
            return None
