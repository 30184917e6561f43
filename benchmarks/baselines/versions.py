"""The installed rivals and their versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from baselines import fla, flash_attention, flashinfer, flex, lightning, mamba, natten, nsa_triton, sdpa

RIVALS: Mapping[str, Callable[[], str | None]] = {
    module.NAME: module.available
    for module in (sdpa, flex, fla, lightning, mamba, natten, flash_attention, flashinfer, nsa_triton)
}


def versions() -> dict[str, str | None]:
    """Return the version of each rival, None if it cannot be imported."""
    return {name: available() for name, available in RIVALS.items()}
