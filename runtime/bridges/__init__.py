"""Bridges to other attention interfaces: what attnc says in their words, and what they say in ours.

Names are imported when first used, as `attnc` does it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnc.runtime.bridges.diffusers import DiffusersProcessor, install_diffusers
    from attnc.runtime.bridges.transformers import register_transformers

_HOMES = {
    "DiffusersProcessor": "attnc.runtime.bridges.diffusers",
    "install_diffusers": "attnc.runtime.bridges.diffusers",
    "register_transformers": "attnc.runtime.bridges.transformers",
}

__all__ = [
    "DiffusersProcessor",
    "install_diffusers",
    "register_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnc.bridges' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
