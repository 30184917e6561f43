"""More queries than keys under `align end`: the first queries stand before key 0, at negative positions.

They see what the relation says of such positions: nothing where it is causal. At a position that no token has there is
nothing to read, no coordinate, and no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

from attnc.compiler import fold
from attnc.compiler.ir import (
    Arith,
    Element,
    Index,
    Lookup,
    Node,
    Pattern,
    Reduce,
    Selection,
    TableRead,
    ValueReduce,
    Var,
    Vec,
)
from attnc.compiler.value_nodes import reads, values_of


def needs_tokens(pattern: Pattern) -> str | None:
    """Why queries before key 0 have no meaning in a pattern, as what it does; None where they have one.

    A selection has one where each query, or each head as a whole, decides: a query ranks its candidates, of which a
    relation of positions may leave none.
    """
    if pattern.recur is not None or pattern.stateful:
        return "hands a state from token to token"
    if pattern.segments:
        return "has coordinates for its tokens alone"
    units = next((item.name for item in pattern.selections if not _counts_from_query_0(item)), None)
    if units is not None:
        return f"chooses `{units}` for units of queries, which are counted from key 0"
    if any(tensor.made is not None for tensor in pattern.tensors):
        return "sorts its tokens"
    roots: list[Node] = [root for node in pattern.nodes for root in (node.visible, *values_of(node))]
    roots += [x for item in pattern.selections for x in (item.score, item.candidates, item.keep, item.always)]
    roots += [condition for condition, _ in pattern.requirements]
    roots += [root for root in (pattern.combine, pattern.lse) if root is not None]
    return next(_read(roots), None)


def _counts_from_query_0(item: Selection) -> bool:
    """Whether the rows of a selection are the call's queries, or the same for all of these."""
    own_row = fold.sub(fold.place("q"), _first_query())
    return item.rows is None or "q" not in reads(item.row_of) or item.row_of is own_row


def _first_query() -> Index:
    return fold.sub(fold.extent("keys"), fold.extent("queries"))


def _of_query_itself() -> tuple[Index, ...]:
    """The position of the query at hand, also where a row is one of the queries of a member of a family."""
    of_member = fold.mod(fold.place("q"), fold.extent("queries"))
    return fold.place("q"), fold.add(of_member, _first_query())


def _read(roots: Sequence[Node]) -> Iterator[str]:
    """Name each tensor that is read at a position computed from the query."""
    running = _of_queries(roots)
    for below in (below for root in roots for below in root.below):
        match below:
            case Lookup(tensor=tensor, indices=indices) | Element(tensor=tensor, indices=indices):
                for dim, index in zip(tensor.dims, indices, strict=False):
                    own = dim == "query" and index in _of_query_itself()
                    if dim in ("token", "key", "query") and not own and _is_of_query(index, running):
                        yield f"reads `{tensor.name}` there"
            case Vec(tensor="q", at=at) if at not in _of_query_itself():
                yield "reads `q` there"
            case Vec(tensor="k" | "v", at=at) if _is_of_query(at, running):
                yield f"reads `{below.tensor}` there"


def _is_of_query(index: Index, running: Set[Var]) -> bool:
    """Whether an index depends on the query, as one with a variable that runs from or to it does."""
    return "q" in reads(index) or any(below in running for below in index.below)


def _of_queries(roots: Sequence[Node]) -> Set[Var]:
    """The variables of aggregates over ranges whose ends depend on the query."""
    loops = [below for root in roots for below in root.below if isinstance(below, Reduce | ValueReduce)]
    result: set[Var] = set()
    while True:
        more = {
            x.var for x in loops if x.var not in result and any(_is_of_query(end, result) for end in (x.low, x.high))
        }
        if not more:
            return result
        result |= more


def needs_rows_from_0(roots: Iterable[Index]) -> bool:
    """Whether texts of expressions hold only for rows that are numbered from 0 on: these take `//` to round down."""
    kept = {"min", "max", "abs", "mul"}
    return any(
        "q" in reads(below) and (isinstance(below, TableRead) or (isinstance(below, Arith) and below.op not in kept))
        for root in roots
        for below in root.below
    )


__all__ = ["needs_rows_from_0", "needs_tokens"]
