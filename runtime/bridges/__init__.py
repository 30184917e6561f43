"""Bridges between attnc and other attention interfaces: their masks as patterns, and patterns as their masks.

Names are imported on first use, as in `attnc` itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnc.runtime.bridges.block_masks import from_block_mask
    from attnc.runtime.bridges.diffusers import DiffusersProcessor, install_diffusers
    from attnc.runtime.bridges.given_attention import GivenAttention
    from attnc.runtime.bridges.sdpa import from_sdpa_mask, sdpa_mask
    from attnc.runtime.bridges.transformers import register_transformers
    from attnc.runtime.bridges.window_counts import from_flash_window, from_transformers_window

_HOMES = {
    "DiffusersProcessor": "attnc.runtime.bridges.diffusers",
    "GivenAttention": "attnc.runtime.bridges.given_attention",
    "from_block_mask": "attnc.runtime.bridges.block_masks",
    "from_flash_window": "attnc.runtime.bridges.window_counts",
    "from_sdpa_mask": "attnc.runtime.bridges.sdpa",
    "from_transformers_window": "attnc.runtime.bridges.window_counts",
    "install_diffusers": "attnc.runtime.bridges.diffusers",
    "register_transformers": "attnc.runtime.bridges.transformers",
    "sdpa_mask": "attnc.runtime.bridges.sdpa",
}

__all__ = [
    "DiffusersProcessor",
    "GivenAttention",
    "from_block_mask",
    "from_flash_window",
    "from_sdpa_mask",
    "from_transformers_window",
    "install_diffusers",
    "register_transformers",
    "sdpa_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnc.bridges' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
