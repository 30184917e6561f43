"""Relations that ask for equal ids, `ids[q] == ids[k] and …`, where each id is one run: windows, as documents are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Arith, Bool, Compare, Const, Data, DataRead, Index, Linear, Position
from attnc.compiler.planning.documents import Windows, alike
from attnc.compiler.rewrite import rewrite, walk
from attnc.compiler.verify_ir import verified


@dataclass(frozen=True, slots=True, eq=False)
class _Equal:
    """`data[q + of_q] == data[k + of_k]`."""

    data: Data
    of_q: int
    of_k: int


def windows_of_ids(relation: Index, n_q: int, n_k: int) -> list[tuple[Windows, Index]] | None:
    """The windows in which rows and keys of a specialised relation have one id, with what else it asks there.

    None where it asks for no equal ids, where an id comes back after another one, or where what else it asks depends
    on more than the distance between a row and a key, so that windows would not be alike.
    """
    parts = relation.operands if isinstance(relation, Bool) and relation.op == "and" else (relation,)
    found = next(((i, equal) for i, part in enumerate(parts) if (equal := _equal(part, n_q, n_k))), None)
    if found is None:
        return None
    number, equal = found
    rest = fold.conjunction(*parts[:number], *parts[number + 1 :])
    windows = _is_of_distance(rest) and _windows(equal, n_q, n_k)
    if not windows:
        return None
    apart = windows.row - windows.key
    return [(windows.take(some), _moved(rest, int(apart[some[0]]))) for some in alike(apart)]


def _equal(part: Index, n_q: int, n_k: int) -> _Equal | None:
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
    return _Equal(data, of_q, of_k) if inside else None


def _is_of_distance(rest: Index) -> bool:
    """Whether it depends on `q - k` alone, and is defined for every distance."""
    growth = Dependences().growth(rest)
    defined = not any(isinstance(node, DataRead) or _divides(node) for node in walk(rest))
    return defined and growth is not None and not growth.by and growth.tokens == 1


def _divides(node: Index) -> bool:
    return isinstance(node, Arith) and node.op in ("floordiv", "mod", "pow") and not isinstance(node.operands[1], Const)


def _windows(equal: _Equal, n_q: int, n_k: int) -> Windows | None:
    """A window for each id that has rows and keys; None where an id comes back."""
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
def _moved(rest: Index, rows: int) -> Index:
    """Return the relation of windows whose first row is `rows` tokens after their first key."""
    if not rows:
        return rest
    return rewrite(
        rest,
        lambda node: fold.add(node, fold.const(rows)) if isinstance(node, Position) and node.name == "q" else None,
    )
