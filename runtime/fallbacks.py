"""Fallbacks: where a call takes another way than its caller would expect; named, counted, and logged.

Expected ways note nothing and pay nothing; nothing is noted while `torch.compile` traces.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from attnc.compiler.locks import fork_safe_lock

_log = logging.getLogger(__name__)

MOST = 256
"""Maximum number of distinct fallbacks; all others are counted together."""


@dataclass(frozen=True)
class Kind:
    """A kind of fallback. `slow`: another way of computing; otherwise an extra copy, cast or wait.

    `when`: what happens, and instead of what. `strict`: whether `strict=True` refuses it.
    """

    name: str
    slow: bool
    when: str
    strict: bool = False


DENSE = Kind(
    "dense by row blocks",
    True,
    "no tile plan describes the relation: on a CPU, row blocks against all keys from the first to the last live tile",
    strict=True,
)
IN_TORCH = Kind(
    "tiles in torch",
    True,
    "a GPU has no kernels for the pattern, its score, its weights or the dtype: tiles as operations of torch",
    strict=True,
)
LISTED_PLACES = Kind(
    "no gathered queries",
    True,
    "selected places run tile by tile under a mask, because the selection does not say where they lie, "
    "or no kernels gather their queries",
)
HOST_LISTS = Kind(
    "tiles listed by the host",
    True,
    "on a GPU the host lists the tiles of selected keys in every call, and waits for the device",
    strict=True,
)
PASSES = Kind(
    "several passes", True, "weights need the result of one sum over a row's keys before another sum", strict=True
)
SEQUENCES = Kind(
    "one sequence after another",
    True,
    "selections within documents, or a recurrence that reads places within documents, run once per document",
)
TOKENS = Kind(
    "token by token",
    True,
    "a recurrence has no form by chunks, or none for factors outside of 0 to 1; on a GPU one kernel does it",
    strict=True,
)
FACTORS = Kind(
    "factors of any size",
    True,
    "a factor of a recurrence's state was assumed to be a decay and is not: its passes are derived again in every call",
)
RECURRENT_IN_TORCH = Kind(
    "recurrence in torch",
    True,
    "a GPU has no kernels for the recurrence's states or dtype: its passes as operations of torch",
    strict=True,
)
HOST_WAIT = Kind("host wait", False, "the host reads data on the device, and waits for it")
MOVED = Kind("moved", False, "an integer or bool input is on another device than q, and is copied there in every call")
COPY = Kind("copy", False, "an operand or a result is copied, because a kernel cannot address its layout or width")
CAST = Kind("cast", False, "a dtype is changed: autocast, as for SDPA; an input to the 32 bits that is computed with")
OTHERS = Kind("others", True, f"all fallbacks past the first {MOST} distinct ones")

KINDS = (
    DENSE,
    IN_TORCH,
    LISTED_PLACES,
    HOST_LISTS,
    PASSES,
    SEQUENCES,
    TOKENS,
    FACTORS,
    RECURRENT_IN_TORCH,
    HOST_WAIT,
    MOVED,
    COPY,
    CAST,
    OTHERS,
)


@dataclass(frozen=True, order=True)
class Fallback:
    """A fallback that calls of a pattern took, its reason, and its count."""

    pattern: str
    kind: str
    reason: str
    count: int

    def __str__(self) -> str:
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"`{self.pattern}`: {self.kind}, {times}: {self.reason}"


_counts: dict[tuple[str, Kind, str], int] = {}
_lock = fork_safe_lock()


def fallbacks() -> tuple[Fallback, ...]:
    """Return the fallbacks of this process since its start or the last `reset_fallbacks`, in order of names.

    `print(*attnc.fallbacks(), sep="\\n")` shows them. Each fallback is logged when it first occurs, under
    `attnc.runtime.fallbacks`: other ways of computing as warnings, copies, casts and waits as infos.
    """
    with _lock:
        counts = list(_counts.items())
    return tuple(sorted(Fallback(name, kind.name, reason, count) for (name, kind, reason), count in counts))


def reset_fallbacks() -> None:
    """Reset all fallback counts."""
    with _lock:
        _counts.clear()


def note(pattern: str, kind: Kind, reason: str) -> None:
    """Count a fallback of a call. Must not be called by code that `torch.compile` traces."""
    with _lock:
        key = (pattern, kind, reason)
        if key not in _counts and len(_counts) >= MOST:
            key = ("…", OTHERS, OTHERS.when)
        count = _counts[key] = _counts.get(key, 0) + 1
    level = logging.DEBUG if count > 1 else logging.WARNING if kind.slow else logging.INFO
    _log.log(level, "`%s`: %s: %s", pattern, kind.name, reason)


__all__ = ["KINDS", "Fallback", "Kind", "fallbacks", "note", "reset_fallbacks"]
