"""Making a BlockMask from live tiles, against create_block_mask on the same mask_mod, compiled and eager.

Both must have equal blocks before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from baselines import flex, rival
from benchmark_part import Row, Setting
from timing import as_json, interleaved, once
from torch.nn.attention.flex_attention import BlockMask

from attnc import compile_attention

EAGER, ROUNDS = 8192, 7
"""Maximum tokens for eager create_block_mask, which stores every pair in 64 bits several times (at 16,384 tokens more
than 24 GB for `power`), and the number of rounds."""


@dataclass(frozen=True)
class BlockMaskCase:
    """A pattern with its parameters, and its number of documents."""

    name: str
    spec: str
    params: dict[str, Any] = field(default_factory=dict)
    documents: int = 0

    def at(self, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return parameters and inputs at a length."""
        if self.spec == "neighborhood_2d":
            height = 1 << (n.bit_length() - 1) // 2
            return {**self.params, "height": height, "width": n // height}, {}
        draw = torch.Generator().manual_seed(0)
        doc = torch.randint(self.documents, (1, n), generator=draw).sort().values if self.documents else None
        return self.params, {} if doc is None else {"doc": doc}


CASES = (
    BlockMaskCase("causal", "causal"),
    BlockMaskCase("window 4096 + 4 sinks", "sliding_window", {"window": 4096, "sinks": 4}),
    BlockMaskCase("power 256, 5", "power"),
    BlockMaskCase("neighborhood 13 x 13", "neighborhood_2d", {"window": 13}),
    BlockMaskCase("40 documents", "document", documents=40),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each case and length; create_block_mask, which takes long, is timed twice after compilation."""
    for n in (1024,) if setting.toy else (EAGER, 32768):
        for case in CASES:
            if (key := f"{case.name} n={n} block 128") not in setting.done:
                yield {"key": key} | _row(case, n, 1 if setting.toy else ROUNDS)


def _row(case: BlockMaskCase, n: int, rounds: int) -> Row:
    params, inputs = case.at(n)
    attend = compile_attention(case.spec, **params)
    make = partial(attend.block_mask, n, device="cpu", **inputs)
    first = {"attnc": round(once(make), 2)}
    mask = rival.Mask(n, attend.mask_mod(n, device="cpu", **inputs))
    flex.forget()
    theirs: dict[str, Callable[[], BlockMask]] = {"flex": flex.maker(mask, "cpu", compiled=True)}
    if n <= EAGER:
        theirs["flex, eager"] = flex.maker(mask, "cpu", compiled=False)
    made: list[BlockMask] = []
    first["flex"] = round(once(lambda: made.append(theirs["flex"]())), 2)
    same = torch.equal(make().to_dense(), made[0].to_dense())
    row: Row = {"pattern": case.name, "n": n, "block": 128, "first_ms": first, "ok": same}
    if not same:
        return row
    times = interleaved({"attnc": make}, rounds) | interleaved(theirs, 2, 0)
    return row | {"ms": {name: as_json(time) for name, time in times.items()}}
