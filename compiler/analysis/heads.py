"""The head index on which expressions depend: the query head, the kv head, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold

Heads = Literal["head", "kv_head"]


def heads_read(roots: Sequence[ir.Value | Index]) -> Heads | None:
    """Return the head index on which expressions depend: "head", "kv_head", or None."""
    ways = {index for root in roots for index in _ways(root)}
    return "head" if "head" in ways else "kv_head" if ways else None


def at_own_head(node: ir.Lookup, count: int) -> bool:
    """Whether the first `count` indices of a read are the current batch entry and head."""
    head = fold.head_index("head")
    current = {"batch": fold.head_index("batch"), "head": head, "kv_head": fold.floordiv(head, fold.extent("group"))}
    pairs = zip(node.tensor.dims[:count], node.indices[:count], strict=True)
    return all(current.get(str(dim)) is index for dim, index in pairs)


def _ways(root: ir.Value | Index) -> set[Heads]:
    """The ways in which an expression reads the current head: as the query head, or as its kv head."""
    query_head, result, seen = fold.head_index("head"), set[Heads](), set[object]()
    kv_heads = {fold.floordiv(query_head, fold.extent("group")), fold.head_index("kv_head")}
    pending: list[Index | ir.Value] = [root]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        match node:
            case _ if node in kv_heads:
                result.add("kv_head")
            case ir.HeadIndex(name="head"):
                result.add("head")
            case ir.Vec(tensor="k" | "v", head=head, at=at) if head is query_head:
                result.add("kv_head")
                pending.append(at)
            case _:
                pending.extend(node.children())
    return result
