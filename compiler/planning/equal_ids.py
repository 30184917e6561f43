"""Split relations that require equal ids, `ids[q] == ids[k] and …`, into one window for each run of an id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Arith, Bool, Compare, Const, Data, DataRead, Index, Linear, Position, fold
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.planning.documents import Windows, alike


@dataclass(frozen=True, slots=True, eq=False)
class _IdComparison:
    """The comparison `data[q + of_q] == data[k + of_k]`."""

    data: Data
    of_q: int
    of_k: int


def windows_of_ids(relation: Index, n_q: int, n_k: int) -> list[tuple[Windows, Index]] | None:
    """Return the windows of rows and keys with one id of a specialised relation, each with the remaining condition.

    None if the relation requires no equal ids, if an id appears again after another id, or if the remaining condition
    depends on more than the distance between a row and a key, so that windows would differ.
    """
    parts = relation.operands if isinstance(relation, Bool) and relation.op == "and" else (relation,)
    numbered = next(((i, equal) for i, part in enumerate(parts) if (equal := _id_comparison(part, n_q, n_k))), None)
    if numbered is None:
        return None
    number, equal = numbered
    rest = fold.conjunction(*parts[:number], *parts[number + 1 :])
    windows = _depends_on_distance(rest) and _windows(equal, n_q, n_k)
    if not windows:
        return None
    distance = windows.row - windows.key
    return [(windows.take(indices), _moved(rest, int(distance[indices[0]]))) for indices in alike(distance)]


def _id_comparison(part: Index, n_q: int, n_k: int) -> _IdComparison | None:
    """Return a conjunct as a comparison of the ids of query and key, None for any other conjunct."""
    if not (isinstance(part, Compare) and part.op == "eq" and isinstance(part.value, Linear)):
        return None
    terms, constant = part.value.terms, part.value.constant
    if constant or len(terms) != 2 or sorted(factor for _, factor in terms) != [-1, 1]:
        return None
    reads = {}
    for term, _ in terms:
        if not isinstance(term, DataRead) or len(term.indices) != 1:
            return None
        (index,) = term.indices
        summands, shift = fold.parts(index)
        if len(summands) != 1 or not isinstance(summands[0][0], Position) or summands[0][1] != 1:
            return None
        reads[summands[0][0].name] = term.data, shift
    if set(reads) != {"q", "k"} or reads["q"][0] is not reads["k"][0]:
        return None
    data, of_q, of_k = reads["q"][0], reads["q"][1], reads["k"][1]
    inside = min(of_q, of_k) >= 0 and max(of_q + n_q, of_k + n_k) <= len(data.array)
    return _IdComparison(data, of_q, of_k) if inside else None


def _depends_on_distance(condition: Index) -> bool:
    """Whether a condition depends on `q - k` alone and is defined for every distance."""
    growth = Dependences().growth(condition)
    defined = not any(isinstance(node, DataRead) or _divides(node) for node in walk(condition))
    return defined and growth is not None and not growth.by and growth.tokens == 1


def _divides(node: Index) -> bool:
    """Whether a node may be undefined: a division or power by something that is not constant."""
    return isinstance(node, Arith) and node.op in ("floordiv", "mod", "pow") and not isinstance(node.operands[1], Const)


def _windows(equal: _IdComparison, n_q: int, n_k: int) -> Windows | None:
    """Return a window for each id that has rows and keys; None if an id appears again after another id."""
    ids: NDArray[Any] = equal.data.array
    starts = np.append(0, np.flatnonzero(ids[1:] != ids[:-1]) + 1)
    if len(np.unique(ids[starts])) < len(starts):
        return None
    ends = np.append(starts[1:], len(ids))
    row, row_stop = (np.clip(x - equal.of_q, 0, n_q) for x in (starts, ends))
    key, key_stop = (np.clip(x - equal.of_k, 0, n_k) for x in (starts, ends))
    windows = Windows(row, key, row_stop - row, key_stop - key, np.zeros_like(row))
    return windows.take(np.flatnonzero((windows.n_q > 0) & (windows.n_k > 0)))


@verified
def _moved(condition: Index, rows: int) -> Index:
    """Return the relation of windows whose first row is `rows` tokens after their first key."""
    if not rows:
        return condition
    return rewrite(
        condition,
        lambda node: fold.add(node, fold.const(rows)) if isinstance(node, Position) and node.name == "q" else None,
    )
