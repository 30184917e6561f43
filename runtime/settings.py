"""Every setting that is not an argument, in one place. Values are constants until a user needs to change one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What is kept between calls, and how large a mask may grow.

    `plans`: plans kept by one `Attention`, and programs kept for them. `layouts`: tensor layouts kept for one plan.
    `masks`: masks kept as tensors for one plan, each of at most `mask_elements` elements. `exact_elements`: elements of
    a mask that is evaluated as a piece runs (or of one row, where that is more). `gathered_tokens`: tokens of keys that
    are copied together for one call, over all heads (or of one brick, where that is more). `specs`: patterns of
    compiled graphs kept while no `Attention` of theirs is alive.
    """

    plans: int = 64
    layouts: int = 32
    masks: int = 64
    mask_elements: int = 1 << 20
    exact_elements: int = 1 << 24
    gathered_tokens: int = 1 << 15
    specs: int = 64


SETTINGS = Settings()
