"""Lightning Attention-2 (OpenNLPLab/lightning-attention): linear attention with a constant decay a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from baselines.rival import Absent, Attend, imported, version

NAME = "Lightning Attention-2"


def available() -> str | None:
    """Return the version."""
    return version("lightning_attn.ops", "lightning_attn", "lightning-attn")


def attend(decay: Tensor, device: str) -> Attend | Absent:
    """Return causal attention with log-decays (heads,), at most 0; scores are unscaled."""
    module: Any = imported("lightning_attn.ops")
    if module is None:
        return Absent("lightning_attn is not installed")
    if device != "cuda":
        return Absent("lightning_attn has no kernel on a CPU")
    slopes = -decay.float()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.lightning_attn_func(q, k, v, slopes)
        return out

    return run
