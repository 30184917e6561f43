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
from attnc.runtime.gpu.selection import PARAMETERS

PARAMS: Mapping[str, Mapping[str, Any]] = PARAMETERS
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
