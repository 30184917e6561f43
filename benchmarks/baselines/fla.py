"""flash-linear-attention: the chunked kernels of a recurrence, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from baselines.rival import Absent, Attend, imported, version

NAME = "flash-linear-attention"

Tensors = Mapping[str, Tensor]
"""The operands q, k, v and the inputs of a recurrence, (batch, tokens, heads, …), in the layout of the rival."""
Run = Callable[[Tensors], Tensor]

FUNCTIONS: Mapping[str, tuple[str, str]] = {
    "retention": ("fla.ops.retention", "chunk_retention"),
    "gla": ("fla.ops.gla", "chunk_gla"),
    "gated_delta_net": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kimi_delta": ("fla.ops.kda", "chunk_kda"),
    "lightning": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "mamba2_ssd": ("fla.ops.simple_gla", "chunk_simple_gla"),
}
"""Functions by attnc's name. `lightning` is what the rival's chunk_lightning_attn calls, with decays as arguments."""


def available() -> str | None:
    """Return the version."""
    return version("fla", "fla-core", "flash-linear-attention")


def recurrence(name: str, *, scale: float | None = None, decay: Tensor | None = None) -> Run | Absent:
    """Return a recurrence by attnc's name; `scale` of the scores, by default 1/√width; `decay`: constant log-decays."""
    module_name, function_name = FUNCTIONS[name]
    module = imported(module_name)
    if module is None:
        return Absent("flash-linear-attention is not installed")
    function: Any = getattr(module, function_name)
    more = {} if decay is None else {"g_gamma": decay}

    def run(tensors: Tensors) -> Tensor:
        words = dict(tensors)
        if "dt" in words:  # its kernels take no step size, so the written values are scaled before the call
            dt = words.pop("dt")
            words["v"] = words["v"] * dt[..., None].to(words["v"].dtype)
        width = tensors["q"].shape[-1]
        out: Tensor = function(**words, **more, scale=width**-0.5 if scale is None else scale)[0]
        return out

    return run


def blocks(chosen: Tensor, block: int) -> Attend | Absent:
    """Return causal attention to the blocks of `chosen`, (batch, tokens, kv heads, topk), −1 for none: ungated NSA.

    The call also computes the block means from which it would select by itself. Groups have 16 heads or more.
    """
    module: Any = imported("fla.ops.nsa")
    if module is None:
        return Absent("flash-linear-attention is not installed")
    places = chosen.long()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        words = {"block_indices": places, "block_counts": places.shape[-1], "block_size": block}
        out: Tensor = module.parallel_nsa(q, k, v, **words)
        return out.transpose(1, 2)

    return run
