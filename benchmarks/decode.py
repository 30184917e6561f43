"""One token against a cache: does a step cost what is visible, or what the cache holds?

`attnc_step` is the first layer of a step: the length is new, so who sees what is looked for. `attnc_layer` is every
other layer. Beside them torch's SDPA with a mask over the whole cache, and over the visible keys alone, found before
and not timed: as slices where they are one stretch, else copied by index. Above 1 attnc's layer is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from timing import as_json, interleaved
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention
from attnc.runtime.call import Sizes
from attnc.runtime.cpu.decoding import look
from attnc.runtime.general import steps_of

Row = dict[str, Any]

HEADS, KV_HEADS, DIM = 8, 2, 64

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding_window", {"window": 4096}),
    ("sliding_window", {"window": 4096, "sinks": 4}),
    ("dilated_window", {"window": 4096, "dilation": 4}),
    ("power", {"window": 5, "block": 256}),
    ("strided", {"stride": 128, "local": 128}),
    ("causal", {}),
    ("alibi", {}),
)


def rows(lengths: list[int], rounds: int, patterns: list[str] | None) -> Iterator[Row]:
    """A row for each pattern and length of the cache."""
    for name, params in CASES:
        if patterns is None or any(part in name for part in patterns):
            for n in lengths:
                yield _row(name, params, n, rounds)


def _row(name: str, params: dict[str, Any], n: int, rounds: int) -> Row:
    torch.manual_seed(0)
    attend = compile_attention(name, **params)
    q = torch.randn(1, HEADS, 1, DIM)
    k, v = (torch.randn(1, KV_HEADS, n, DIM) for _ in range(2))
    growing = count(n - 200)
    with torch.no_grad():
        contenders: dict[str, Callable[[], object]] = {
            "attnc_step": lambda: attend.decode(q, k, v, kv_len=next(growing)),
            "attnc_layer": lambda: attend.decode(q, k, v, kv_len=n),
        }
        seen = _seen(attend, n)
        if attend.is_plain:
            contenders |= _by_torch(q, k, v, seen, n)
        found = interleaved(contenders, rounds)
    row: Row = {"pattern": name, "params": params, "n": n, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    row["visible"] = len(seen)
    row |= {f"{key}_ms": as_json(timing) for key, timing in found.items()}
    own = found["attnc_layer"].median
    return row | {f"{key}_over_attnc": t.median / own for key, t in found.items() if not key.startswith("attnc")}


def _seen(attend: Attention, n: int) -> Tensor:
    """The keys that the last row sees, in order."""
    sizes = Sizes(1, n, 1, HEADS, KV_HEADS, DIM, DIM, "float32")
    ((_, planner),) = steps_of(attend._last_rows._planner).planners(sizes, {})
    return torch.from_numpy(look(planner, sizes, {}).parts[0].seen.every[0])


def _by_torch(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, n: int) -> dict[str, Callable[[], object]]:
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[:, seen] = True
    first, last = int(seen[0]), int(seen[-1]) + 1
    if last - first == len(seen):
        own = k[:, :, first:last], v[:, :, first:last]
        return {
            "sdpa_all": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
            "sdpa_visible": lambda: F.scaled_dot_product_attention(q, *own, enable_gqa=True),
        }
    return {
        "sdpa_all": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        "sdpa_visible": lambda: F.scaled_dot_product_attention(
            q, k.index_select(2, seen), v.index_select(2, seen), enable_gqa=True
        ),
    }


def line(row: Row) -> str:
    """A row for people."""
    ratios = "  ".join(f"{key.removesuffix('_over_attnc')} {row[key]:.2f}×" for key in row if "_over_" in key)
    step, layer = row["attnc_step_ms"]["median"], row["attnc_layer_ms"]["median"]
    params = ", ".join(f"{name}={value}" for name, value in row["params"].items())
    return (
        f"{row['pattern']}({params})".ljust(44) + f" n={row['n']:<8} visible {row['visible']:<8} "
        f"first layer {step:8.2f} ms, others {layer:8.2f} ms   {ratios}"
    )
