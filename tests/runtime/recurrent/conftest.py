"""Unset memory is poisoned in every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from poison import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill unset memory with NaN."""
    with poisoned():
        yield
