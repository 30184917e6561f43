"""Every test of this folder runs with unset memory filled with NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from poison import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill unset memory with NaN."""
    with poisoned():
        yield
