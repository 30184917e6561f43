"""Cases of patterns with their own scores, from `scores/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cases.case import Shape, nothing, real
from cases.system import Mask, System, rows, unscaled
from reference import masks, scores

SQUARES = [Shape(n, n) for n in (1, 2, 37, 130)]
SHAPES = [*SQUARES, Shape(37, 37, 3, 3, batch=1), Shape(2, 2, 6, 6), Shape(130, 130, 7, 7, batch=1, dk=3, dv=17)]
FEWER_QUERIES = [Shape(1, 37), Shape(2, 130, 5, 5), Shape(36, 37, 3, 3), Shape(37, 130, 6, 3)]
DISTANCES = 6


def scored(
    name: str,
    reference: Callable[..., Any],
    params: Mapping[str, Any] | None = None,
    inputs: Callable[[Shape], dict[str, Tensor]] = nothing,
    mask: Mask | None = None,
    *,
    aligned: bool = True,
) -> System:
    """Return the system of a pattern whose reference also returns the LSE, for every shape."""
    settings = params or {}
    shapes = [*SHAPES, *FEWER_QUERIES] if aligned else SHAPES
    return System(name, unscaled(reference, **settings), shapes, settings, inputs, mask, has_lse=True, aligned=aligned)


CAUSAL, FULL = rows(masks.causal), rows(masks.full)


def near(window: int) -> Mask:
    """Return the mask of a causal window."""
    return rows(lambda n: masks.sliding_window(n, window))


def t5(**params: Any) -> System:
    def inputs(shape: Shape) -> dict[str, Tensor]:
        return {"table": real(shape.heads, params.get("buckets", 32))}

    return scored("t5", scores.t5, params, inputs, CAUSAL if params.get("causal") else FULL, aligned=False)


def distances(s: Shape) -> dict[str, Tensor]:
    return {"distance": torch.randint(0, DISTANCES, (s.batch, s.n_q, s.n_k)), "table": real(s.heads, DISTANCES)}


SYSTEMS = [
    scored("alibi", scores.alibi, mask=CAUSAL),
    scored("music_relative", scores.music_relative, {}, lambda s: {"E": real(s.heads, s.n_k + 3, s.dk)}, CAUSAL),
    scored("graphormer", scores.graphormer, {}, distances, FULL, aligned=False),
    scored("softcap", scores.softcap, mask=near(4096)),
    scored("softcap", scores.softcap, {"cap": 1.5, "window": 20}, mask=near(20)),
    scored("softcap", scores.softcap, {"cap": 0.25, "window": 1}, mask=near(1)),
    scored("fox", scores.fox, {}, lambda s: {"f": -real(s.batch, s.n_k, s.heads).abs()}, CAUSAL),
    t5(),
    t5(causal=True),
    t5(buckets=8, far=20),
    t5(buckets=12, far=100, causal=True),
]
CASES = [case for system in SYSTEMS for case in system.cases()]
