"""Decode: does the time of one token against a cache depend on the visible keys or on the whole cache?

The first layer of a step has a new length, so its visible keys are computed; `attnc` is every other layer. Rivals are
torch's SDPA with a mask over the whole cache, and SDPA over only the visible keys, which are found before timing: as
slices if they are contiguous, else copied by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import exact
import torch
from benchmark_part import Row, Setting
from timing import as_json, interleaved
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.executors.cpu.cpu_decoding import look
from attnc.runtime.executors.pattern_parts import attentions_of

HEADS, KV_HEADS, DIM = 8, 2, 64
LENGTHS = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
ROUNDS = 7
REFERENCE = 1 << 16
"""Maximum number of keys for which a row is compared with the reference."""

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding_window", {"window": 4096}),
    ("sliding_window", {"window": 4096, "sinks": 4}),
    ("dilated_window", {"window": 4096, "dilation": 4}),
    ("power", {"window": 5, "block": 256}),
    ("strided", {"stride": 128, "local": 128}),
    ("causal", {}),
    ("alibi", {}),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each pattern and length of the cache."""
    for name, params in CASES:
        for n in (1 << 13,) if setting.toy else LENGTHS:
            arguments = ", ".join(f"{key}={value}" for key, value in params.items())
            key = f"{name}({arguments}) n={n}"
            if key not in setting.done:
                yield {"key": key} | _row(name, params, n, 1 if setting.toy else ROUNDS)


def _row(name: str, params: dict[str, Any], n: int, rounds: int) -> Row:
    torch.manual_seed(0)
    attend = compile_attention(name, **params)
    q = torch.randn(1, HEADS, 1, DIM)
    k, v = (torch.randn(1, KV_HEADS, n, DIM) for _ in range(2))
    row: Row = {"pattern": name, "params": params, "n": n, "d": DIM, "dtype": "float32", "direction": "forward"}
    row |= {"heads": HEADS, "kv_heads": KV_HEADS}
    growing = count(n - 200)
    with torch.no_grad():
        seen = _seen(attend, n)
        error_by_name = exact.errors({"out": attend.decode(q, k, v, kv_len=n)}, {"out": _true(attend, q, k, v, seen)})
        row |= {
            "visible": len(seen),
            "errors": error_by_name,
            "ok": error_by_name["out"] <= exact.TOLERANCE[torch.float32],
        }
        if not row["ok"]:
            return row
        contenders: dict[str, Callable[[], object]] = {
            "attnc": lambda: attend.decode(q, k, v, kv_len=n),
            "attnc, first layer": lambda: attend.decode(q, k, v, kv_len=next(growing)),
        }
        if attend.is_plain:
            contenders |= _by_torch(q, k, v, seen, n)
        times = interleaved(contenders, rounds)
    return row | {"ms": {key: as_json(timing) for key, timing in times.items()}}


def _true(attend: Attention, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Compute the result in fp64: by the reference, or above `REFERENCE` keys over only the visible keys."""
    wide = [x.double() for x in (q, k, v)]
    if k.shape[2] <= REFERENCE or not attend.is_plain:
        out: Tensor = attend.reference(*wide)
        return out
    keys, values = (x.index_select(2, seen) for x in wide[1:])
    return F.scaled_dot_product_attention(wide[0], keys, values, enable_gqa=True)


def _seen(attend: Attention, n: int) -> Tensor:
    """Return the keys that the last row sees, in order."""
    sizes = TensorSizes(1, n, 1, HEADS, KV_HEADS, DIM, DIM, "float32")
    ((_, planner),) = attentions_of(attend._core.last_rows.planner).planners(sizes, {})
    return torch.from_numpy(look(planner, sizes, {}).parts[0].seen.every[0])


def _by_torch(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, n: int) -> dict[str, Callable[[], object]]:
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[:, seen] = True
    first, last = int(seen[0]), int(seen[-1]) + 1
    if last - first == len(seen):
        visible = k[:, :, first:last], v[:, :, first:last]
        return {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
            "dense, visible alone": lambda: F.scaled_dot_product_attention(q, *visible, enable_gqa=True),
        }
    return {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        "dense, visible alone": lambda: F.scaled_dot_product_attention(
            q, k.index_select(2, seen), v.index_select(2, seen), enable_gqa=True
        ),
    }
