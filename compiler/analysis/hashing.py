"""64-bit hashes of arrays, for class keys; the same in every process and on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
from numpy.typing import NDArray

Hash = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def mix(values: NDArray[np.int64] | Hash) -> Hash:
    """Return the splitmix64 finaliser of each entry."""
    return _mixed(values.astype(np.uint64))


def _mixed(x: Hash) -> Hash:
    """Apply the splitmix64 finaliser in place."""
    x += _GOLDEN
    x ^= x >> np.uint64(30)
    x *= _M1
    x ^= x >> np.uint64(27)
    x *= _M2
    x ^= x >> np.uint64(31)
    return x


def combine(*hashes: Hash) -> Hash:
    """Combine hashes entry by entry; the result depends on their order."""
    return reduce(lambda a, b: _mixed(a * _M1 + b), hashes)


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """The distinct names of an array, numbered by first occurrence.

    `first`: the index of each name's first entry; `members`: its number of entries; `number`: the number of each entry.
    """

    first: NDArray[np.int64]
    members: NDArray[np.int64]
    number: NDArray[np.int64]


def kinds(names: Hash | NDArray[np.int64]) -> Kinds:
    """Number the distinct names of an array."""
    order = np.argsort(names)  # not stable, but only the least entry of each kind counts
    ordered = names[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(order)])
    if not len(starts):
        return Kinds(starts, starts, order)
    members = np.diff(np.append(starts, len(order)))
    first = np.minimum.reduceat(order, starts)
    by_first = np.argsort(first)
    rank = np.empty_like(by_first)
    rank[by_first] = np.arange(len(by_first))
    number = np.empty_like(order)
    number[order] = np.repeat(rank, members)
    return Kinds(first[by_first], members[by_first], number)


@lru_cache(maxsize=1 << 14)
def constant_hash(value: object) -> Hash:
    """Return the hash of a name, number or tuple of numbers, as an array of one entry."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return np.array([int.from_bytes(digest, "little")], dtype=np.uint64)
