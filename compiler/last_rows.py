"""A pattern as its last rows: what a few queries see of a cache of keys is what they see in a call of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attnc.compiler import fold
from attnc.compiler.ir import Attend, Element, Index, Lookup, Pattern, Position, Selection, Value, Vec
from attnc.compiler.lowering.lower_attention import TOKENS
from attnc.compiler.rewrite import substitute, substitute_attend, substitute_value
from attnc.compiler.value_nodes import values_of
from attnc.compiler.verify_ir import verified


class OtherRowsError(Exception):
    """A row needs other rows' queries, which no cache holds. The message says what it reads."""


@verified
def last_rows(pattern: Pattern) -> Pattern:
    """Return the pattern for the last queries of as many as there are keys: query i of n stands at `keys - n + i`.

    Raises OtherRowsError.
    """
    for node in pattern.nodes:
        _check(pattern, node)
    sorted_by = {tensor.made.of for tensor in pattern.tensors if tensor.made is not None}
    for tensor in pattern.tensors:
        if tensor.name in sorted_by and tensor.dims[-1] in ("query", "token"):
            raise OtherRowsError(f"`{tensor.name}` of other rows")
    for item in pattern.selections:
        for read in _read_by(item):
            raise OtherRowsError(f"{read} of other rows")
    return replace(
        pattern,
        align="end",
        requirements=tuple((substitute(root, _COUNTED), span) for root, span in pattern.requirements),
        nodes=tuple(map(_of_node, pattern.nodes)),
        selections=tuple(map(_of_selection, pattern.selections)),
        combine=None if pattern.combine is None else substitute_value(pattern.combine, _COUNTED),
        lse=None if pattern.lse is None else substitute_value(pattern.lse, _COUNTED),
    )


def _of_node(node: Attend) -> Attend:
    """Queries are counted by the tokens, which are the keys unless these are no tokens."""
    count = "keys" if node.keys is None else TOKENS
    return substitute_attend(node, {fold.extent("queries"): fold.extent(count)})


def _of_selection(item: Selection) -> Selection:
    """Queries are counted by the tokens."""
    return replace(
        item,
        items=None if item.items is None else substitute(item.items, _COUNTED),
        score=substitute_value(item.score, _COUNTED),
        candidates=substitute(item.candidates, _COUNTED),
        keep=substitute_value(item.keep, _COUNTED),
        always=substitute(item.always, _COUNTED),
    )


def _read_by(item: Selection) -> Iterator[str]:
    """Yield what a selection reads that no cache holds."""
    roots = [item.score, item.candidates, item.keep, item.always]
    if item.pairs or any(_OF_FAMILY in root.below for root in roots):
        yield "the choices"
    yield from _read(roots)


_OF_FAMILY = fold.mod(fold.place("q"), fold.extent("queries"))
"""The query that decides, where queries do for each member of a family."""

_COUNTED: dict[Index, Index] = {fold.extent("queries"): fold.extent("keys")}


def _check(pattern: Pattern, node: Attend) -> None:
    roots = [*values_of(node), *(root for root in (pattern.combine, pattern.lse) if root is not None)]
    for read in _read([*roots, node.visible]):
        raise OtherRowsError(f"{read} of other rows")


def _read(roots: list[Value | Index]) -> Iterator[str]:
    """Yield the names of query tensors that are read at another position than the row's."""
    own = fold.place("q")
    for root in roots:
        for below in root.below:
            match below:
                case Vec(tensor="q", at=at) if at is not own:
                    yield "`q`"
                case Element(tensor=tensor, indices=indices) | Lookup(tensor=tensor, indices=indices):
                    places = [index for dim, index in zip(tensor.dims, indices, strict=False) if dim == "query"]
                    if any(not isinstance(index, Position) or index is not own for index in places):
                        yield f"`{tensor.name}`"
                case _:
                    pass
