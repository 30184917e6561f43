"""A call of every library pattern: parameters where it has no defaults, a length, and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnc import compile_attention
from attnc.runtime.attention import Attention
from attnc.runtime.commands.patterns import natural_length
from attnc.runtime.example_inputs import example_inputs, head_count

PARAMS: Mapping[str, Mapping[str, Any]] = {
    "combiner": {"segment": 64},
    "davit_window": {"height": 24, "width": 32},
    "freeswim": {"frames": 4, "height": 12, "width": 16, "reach": [2, 3]},
    "halo": {"height": 24, "width": 32},
    "hierarchical": {"group": 16},
    "lingen_temporal": {"frames": 8, "height": 8, "width": 12},
    "log_sparse": {"segment": 256, "window": 16},
    "longformer": {"dilation": [1, 2]},
    "moa": {"alpha": [64, 128], "beta": [0.25, 0.125]},
    "monarch": {"rows": 32, "cols": 32},
    "monarch_rt": {"frames": 4, "height": 8, "width": 8},
    "neighborhood_2d": {"height": 32, "width": 40},
    "neighborhood_3d": {"frames": 8, "height": 12, "width": 16},
    "radial": {"frames": 6, "per_frame": 256},
    "sliding_tile": {"frames": 6, "height": 16, "width": 16, "kernel": [4, 8, 8], "tile": [2, 4, 4]},
    "svg": {"frames": 6, "per_frame": 64},
    "videofactory": {"frames": 8, "height": 8, "width": 12},
}
"""Of patterns whose parameters have no defaults."""

MULTIPLES: Mapping[str, int] = {"block_diffusion": 2, "long_lora": 4}
"""What the lengths of some have to be multiples of."""


def made_inputs(name: str, n: int, heads: int) -> dict[str, Any]:
    """Inputs that no example is made of."""
    pick = torch.Generator().manual_seed(0)
    rows = -(-n // 64)
    match name:
        case "attention_residual":
            return {"x": torch.zeros(1, n, 3, 64)}
        case "autoformer_lags":
            return {"lag": torch.randint(n, (1, 5), generator=pick)}
        case "bigbird":
            return {"random": torch.randint(rows, (heads, rows, 3), generator=pick)}
        case "tree_verify":
            return {"prefix": torch.tensor([n // 2]), "ancestor": torch.ones(1, n, n, dtype=torch.bool).tril()}
        case _:
            return {}


@dataclass(frozen=True)
class LibraryCall:
    """A pattern, its length, heads and inputs."""

    attention: Attention
    n: int
    heads: int
    inputs: Mapping[str, Any] = field(default_factory=dict)


def library_call(name: str, n: int, params: Mapping[str, Any] | None = None) -> LibraryCall:
    """A call of about n tokens, exactly so many where the parameters leave the length open."""
    attention = compile_attention(name, **(PARAMS.get(name, {}) if params is None else params))
    natural = natural_length(attention.bound, n)
    length = n - n % MULTIPLES.get(name, 1) if natural is None else natural
    heads = head_count(attention.bound) or 4
    given = made_inputs(name, length, heads)
    made = example_inputs(attention.bound, length, length, given, heads=heads, names=attention.relation_inputs)
    return LibraryCall(attention, length, heads, {**given, **{key: one.tensor for key, one in made.items()}})
