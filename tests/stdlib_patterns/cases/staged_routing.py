"""Cases of routing in stages, by the caller's chunks and by strides, from `routing/`; each has a reference file."""

from __future__ import annotations

from typing import Any

import torch

from cases.routing import Inputs, Routed, case_of

HIP: dict[str, Any] = {
    **{"stages": (16, 8, 4), "kept": (48, 24, 8), "strides": (2, 2, 1)},
    **{"rows": 8, "sinks": 5, "window": 16},
}
DHSA: dict[str, Any] = {"rows": 8, "topk": 17, "near": 5, "first": 3}
GRID: dict[str, Any] = {"strides": (3, 4, 7), "probe": 9}


def pieces(n_q: int, n_k: int) -> Inputs:
    """Draw pieces of 1 to 11 keys, different in each batch entry."""
    bounds = torch.zeros(2, 2, n_k, dtype=torch.int64)
    for batch in range(2):
        start = 0
        while start < n_k:
            stop = min(start + int(torch.randint(1, 12, ())), n_k)
            bounds[0, batch, start:stop], bounds[1, batch, start:stop] = start, stop
            start = stop
    return {"begin": bounds[0], "stop": bounds[1]}


STAGED = [
    *[Routed("hip", n_q, n_k, HIP) for n_q, n_k in ((77, 77), (37, 93), (1, 90), (21, 21))],
    Routed("hip", 77, 77, {"stages": (8, 2), "kept": (16, 4), "strides": (3, 1), "rows": 7, "sinks": 0, "window": 9}),
    Routed("hip", 29, 29, {"stages": (1,), "kept": (4,), "strides": (1,), "rows": 1, "sinks": 0, "window": 1}),
    *[Routed("dhsa", n_q, 61, {**DHSA, "rows": rows}, pieces) for n_q, rows in ((61, 8), (20, 8), (20, 1), (1, 8))],
    Routed("dhsa", 9, 9, {**DHSA, "topk": 50}, pieces),
    *[Routed("mminference_grid", n_q, n_k, GRID) for n_q, n_k in ((53, 53), (20, 61), (9, 9), (9, 34))],
]
CASES = [*map(case_of, STAGED)]
