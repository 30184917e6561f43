"""Planning allocates no array of N²/4096 elements or more, not even a temporary one."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allocations import counted
from attnc import compile_attention
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.planning import pieces
from attnc.compiler.planning.runs import run_mask
from attnc.runtime.texts.library import pattern_names

LENGTH = 1 << 16
TEXT = 256
VIDEO: dict[str, Any] = {"frames": 16, "height": 64, "width": 64}
GRID: dict[str, Any] = {"height": 256, "width": 256}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "combiner": ({"segment": 8192}, LENGTH, 2),
    "combiner_axial": ({"width": 256}, LENGTH, 1),
    "combiner_mixture": ({"width": 256}, LENGTH, 1),
    "davit_window": (GRID, LENGTH, 1),
    "halo": (GRID, LENGTH, 1),
    "hierarchical": ({"group": 256}, LENGTH, 2),
    "lingen_temporal": (VIDEO, LENGTH, 1),
    "monarch": ({"rows": 256, "cols": 256}, LENGTH, 1),
    "monarch_rt": ({"frames": 16, "height": 64, "width": 64}, LENGTH, 1),
    "videofactory": (VIDEO, LENGTH, 1),
    "freeswim": (VIDEO, LENGTH, 1),
    "log_sparse": ({"segment": 512, "window": 128}, LENGTH, 1),
    "moa": ({"alpha": [64, 1024], "beta": [Fraction(1, 4), Fraction(1, 8)]}, LENGTH, 2),
    "neighborhood_2d": ({"height": 256, "width": 256}, LENGTH, 1),
    "neighborhood_3d": (VIDEO, LENGTH, 1),
    "radial": ({"frames": 18, "per_frame": 3840}, 18 * 3840, 1),
    "sliding_tile": ({"frames": 30, "height": 48, "width": 80}, 30 * 48 * 80 + TEXT, 1),
}
"""Parameters, tokens and heads of patterns that need particular ones; the others are planned for two heads."""

READS_INPUTS = {
    "attention_residual",
    "autoformer_lags",
    "bigbird",
    "document",
    "longformer",
    "modality_mutual",
    "prefix_lm",
    "svg",
    "tree_verify",
}


def test_every_array_is_seen() -> None:
    with counted() as seen:
        np.ones((100, 1000)) + 1
        np.zeros(12345, dtype=np.bool_)
    assert seen.size == 800_000
    assert seen.count >= 3
    before = seen.size
    np.ones(1_000_000)
    assert seen.size == before


WORDS = {"log_sparse", "sparse_fixed"}
"""Patterns whose largest arrays hold integers of eight bytes; their masks are measured one by one."""


@pytest.mark.parametrize("name", sorted(set(pattern_names()) - READS_INPUTS))
def test_nothing_quadratic_is_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are counted in bytes, which are at least the number of elements."""
    parameters, n, heads = CASES.get(name, ({}, LENGTH, 2))
    attention = compile_attention(name, **parameters)
    masks = _sizes_of_masks(monkeypatch)
    with counted() as seen:
        plan = attention.plan(n, heads=heads)
    limit = n * n // 4096
    assert plan.groups or all(part.groups for _, part in plan.branches)
    assert seen.count > 0
    assert seen.size < limit * (8 if name in WORDS else 1), f"{seen.size} bytes in one array, the limit is {limit}"
    assert max(masks, default=0) < limit


def _sizes_of_masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the size of each mask that tiles and runs compute."""
    sizes: list[int] = []

    def watched(make: Callable[..., NDArray[np.bool_]]) -> Callable[..., NDArray[np.bool_]]:
        def made(*args: Any, **options: Any) -> NDArray[np.bool_]:
            mask = make(*args, **options)
            sizes.append(mask.size)
            return mask

        return made

    monkeypatch.setattr(exact_evaluation, "mask", watched(exact_evaluation.mask))
    monkeypatch.setattr(pieces, "run_mask", watched(run_mask))
    return sizes
