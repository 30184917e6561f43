"""Every setting that is not an argument, in one place. Values are constants until a user needs to change one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """`plans`: plans kept by one `Attention`."""

    plans: int = 64


SETTINGS = Settings()
