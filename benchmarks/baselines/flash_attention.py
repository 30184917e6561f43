"""FlashAttention by its authors: version 3 if installed (`flash_attn_interface`), else version 2 (`flash_attn`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from baselines.rival import Absent, Attend, Mask, imported, version

NAME = "FlashAttention"
MODULES = ("flash_attn_interface", "flash_attn")


def available() -> str | None:
    """Return the version with the module's name, preferring the newer module."""
    for module in MODULES:
        found = version(module, "flash_attn_3", "flash-attn") if module == MODULES[0] else version(module, "flash-attn")
        if found is not None:
            return f"{module} {found}"
    return None


def attend(mask: Mask, device: str, *, deterministic: bool = False) -> Attend | Absent:
    """Return full, causal or window attention on a GPU."""
    module = _module()
    if isinstance(module, Absent):
        return module
    if device != "cuda":
        return Absent("FlashAttention has no kernel on a CPU")
    if mask.window is None:
        return Absent("FlashAttention cannot express the mask")
    window, more = mask.window, {"deterministic": True} if deterministic else {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found: Any = module.flash_attn_func(q, k, v, causal=mask.causal, window_size=window, **more)
        return _tensor(found).transpose(1, 2)

    return run


def decode(lengths: Tensor) -> Attend | Absent:
    """Return a decode step of q (batch, heads, 1, width) on caches (batch, kv heads, slots, width), `lengths` full."""
    module = _module()
    if isinstance(module, Absent):
        return module

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _tensor(module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)).transpose(1, 2)

    return run


def _module() -> Any:
    for name in MODULES:
        found = imported(name)
        if found is not None:
            return found
    return Absent("FlashAttention is not installed")


def _tensor(found: Any) -> Tensor:
    """Return the output; some versions return it with the log-sum-exp."""
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out
