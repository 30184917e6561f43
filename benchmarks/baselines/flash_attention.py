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
        name_and_version = (
            version(module, "flash_attn_3", "flash-attn") if module == MODULES[0] else version(module, "flash-attn")
        )
        if name_and_version is not None:
            return f"{module} {name_and_version}"
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
        result: Any = module.flash_attn_func(q, k, v, causal=mask.causal, window_size=window, **more)
        return _tensor(result).transpose(1, 2)

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
        module = imported(name)
        if module is not None:
            return module
    return Absent("FlashAttention is not installed")


def _tensor(result: Any) -> Tensor:
    """Return the output; some versions return it with the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
