"""The arguments of one call against a cache, and the cache that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.passes.attentions import inputs_of_attentions
from attnc.compiler.passes.last_rows import OtherRowsError
from attnc.runtime.call.caches import Cache, check_cache, read_cache
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.fallbacks import HOST_WAIT, note
from attnc.runtime.planning.plans import need_of

MOST_QUERIES = 16
"""Maximum number of queries of `decode`."""


@dataclass(frozen=True, eq=False)
class CacheArguments:
    """The arguments of a call against a cache, as `Attention.decode` takes them; `scale` None: dk^-1/2."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv_len: object
    block_table: object
    ring: bool
    scale: float | None
    inputs: Mapping[str, object]
    state: object = None

    def checked(self) -> CacheArguments:
        """Return these arguments. Raises ArgumentError, ArgumentTypeError where they do not fit each other."""
        if not isinstance(self.ring, bool):
            raise ArgumentTypeError(f"ring is {self.ring!r}: it must be True or False")
        if self.ring and self.block_table is not None:
            raise ArgumentError("ring and block_table are both given: use one or the other")
        check_cache(self.q, self.k, self.v, paged=self.block_table is not None)
        return self

    def on(self, q: Tensor, k: Tensor, v: Tensor) -> CacheArguments:
        """Return these arguments with other tensors."""
        return self if q is self.q and k is self.k and v is self.v else replace(self, q=q, k=k, v=v)

    def cache(self, pattern: Pattern) -> Cache:
        """Return the cache, whose lengths and pages the host reads. Raises ArgumentError, ArgumentTypeError."""
        for name, x in (("kv_len", self.kv_len), ("block_table", self.block_table)):
            if isinstance(x, Tensor) and x.is_cuda:
                note(pattern.name, HOST_WAIT, f"`{name}` is on the device, but the host needs it to plan")
        cache = read_cache(self.q, self.k, self.v, self.kv_len, self.block_table, ring=self.ring)
        if not self.ring:
            return cache
        return replace(cache, ring=self.first_ring_token(pattern, max(cache.lengths, default=0)))

    def first_ring_token(self, pattern: Pattern, longest: int | None) -> int:
        """Return the first token that a ring overwrites; `longest`: tokens, if known.

        Raises ArgumentError for a ring that is too short, UnsupportedError for a pattern that reads old entries.
        """
        heads, n_q, slots = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        names = inputs_of_attentions(pattern)
        read = [t.name for t in pattern.tensors if {"token", "key"} & set(t.dims) and t.name in names]
        if read:
            raise UnsupportedError(
                f"ring: `{pattern.name}` reads `{read[0]}` by token, whose old entries would be missing"
            )
        need = need_of(pattern, heads, max(heads // max(self.k.shape[1], 1), 1))
        if need is None:
            raise ArgumentError(
                f"ring: `{pattern.name}` may need all tokens; use a cache with a slot for each, or a block_table"
            )
        needed = need.first + need.last + n_q - 1
        if slots < needed and (longest is None or longest > slots):
            raise ArgumentError(
                f"ring: the cache has {slots} slots and `{pattern.name}` needs {needed} with {n_q} queries: {need}, "
                f"plus the other queries' slots"
            )
        return need.first


def not_served(name: str, reason: OtherRowsError) -> UnsupportedError:
    """Return the error for a pattern whose rows need more than a cache holds."""
    return UnsupportedError(f"a cache of keys is not enough for `{name}`: a row needs {reason}; call it on all tokens")


def check_queries(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError, UnsupportedError for queries that `decode` does not accept."""
    if not 1 <= q.shape[2] <= MOST_QUERIES:
        raise ArgumentError(
            f"q has {q.shape[2]} tokens (dimension 2): decode takes 1 to {MOST_QUERIES}; `prefill` takes any number"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedError("decode has no gradient: call it under torch.no_grad(), or call `prefill`")
