"""The last rows of a pattern: a few queries against a cache of keys see the same keys as in a call of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attnc.compiler.ir import Attend, Element, Index, Lookup, Pattern, Position, Selection, Value, Vec, fold
from attnc.compiler.ir.rewrite import substitute, substitute_attend, substitute_value
from attnc.compiler.ir.value_nodes import values_of
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.lowering.lower_attention import TOKENS


class OtherRowsError(Exception):
    """Raised where a row needs queries of other rows, which no cache holds. The message names what the row reads."""


@verified
def last_rows(pattern: Pattern) -> Pattern:
    """Return the pattern for the last n queries, where query i is at position `keys - n + i`.

    Raises OtherRowsError.
    """
    for node in pattern.nodes:
        _check(pattern, node)
    sorted_by = {tensor.made.of for tensor in pattern.tensors if tensor.made is not None}
    for tensor in pattern.tensors:
        if tensor.name in sorted_by and tensor.dims[-1] in ("query", "token"):
            raise OtherRowsError(f"`{tensor.name}` of other rows")
    for item in pattern.selections:
        for name in _read_by(item):
            raise OtherRowsError(f"{name} of other rows")
    return replace(
        pattern,
        align="end",
        requirements=tuple((substitute(root, _COUNTED), span) for root, span in pattern.requirements),
        nodes=tuple(map(_count_by_tokens, pattern.nodes)),
        selections=tuple(map(_selection_by_tokens, pattern.selections)),
        combine=None if pattern.combine is None else substitute_value(pattern.combine, _COUNTED),
        lse=None if pattern.lse is None else substitute_value(pattern.lse, _COUNTED),
    )


def _count_by_tokens(node: Attend) -> Attend:
    """Count queries by tokens: by keys, or by `TOKENS` where keys are not tokens."""
    count = "keys" if node.keys is None else TOKENS
    return substitute_attend(node, {fold.extent("queries"): fold.extent(count)})


def _selection_by_tokens(item: Selection) -> Selection:
    """Count a selection's queries by tokens."""
    return replace(
        item,
        items=None if item.items is None else substitute(item.items, _COUNTED),
        score=substitute_value(item.score, _COUNTED),
        candidates=substitute(item.candidates, _COUNTED),
        keep=substitute_value(item.keep, _COUNTED),
        always=substitute(item.always, _COUNTED),
    )


def _read_by(item: Selection) -> Iterator[str]:
    """Yield the names of what a selection reads that no cache holds."""
    roots = [item.score, item.candidates, item.keep, item.always]
    if item.pairs or any(_OF_FAMILY in root.below for root in roots):
        yield "the selections"
    yield from _read(roots)


_OF_FAMILY = fold.mod(fold.place("q"), fold.extent("queries"))
"""The query that selects, where rows are the queries of each member of a family."""

_COUNTED: dict[Index, Index] = {fold.extent("queries"): fold.extent("keys")}


def _check(pattern: Pattern, node: Attend) -> None:
    roots = [*values_of(node), *(root for root in (pattern.combine, pattern.lse) if root is not None)]
    for name in _read([*roots, node.visible]):
        raise OtherRowsError(f"{name} of other rows")


def _read(roots: list[Value | Index]) -> Iterator[str]:
    """Yield the names of query tensors that are read at other positions than the row's own."""
    row = fold.place("q")
    for root in roots:
        for below in root.below:
            match below:
                case Vec(tensor="q", at=at) if at is not row:
                    yield "`q`"
                case Element(tensor=tensor, indices=indices) | Lookup(tensor=tensor, indices=indices):
                    query_indices = [index for dim, index in zip(tensor.dims, indices, strict=False) if dim == "query"]
                    if any(not isinstance(index, Position) or index is not row for index in query_indices):
                        yield f"`{tensor.name}`"
                case _:
                    pass
