"""64-bit hashes of arrays, for class keys. Deterministic across processes and machines."""

from __future__ import annotations

import hashlib
from functools import cache, reduce

import numpy as np
from numpy.typing import NDArray

Hash = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def mix(values: NDArray[np.int64] | Hash) -> Hash:
    """The splitmix64 finaliser of each entry."""
    x = values.astype(np.uint64)
    x += _GOLDEN
    x ^= x >> np.uint64(30)
    x *= _M1
    x ^= x >> np.uint64(27)
    x *= _M2
    x ^= x >> np.uint64(31)
    return x


def combine(*hashes: Hash) -> Hash:
    """An ordered combination, entry by entry."""
    return reduce(lambda a, b: mix(a * _M1 + b), hashes)


@cache
def constant_hash(value: object) -> Hash:
    """The hash of a name, number or tuple of numbers, as one entry."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return np.array([int.from_bytes(digest, "little")], dtype=np.uint64)
