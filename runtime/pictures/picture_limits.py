"""Limits on masks and pictures, checked before anything is computed; messages name the memory needed."""

from __future__ import annotations

from attnc.compiler.planning.cpu_plan import as_bytes
from attnc.runtime.call.call_errors import ArgumentError

LARGEST_MASK = 1 << 32
"""Maximum size of a mask in bytes: 65,536 queries by 65,536 keys, one byte per pair."""

ROW = 128
"""Bytes of a picture per row: its count, and its share of the plan.

Measured: 120 bytes a row for `causal` at 1,000,000 tokens (maximum resident set of `attnc show`, less that of a picture
of 64 tokens).
"""

LARGEST_PICTURE = 1 << 30
"""Maximum size of a picture in bytes: 8,388,608 rows."""


def check_mask_size(n_q: int, n_k: int) -> None:
    """Raise ArgumentError for a mask that needs more than `LARGEST_MASK` bytes."""
    if n_q * n_k > LARGEST_MASK:
        needed, limit = as_bytes(n_q * n_k), as_bytes(LARGEST_MASK)
        raise ArgumentError(
            f"a mask of {n_q:,} queries × {n_k:,} keys would need {needed}; the limit is {limit}; "
            "use `plan`, which counts the visible pairs without a mask, or a shorter length"
        )


def check_drawn_length(longest: int) -> None:
    """Raise ArgumentError for a picture whose rows or keys need more than `LARGEST_PICTURE` bytes."""
    if longest * ROW > LARGEST_PICTURE:
        needed, limit = as_bytes(longest * ROW), as_bytes(LARGEST_PICTURE)
        raise ArgumentError(
            f"a picture of {longest:,} tokens would need about {needed}; the limit is {limit}: "
            f"draw at most {LARGEST_PICTURE // ROW:,} tokens"
        )
