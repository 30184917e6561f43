"""More queries than keys under `align end`: the first queries stand before key 0, at negative positions.

They see what the relation says of such positions: nothing where it is causal. At a position that no token has there is
nothing to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attnc.compiler import fold
from attnc.compiler.ir import Arith, Element, Index, Lookup, Node, Pattern, TableRead, Var, Vec
from attnc.compiler.values import is_own, reads, values_of


def needs_tokens(pattern: Pattern) -> str | None:
    """Why queries before key 0 have no meaning in a pattern, as what it does; None where they have one."""
    if pattern.recur is not None or pattern.stateful:
        return "hands a state from token to token"
    if pattern.chooses:
        return "chooses by content what its queries see"
    if pattern.segments:
        return "has coordinates for its tokens alone"
    if any(node.keys is not None for node in pattern.nodes):
        return "gathers its keys"
    return next(_read(pattern), None)


def _read(pattern: Pattern) -> Iterator[str]:
    """Name each tensor that is read at a position computed from the query."""
    roots: list[Node] = [root for node in pattern.nodes for root in (node.visible, *values_of(node))]
    roots += [condition for condition, _ in pattern.requirements]
    for below in (below for root in roots for below in root.below):
        match below:
            case Lookup(tensor=tensor, indices=indices) | Element(tensor=tensor, indices=indices):
                for dim, index in zip(tensor.dims, indices, strict=False):
                    own = dim == "query" and index is fold.place("q")
                    if dim in ("token", "key", "query") and not own and _is_of_query(index):
                        yield f"reads `{tensor.name}` there"
            case Vec() if not is_own(below) and (below.tensor == "q" or _is_of_query(below.at)):
                yield f"reads `{below.tensor}` there"


def _is_of_query(index: Index) -> bool:
    """Whether an index may depend on the query, as that of a loop may."""
    return "q" in reads(index) or any(isinstance(below, Var) for below in index.below)


def needs_rows_from_0(roots: Iterable[Index]) -> bool:
    """Whether texts of expressions hold only for rows that are numbered from 0 on: these take `//` to round down."""
    kept = {"min", "max", "abs", "mul"}
    return any(
        "q" in reads(below) and (isinstance(below, TableRead) or (isinstance(below, Arith) and below.op not in kept))
        for root in roots
        for below in root.below
    )


__all__ = ["needs_rows_from_0", "needs_tokens"]
