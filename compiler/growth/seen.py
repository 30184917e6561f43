"""A relation in words: the visible distances, or else the condition itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.growth.formula import symbol, tidy, written
from attnc.compiler.growth.open_relation import OpenRelation
from attnc.compiler.growth.periods import find_reach
from attnc.compiler.ir import Bool, Index, fold
from attnc.compiler.ir.print_ir import print_index
from attnc.compiler.ir.rewrite import substitute
from attnc.spec.errors import EvaluationError

FAR = 1 << 14
"""Maximum distance, in tokens, that is evaluated."""

MOST_RUNS = 3

Int64 = NDArray[np.int64]


def seen(relation: OpenRelation) -> tuple[str, ...]:
    """Return a line of text for each alternative of a relation."""
    repeats = 0 < find_reach(relation) <= FAR and not relation.reads_length
    return tuple(_line(alternative, repeats) for alternative in _alternatives(relation.visible))


def _alternatives(relation: Index) -> Iterator[Index]:
    if isinstance(relation, Bool) and relation.op == "or":
        yield from relation.operands
        return
    if isinstance(relation, Bool):
        choices = [o for o in relation.operands if isinstance(o, Bool) and o.op == "or"]
        if len(choices) == 1:
            for alternative in choices[0].operands:
                yield fold.conjunction(*(alternative if o is choices[0] else o for o in relation.operands))
            return
    yield relation


def _line(relation: Index, repeats: bool) -> str:
    """Describe an alternative. `known`: distances repeat from `FAR` on at the latest."""
    growth = Dependences().growth(relation)
    if repeats and growth is not None and growth.tokens == 1 and not growth.by:
        try:
            return f"seen: {_distances(relation)}"
        except EvaluationError:
            pass
    relation_of_n = substitute(relation, {fold.extent("keys"): fold.extent("n")})
    return f"seen: pairs with {print_index(relation_of_n)}"


def _distances(relation: Index) -> str:
    """Describe the distances q - k of a relation that depends on the distance alone."""
    back = np.flatnonzero(exact_evaluation.mask(relation, (FAR, FAR + 1), (0, FAR + 1)).ravel()[::-1])
    ahead = np.flatnonzero(exact_evaluation.mask(relation, (0, 1), (1, FAR + 1)).ravel())
    if not len(back) + len(ahead):
        return "nothing"
    if not len(ahead):
        return f"distances {_listed(back)}"
    if not len(back):
        return f"distances {_listed(ahead + 1)}, ahead"
    return f"distances {_listed(back)}, and ahead {_listed(ahead + 1)}"


def _listed(distances: Int64) -> str:
    starts = np.flatnonzero(np.diff(distances, prepend=-2) > 1)
    stops = np.append(starts[1:], len(distances)) - 1
    runs = list(zip(distances[starts].tolist(), distances[stops].tolist(), strict=True))
    last = int(distances[-1])
    steps = set(np.diff(distances).tolist())
    if len(runs) == 1:
        low, high = runs[0]
        if high == FAR:
            return f"≥ {low:,}" if low else "of any length"
        return f"{low:,} … {high:,}, δ in n − δ pairs: {_sum(low, high, 1)}" if high > low else f"{low:,}"
    if len(steps) == 1:
        (step,) = steps
        low = runs[0][0]
        if last > FAR - step:
            return f"{low:,}, {low + step:,}, {low + 2 * step:,}, …"
        return f"{low:,}, {low + step:,}, … {last:,}, δ in n − δ pairs: {_sum(low, last, step)}"
    if len(runs) <= MOST_RUNS:
        return " and ".join(f"{a:,} … {b:,}" if b < FAR else f"≥ {a:,}" for a, b in runs)
    return f"{', '.join(f'{d:,}' for d in distances[:8].tolist())}, …; {len(distances):,} distances up to {FAR:,}"


def _sum(low: int, high: int, step: int) -> str:
    """The sum of n - δ over the distances δ, as text."""
    import sympy  # slow to import

    n, j = symbol("n"), symbol("j")
    return written(tidy(sympy.summation(n - low - step * j, (j, 0, (high - low) // step))))
