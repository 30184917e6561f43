"""Fallbacks: calls that run on a slower path than a caller would expect; named, counted, and logged.

The fast paths record nothing and cost nothing; nothing is recorded while `torch.compile` traces.
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
    """A kind of fallback. `slow`: a slower algorithm; otherwise an extra copy, cast or wait.

    `when`: when the fallback happens and what runs instead. `strict`: whether `strict=True` refuses it.
    """

    name: str
    slow: bool
    when: str
    strict: bool = False


DENSE = Kind(
    "dense by row blocks",
    True,
    "no tile plan describes the relation: on a CPU, row blocks attend to all keys from the first to the last live tile",
    strict=True,
)
IN_TORCH = Kind(
    "tiles in torch",
    True,
    "the pattern, its score, its weights or the dtype have no GPU kernels: the tiles run as torch operations",
    strict=True,
)
LISTED_PLACES = Kind(
    "no gathered queries",
    True,
    "selected blocks run tile by tile under a mask, because the selection does not give their positions, "
    "or no kernel gathers their queries",
)
HOST_LISTS = Kind(
    "tiles listed by the host",
    True,
    "on a GPU, the host lists the tiles of selected keys in every call and waits for the device",
    strict=True,
)
PASSES = Kind(
    "several passes", True, "the weights need one sum over a row's keys before the next can start", strict=True
)
SEQUENCES = Kind(
    "one sequence after another",
    True,
    "selections within documents, or a recurrence that reads positions within documents, run once per document",
)
TOKENS = Kind(
    "token by token",
    True,
    "a recurrence has no chunkwise form, or none for factors outside 0 to 1; on a GPU, one kernel runs all tokens",
    strict=True,
)
FACTORS = Kind(
    "factors of any size",
    True,
    "a factor of a recurrence's state is not the decay that was assumed: its passes are derived again in every call",
)
RECURRENT_IN_TORCH = Kind(
    "recurrence in torch",
    True,
    "the recurrence's states or dtype have no GPU kernels: its passes run as torch operations",
    strict=True,
)
HOST_WAIT = Kind("host wait", False, "the host reads data from the device and waits for it")
MOVED = Kind(
    "moved", False, "an integer or bool input is on another device than q and is copied to q's device in every call"
)
COPY = Kind("copy", False, "an operand or a result is copied, because a kernel cannot address its layout or width")
CAST = Kind(
    "cast", False, "a tensor is cast: by autocast, as for SDPA, or an input to the 32 bits in which it is computed"
)
OTHER_EXECUTOR = Kind(
    "another executor", True, 'an executor that `backend="auto"` prefers does not run the call, so the next one does'
)
OTHERS = Kind("others", True, f"all fallbacks after the first {MOST} distinct ones")

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
    OTHER_EXECUTOR,
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
    `attnc.runtime.fallbacks`: slower algorithms as warnings; copies, casts and waits as infos.
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
