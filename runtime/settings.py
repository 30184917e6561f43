"""Every setting that is not an argument, in one place. Values are constants until a user needs to change one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds on caches between calls, and on masks. Bounds in bytes always spare the most recently used value.

    `plans`: plans kept by one `Attention`, programs kept by the process, and other objects kept for plans.
    `plan_bytes`: total bytes of their arrays and pieces, per `Attention`, and again for all programs. `masks`,
    `mask_bytes`: masks kept as tensors, and their bytes, per process; each has at most `mask_elements` elements.
    `layouts`, `layout_bytes`: tensor layouts that plans are bound to, and their bytes, per process. `table_bytes`:
    tables of kernels on a device, per `Attention`, and again arrays that calls computed on the host. `kernels`: kernels
    that Triton has compiled or interprets, per process. `exact_elements`: elements of a mask that is evaluated while a
    piece runs (or of one row, where that is more). `gathered_tokens`: tokens of keys that are copied together for one
    call, over all heads (or of one brick, where that is more). `specs`: patterns of compiled graphs kept while none of
    their `Attention` objects exists.
    """

    plans: int = 64
    plan_bytes: int = 1 << 25
    layouts: int = 1024
    layout_bytes: int = 1 << 25
    masks: int = 4096
    mask_bytes: int = 1 << 27
    mask_elements: int = 1 << 20
    table_bytes: int = 1 << 28
    kernels: int = 1024
    exact_elements: int = 1 << 24
    gathered_tokens: int = 1 << 13
    specs: int = 64


SETTINGS = Settings()
