"""Every setting that is not an argument, in one place. Values are constants until a user needs to change one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """`plans`: plans kept by one `Attention`. `digest_bytes`: input data up to this size is hashed to find its plan again."""

    plans: int = 64
    digest_bytes: int = 1 << 26


SETTINGS = Settings()
