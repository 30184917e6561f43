"""The head index that an expression depends on: query head, kv head or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attnc.compiler import fold, ir
from attnc.compiler.ir import Index

Heads = Literal["head", "kv_head"]


def heads_read(roots: Sequence[ir.Value | Index]) -> Heads | None:
    """Whether expressions differ from query head to query head, from kv head to kv head, or not at all."""
    found = {way for root in roots for way in _ways(root)}
    return "head" if "head" in found else "kv_head" if found else None


def at_own_head(node: ir.Lookup, count: int) -> bool:
    """Whether the first so many indices of an input are the batch entry and the head at hand, or nothing."""
    head = fold.head_index("head")
    own = {"batch": fold.head_index("batch"), "head": head, "kv_head": fold.floordiv(head, fold.extent("group"))}
    pairs = zip(node.tensor.dims[:count], node.indices[:count], strict=True)
    return all(own.get(str(dim)) is index for dim, index in pairs)


def _ways(root: ir.Value | Index) -> set[Heads]:
    """How the head at hand is read: as itself, or as its kv head."""
    own, result, seen = fold.head_index("head"), set[Heads](), set[object]()
    shared = {fold.floordiv(own, fold.extent("group")), fold.head_index("kv_head")}
    pending: list[Index | ir.Value] = [root]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        match node:
            case _ if node in shared:
                result.add("kv_head")
            case ir.HeadIndex(name="head"):
                result.add("head")
            case ir.Vec(tensor="k" | "v", head=head, at=at) if head is own:
                result.add("kv_head")
                pending.append(at)
            case _:
                pending.extend(node.children())
    return result
