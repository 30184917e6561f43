"""Cases of routing by anchors, predicted maps, buckets, routers and noise, each with a reference file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cases.case import real
from cases.routing import DK, HEADS, KV_HEADS, Inputs, Routed, case_of
from reference.routing import blocks_of


def beside(block: int) -> Callable[[int, int], Inputs]:
    """Draw neighbouring blocks in a row of two; the map has more blocks than the call."""

    def draw(n_q: int, n_k: int) -> Inputs:
        rows, cols = torch.arange(blocks_of(n_q, block) + 1), torch.arange(blocks_of(n_k, block) + 2)
        return {"neighbour": rows[:, None] // 2 == cols // 2}

    return draw


def searches(n_q: int, n_k: int) -> Inputs:
    return {"search": real(2, HEADS, n_q, DK)}


def predicted(n_q: int, n_k: int) -> Inputs:
    return {"coef": real(2, HEADS, n_q, 3).softmax(-1), "basis": real(n_k, 3).abs()}


def buckets(count: int) -> Callable[[int, int], Inputs]:
    def draw(n_q: int, n_k: int) -> Inputs:
        return {
            "merged": torch.randint(1, 9, (2, KV_HEADS, n_k)),
            "qbucket": torch.randint(0, count, (2, HEADS, n_q)),
            "kbucket": torch.randint(0, count, (2, KV_HEADS, n_k)),
        }

    return draw


def requests(n_q: int, n_k: int) -> Inputs:
    return {"full": torch.tensor([True, False])}


def filters(width: int) -> Callable[[int, int], Inputs]:
    return lambda n_q, n_k: {"filter": real(KV_HEADS, width, DK)}


def noise(much: float) -> Callable[[int, int], Inputs]:
    return lambda n_q, n_k: {"place": torch.arange(n_k) + much * real(2, n_k)}


def pictures(n_q: int, n_k: int) -> Inputs:
    """Draw kinds of tokens: text, a picture, text, with the picture at another position in each batch entry."""
    position = torch.arange(n_k)
    vision = torch.stack([(position % 11 > 3) & (position % 11 < 8), (position >= 5) & (position < 20)])
    return {"vision": vision, "visuals": vision.cumsum(1)}


WINDOWS: dict[str, Any] = {"window": [6, 3, 0, 9], "sinks": [1, 4, 2, 0]}

RARE = [
    *[
        Routed("rectified", n, n, {"block": 8, "drop": drop, "p": p, "first": first}, beside(8))
        for n, drop, p, first in ((40, 0.75, 0.3, 0), (43, 0.5, 0.6, 2), (61, 1, 0, 0), (9, 0.1, 0.9, 1))
    ],
    *[
        Routed("superlinear", n_q, n_k, {"near": near, "topk": topk, "back": back, "ahead": ahead}, searches)
        for n_q, n_k, near, topk, back, ahead in (
            (41, 41, 1, 2, 0.5, 0.25),
            (7, 41, 1, 2, 1, 0),
            (37, 37, 2, 1, 0.2, 0.3),
            (53, 53, 1, 9, 0, 0),
            (3, 3, 1, 2, 1, 0),
        )
    ],
    *[Routed("sparsifiner", n, n, {"rho": rho}, predicted) for n, rho in ((37, 0.25), (17, 0.1), (9, 1), (33, 0))],
    *[Routed("temp_cache", n_q, n_k, {}, buckets(count)) for n_q, n_k, count in ((37, 37, 4), (11, 45, 3), (19, 7, 2))],
    *[
        Routed("flux", n_q, n_k, {"sinks": sinks, "window": window, "block": block}, requests)
        for n_q, n_k, sinks, window, block in ((37, 37, 4, 8, 4), (11, 45, 0, 6, 3), (21, 21, 5, 7, 1))
    ],
    *[
        Routed("flash_moba", n_q, n_k, {"block": block, "topk": topk}, filters(width))
        for n_q, n_k, block, topk, width in ((37, 37, 8, 3, 3), (11, 37, 4, 4, 5), (5, 5, 8, 3, 1), (61, 61, 8, 1, 4))
    ],
    *[
        Routed("ssa_random", n_q, n_k, {"window": w}, noise(much))
        for n_q, n_k, w, much in ((37, 37, 8, 3.0), (11, 45, 4, 99.0))
    ],
    Routed("ssa_random", 61, 61, {"window": 16}, noise(0.0)),
    *[
        Routed("mminference_boundary", n_q, n_k, {**WINDOWS, "split_keys": split}, pictures)
        for n_q, n_k in ((37, 37), (13, 41), (5, 5))
        for split in (True, False)
    ],
]

FIXED = frozenset({"coef", "basis", "place"})
"""Inputs that only affect selections, and therefore have no gradient."""


CASES = [case_of(routed, FIXED) for routed in RARE]
