"""A call of every library pattern: parameters if it has no defaults, a length, and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnc import compile_attention
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.toolchain.selection import PARAMETERS

PARAMS: Mapping[str, Mapping[str, Any]] = PARAMETERS
"""Parameters of patterns without defaults."""

SMALL: Mapping[str, Mapping[str, Any]] = {
    "bigbird": {"block": 16},
    "blocked": {"block": 24},
    "combiner": {"segment": 24},
    "combiner_axial": {"width": 12},
    "combiner_log_sparse": {"levels": 8},
    "combiner_mixture": {"width": 12},
    "davit_window": {"height": 8, "width": 12, "window": 4},
    "dilated_window": {"window": 40, "dilation": 2},
    "freeswim": {"frames": 2, "height": 6, "width": 8, "reach": [2, 3]},
    "gpt_oss": {"window": 20},
    "dhsa": {"rows": 16, "topk": 24, "near": 8, "first": 4},
    "halo": {"height": 8, "width": 12, "block": 4, "halo": 1},
    "hierarchical": {"group": 12},
    "hip": {"stages": [16, 4], "kept": [32, 16], "strides": [4, 1], "rows": 16, "sinks": 4, "window": 16},
    "landmark": {"block": 16},
    "lingen_temporal": {"frames": 4, "height": 4, "width": 6, "window": [2, 2, 2]},
    "log_sparse": {"segment": 24, "window": 4},
    "longformer": {"window": 16, "dilation": [1, 2]},
    "mminference_grid": {"strides": [8, 12], "probe": 16},
    "moa": {"alpha": [16, 32], "beta": [0.25, 0.125], "block": 16},
    "monarch": {"rows": 8, "cols": 12},
    "monarch_rt": {"frames": 3, "height": 4, "width": 8},
    "neighborhood_2d": {"height": 8, "width": 12, "window": [3, 5]},
    "neighborhood_3d": {"frames": 3, "height": 4, "width": 8, "window": [3, 3, 5]},
    "power": {"window": 2, "block": 8},
    "radial": {"frames": 4, "per_frame": 24, "block": 16},
    "s2_attention": {"block": 8, "local_blocks": 2, "vertical_stride": 4},
    "sliding_tile": {"frames": 3, "height": 4, "width": 8, "kernel": [3, 4, 8], "tile": [1, 4, 4]},
    "sliding_window": {"window": 40, "sinks": 4},
    "softcap": {"cap": 2, "window": 40},
    "sparse_fixed": {"segment": 16, "summary": 4},
    "sparse_transformer": {"stride": 16},
    "streaming": {"sinks": 3, "window": 30},
    "strided": {"stride": 16, "local": 16},
    "svg": {"frames": 4, "per_frame": 24, "block": 16},
    "videofactory": {"frames": 4, "height": 4, "width": 6, "window": [2, 2, 2]},
}
"""Parameters for which a few tokens show the form of a pattern."""

MULTIPLES: Mapping[str, int] = {"block_diffusion": 2, "long_lora": 4, "sink_lora": 4}
"""The number that divides the lengths of some patterns."""


WIDTH = 64
"""The head dimension."""


def made_inputs(name: str, n: int, heads: int) -> dict[str, Any]:
    """Return inputs for which no example is generated."""
    pick = torch.Generator().manual_seed(0)
    rows = -(-n // 64)
    match name:
        case "attention_residual":
            return {"x": torch.zeros(1, n, 3, WIDTH)}
        case "autoformer_lags":
            return {"lag": torch.randint(n, (1, 5), generator=pick)}
        case "hyper_attention":
            return {"sample": torch.randint(n, (1, heads, 16), generator=pick)}
        case "recycled":
            return {"cached": torch.randint(n, (1, heads, 16), generator=pick)}
        case "seer":
            return {gate: torch.randn(1, heads, rows, 16, generator=pick) for gate in ("gq", "gk")}
        case "sparse_d":
            return {"map": torch.rand((1, heads, rows, rows), generator=pick) < 0.4}
        case "bigbird":
            return {"random": torch.randint(rows, (heads, rows, 3), generator=pick)}
        case "dhsa":
            begin = torch.arange(n) // 11 * 11
            return {"begin": begin[None], "stop": (begin + 11).clamp(max=n)[None]}
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
    """Return a call of about n tokens, exactly n if the parameters leave the length open."""
    attention = compile_attention(name, **(PARAMS.get(name, {}) if params is None else params))
    natural = natural_length(attention.bound, n)
    length = n - n % MULTIPLES.get(name, 1) if natural is None else natural
    heads = head_count(attention.bound) or 4
    drawn_inputs = made_inputs(name, length, heads)
    names, sizes = attention.relation_inputs, {"dk": WIDTH, "dv": WIDTH}
    made = example_inputs(attention.bound, length, length, drawn_inputs, heads=heads, sizes=sizes, names=names)
    return LibraryCall(
        attention, length, heads, {**drawn_inputs, **{key: example.tensor for key, example in made.items()}}
    )
