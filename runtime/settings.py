"""Every setting that is not an argument, in one place. Values are constants until a user needs to change one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What is kept between calls, and how large a mask may grow. Bounds in bytes spare the value asked for last.

    `plans`: plans kept by one `Attention`, programs kept by the process, and whatever else is kept for plans.
    `plan_bytes`: bytes of their arrays and pieces together, of one `Attention`, and again of all programs. `masks`,
    `mask_bytes`: masks kept as tensors, and their bytes, by the process; each is of at most `mask_elements` elements.
    `layouts`, `layout_bytes`: tensor layouts that plans are bound to, and their bytes, by the process. `table_bytes`:
    tables of kernels on a device, of one `Attention`, and again arrays that calls computed on the host. `kernels`:
    kernels that Triton has compiled or interprets, by the process. `exact_elements`: elements of a mask that is
    evaluated as a piece runs (or of one row, where that is more). `gathered_tokens`: tokens of keys that are copied
    together for one call, over all heads (or of one brick, where that is more). `specs`: patterns of compiled graphs
    kept while no `Attention` of theirs is alive.
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
