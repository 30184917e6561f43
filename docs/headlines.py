"""The calls at which the catalogue shows each pattern: preset, length, heads and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.commands.simulate_cases import HEADS, LENGTH

Inputs = Callable[[int], Mapping[str, Any]]
"""A function that returns a call's inputs for its number of tokens; only shapes and inputs of relations matter."""


def _none(n: int) -> Mapping[str, Any]:
    del n
    return {}


@dataclass(frozen=True)
class Headline:
    """A call with heads of 128 in bfloat16. `length`: None for the length of the preset's grid, or 16,384."""

    preset: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    keys: int | None = None
    heads: int = HEADS
    kv_heads: int | None = None
    head_dim: int = 128
    inputs: Inputs = _none


def _blank(*shape: int) -> Tensor:
    """Return a tensor of which only the shape is read."""
    return torch.zeros(()).expand(shape)


def _blocks_drawn(n: int) -> Mapping[str, Any]:
    """Draw three blocks for each block of 64 tokens, always the same."""
    blocks = n // 64
    return {"random": torch.randint(blocks, (1, blocks, 3), generator=torch.Generator().manual_seed(0))}


def _drafted(n: int) -> Mapping[str, Any]:
    """Return a binary tree of n drafted tokens after a prompt."""
    sees = torch.eye(n, dtype=torch.bool)
    for node in range(1, n):
        sees[node] |= sees[(node - 1) // 2]
    return {"prefix": torch.tensor([LENGTH]), "ancestor": sees[None]}


def _three_in_ten(n: int) -> Mapping[str, Any]:
    """Draw a map of blocks of 128 in which each row has three in ten."""
    blocks = n // 128
    scores = torch.rand((1, 1, blocks, blocks), generator=torch.Generator().manual_seed(0))
    return {"map": scores.argsort(-1).argsort(-1) < int(0.3 * blocks) + 1}


def _cached(n: int) -> Mapping[str, Any]:
    del n
    return {"cached": torch.arange(4096).mul(7)[None, None], "since": torch.tensor([32768 - 50])}


HEADLINES: dict[str, Headline] = {
    "attention_residual": Headline(inputs=lambda n: {"x": _blank(1, n, 32, 128), "w": _blank(128)}),
    "autoformer_lags": Headline(length=96, inputs=lambda n: {"lag": torch.arange(4)[None]}),
    "bigbird": Headline(length=4096, heads=1, inputs=_blocks_drawn),
    "deepseek_sparse": Headline(
        length=4096,
        inputs=lambda n: {"iq": _blank(1, n, 64, 128), "ik": _blank(1, n, 128), "w": _blank(1, n, 64)},
    ),
    "hyper_attention": Headline(
        length=8192, heads=32, head_dim=64, inputs=lambda n: {"sample": _blank(1, 32, 256).long()}
    ),
    "block_diffusion": Headline(length=8192),
    "blocked": Headline(length=32768, heads=1),
    "davit_window": Headline(heads=3, head_dim=32),
    "dynamic_mask": Headline(length=4096, inputs=lambda n: {"bias": _blank(1, HEADS, n)}),
    "freeswim": Headline(params={"frames": 5}, heads=12),
    "gpt_oss": Headline(heads=64, kv_heads=8, head_dim=64),
    "longformer": Headline(length=4096, head_dim=64),
    "monarch_rt": Headline(params={"frames": 3}, heads=12),
    "routing_transformer": Headline(length=8192),
    "minference_blocks": Headline(length=131072, heads=32, kv_heads=8),
    "minference_vertical_slash": Headline(length=131072, heads=32, kv_heads=8),
    "mminference_boundary": Headline(length=8192),
    "moba": Headline(length=32768, heads=16),
    "native_sparse": Headline(length=65536, heads=64, kv_heads=4),
    "neighborhood_1d": Headline(length=32768, heads=1),
    "neighborhood_2d": Headline(heads=24),
    "neighborhood_3d": Headline(heads=24),
    "power": Headline(length=32768, heads=28, kv_heads=4),
    "radial": Headline(length=18 * 3840, heads=40),
    "rectified": Headline(length=8192, inputs=lambda n: {"neighbour": torch.eye(n // 128, dtype=torch.bool)}),
    "recycled": Headline(length=1, keys=32768, heads=1, inputs=_cached),
    "s2_attention": Headline(length=65536, heads=32, kv_heads=8),
    "seer": Headline(length=32768, heads=32, inputs=lambda n: {x: _blank(1, 32, n // 64, 128) for x in ("gq", "gk")}),
    "seer_decode": Headline(
        length=1, keys=32768, heads=32, kv_heads=8, inputs=lambda n: {"gate": _blank(1, 8, 1, 512)}
    ),
    "sliding_tile": Headline(length=30 * 48 * 80, heads=24),
    "sparse_d": Headline(length=8192, heads=1, inputs=_three_in_ten),
    "ssa_random": Headline(length=8192),
    "svg": Headline(inputs=lambda n: {"temporal": torch.zeros((1, HEADS), dtype=torch.bool)}),
    "tree_verify": Headline(length=64, keys=LENGTH + 64, inputs=_drafted),
    "xattention": Headline(length=131072, heads=32, kv_heads=8),
}
"""Headlines that differ from the first preset at its grid or 16,384 tokens, with 8 heads and example inputs."""
