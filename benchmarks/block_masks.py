"""A BlockMask from the live tiles, against create_block_mask on the same mask_mod, compiled: time, and equal blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import as_json, interleaved, once
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attnc import compile_attention

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A pattern with its parameters, and how many documents it has."""

    name: str
    spec: str
    params: dict[str, Any] = field(default_factory=dict)
    documents: int = 0

    def at(self, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and inputs at a length."""
        if self.spec == "neighborhood_2d":
            side = round(n**0.5)
            return {**self.params, "height": side, "width": n // side}, {}
        draw = torch.Generator().manual_seed(0)
        doc = torch.randint(self.documents, (1, n), generator=draw).sort().values if self.documents else None
        return self.params, {} if doc is None else {"doc": doc}


CASES = (
    Case("causal", "causal"),
    Case("window 4096 + 4 sinks", "sliding_window", {"window": 4096, "sinks": 4}),
    Case("power 256, 5", "power"),
    Case("neighborhood 13 x 13", "neighborhood_2d", {"window": 13}),
    Case("40 documents", "document", documents=40),
)


def rows(lengths: list[int], rounds: int, names: list[str] | None = None) -> Iterator[Row]:
    """A row for each case and length; theirs is measured twice after its compilation, as it takes so much longer."""
    for n in lengths:
        for case in CASES:
            if names is None or any(name in case.name for name in names):
                yield _row(case, n, rounds)


def _row(case: Case, n: int, rounds: int) -> Row:
    params, inputs = case.at(n)
    attend = compile_attention(case.spec, **params)
    first = once(lambda: attend.block_mask(n, device="cpu", **inputs))
    ours = interleaved({"attnc": lambda: attend.block_mask(n, device="cpu", **inputs)}, rounds)["attnc"]
    mod = attend.mask_mod(n, device="cpu", **inputs)
    torch.compiler.reset()
    create = torch.compile(create_block_mask, dynamic=False)
    made: list[BlockMask] = []
    theirs_first = once(lambda: made.append(create(mod, None, None, n, n, device="cpu")))
    theirs = interleaved({"flex": lambda: create(mod, None, None, n, n, device="cpu")}, 2, 0)["flex"]
    mask = attend.block_mask(n, device="cpu", **inputs)
    assert torch.equal(mask.to_dense(), made[0].to_dense()), f"{case.name} at {n}: other blocks"
    return {
        "pattern": case.name,
        "n": n,
        "block": 128,
        "attnc_first_ms": round(first, 2),
        "attnc_ms": as_json(ours),
        "flex_first_ms": round(theirs_first, 1),
        "flex_ms": as_json(theirs),
        "flex_over_attnc": round(theirs.median / ours.median, 1),
    }


def line(row: Row) -> str:
    """A row as text."""
    ours, theirs = row["attnc_ms"], row["flex_ms"]
    return (
        f"{row['pattern']!s:24} n={row['n']!s:6} attnc {ours['median']:8.1f} ms   create_block_mask "
        f"{theirs['median']:9.1f} ms   {row['flex_over_attnc']}×"
    )
