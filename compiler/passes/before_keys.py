"""More queries than keys under `align end`: the first queries lie before key 0, at negative positions.

The relation decides what these queries see: nothing where it is causal. A position without a token has no inputs to
read, no coordinates and no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

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
    fold,
)
from attnc.compiler.ir.value_nodes import reads, values_of


def needs_tokens(pattern: Pattern) -> str | None:
    """The reason why queries before key 0 are undefined in a pattern, as a verb phrase; None where they are defined.

    Selections by query or by head are defined: a query ranks its candidates, even if the relation leaves it none.
    """
    if pattern.recur is not None or pattern.stateful:
        return "hands a state from token to token"
    if pattern.segments:
        return "has coordinates for its tokens alone"
    units = next((item.name for item in pattern.selections if not _counts_from_query_0(item)), None)
    if units is not None:
        return f"selects `{units}` for units of queries, which are counted from key 0"
    if any(tensor.made is not None for tensor in pattern.tensors):
        return "sorts its tokens"
    roots: list[Node] = [root for node in pattern.nodes for root in (node.visible, *values_of(node))]
    roots += [x for item in pattern.selections for x in (item.score, item.candidates, item.keep, item.always)]
    roots += [condition for condition, _ in pattern.requirements]
    roots += [root for root in (pattern.combine, pattern.lse) if root is not None]
    return next(_read(roots), None)


def _counts_from_query_0(item: Selection) -> bool:
    """Whether the rows of a selection are the call's queries, or do not depend on the query."""
    query_number = fold.sub(fold.place("q"), _first_query())
    return item.rows is None or "q" not in reads(item.row_of) or item.row_of is query_number


def _first_query() -> Index:
    return fold.sub(fold.extent("keys"), fold.extent("queries"))


def _query_positions() -> tuple[Index, ...]:
    """The position of the current query, and its form where rows are the queries of each member of a family."""
    query_of_member = fold.mod(fold.place("q"), fold.extent("queries"))
    return fold.place("q"), fold.add(query_of_member, _first_query())


def _read(roots: Sequence[Node]) -> Iterator[str]:
    """Yield a phrase for each tensor that is read at a position computed from the query."""
    running = _query_variables(roots)
    for below in (below for root in roots for below in root.below):
        match below:
            case Lookup(tensor=tensor, indices=indices) | Element(tensor=tensor, indices=indices):
                for dim, index in zip(tensor.dims, indices, strict=False):
                    is_own_query = dim == "query" and index in _query_positions()
                    if dim in ("token", "key", "query") and not is_own_query and _depends_on_query(index, running):
                        yield f"reads `{tensor.name}` there"
            case Vec(tensor="q", at=at) if at not in _query_positions():
                yield "reads `q` there"
            case Vec(tensor="k" | "v", at=at) if _depends_on_query(at, running):
                yield f"reads `{below.tensor}` there"


def _depends_on_query(index: Index, running: Set[Var]) -> bool:
    """Whether an index depends on the query, directly or through a variable whose range does."""
    return "q" in reads(index) or any(below in running for below in index.below)


def _query_variables(roots: Sequence[Node]) -> Set[Var]:
    """Return the variables of aggregates over ranges whose ends depend on the query."""
    loops = [below for root in roots for below in root.below if isinstance(below, Reduce | ValueReduce)]
    result: set[Var] = set()
    while True:
        new = {
            x.var
            for x in loops
            if x.var not in result and any(_depends_on_query(end, result) for end in (x.low, x.high))
        }
        if not new:
            return result
        result |= new


def needs_rows_from_0(roots: Iterable[Index]) -> bool:
    """Whether kernel texts of expressions are valid only for positions ≥ 0, where `//` rounds down."""
    safe = {"min", "max", "abs", "mul"}
    return any(
        "q" in reads(below) and (isinstance(below, TableRead) or (isinstance(below, Arith) and below.op not in safe))
        for root in roots
        for below in root.below
    )
