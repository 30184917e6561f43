"""Unset memory is poisoned in every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from poison import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What reads memory that nobody wrote gets NaN."""
    with poisoned():
        yield
