"""Where a call takes another way than its caller would expect: named, counted, and logged.

Nothing is noted on the ways that are expected, so they pay nothing; nothing is noted while `torch.compile` traces.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from attnc.compiler.locks import fork_safe_lock

_log = logging.getLogger(__name__)

MOST = 256
"""Fallbacks that are told apart; all others are counted together."""


@dataclass(frozen=True)
class Kind:
    """A way that calls fall back to. `slow`: another way of computing; else a copy, a cast or a wait besides.

    `when`: what it is, and instead of what. `strict`: whether `strict=True` refuses it.
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
    "places that a selection chose are met tile by tile under a mask, as what was chosen does not say where they lie, "
    "or no kernels gather their queries",
)
HOST_LISTS = Kind(
    "tiles listed by the host",
    True,
    "on a GPU the tiles of what was chosen are listed by the host in every call, which waits for the device",
    strict=True,
)
PASSES = Kind("several passes", True, "weights need one sum over a row's keys whole before another one", strict=True)
SEQUENCES = Kind(
    "one sequence after another",
    True,
    "what is chosen in documents, or a recurrence that reads places in them, runs once for each of them",
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
    "what a recurrence multiplies its state by was taken for a decay and is none: its passes are derived anew, in "
    "every call",
)
RECURRENT_IN_TORCH = Kind(
    "recurrence in torch",
    True,
    "a GPU has no kernels for the recurrence's states or dtype: its passes as operations of torch",
    strict=True,
)
HOST_WAIT = Kind("host wait", False, "the host reads what is on the device, and waits for it")
MOVED = Kind("moved", False, "an integer or bool input is on another device than q, and is copied there in every call")
COPY = Kind("copy", False, "an operand or a result is copied, as a kernel cannot address its layout or width")
CAST = Kind("cast", False, "a dtype is changed: autocast, as for SDPA; an input to the 32 bits that is computed with")
OTHERS = Kind("others", True, f"past the first {MOST} that are told apart")

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
    """A way that calls of a pattern took besides the one that is expected, why, and how often."""

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
    """What calls of this process fell back to since it began, or since `reset_fallbacks`, in order of names.

    `print(*attnc.fallbacks(), sep="\\n")` shows them. Each is logged when it is met first, under
    `attnc.runtime.fallbacks`: other ways of computing as warnings, copies, casts and waits as infos.
    """
    with _lock:
        found = list(_counts.items())
    return tuple(sorted(Fallback(name, kind.name, reason, count) for (name, kind, reason), count in found))


def reset_fallbacks() -> None:
    """Count from nothing."""
    with _lock:
        _counts.clear()


def note(pattern: str, kind: Kind, reason: str) -> None:
    """Count that a call of a pattern fell back. Not to be called by what `torch.compile` traces."""
    with _lock:
        key = (pattern, kind, reason)
        if key not in _counts and len(_counts) >= MOST:
            key = ("…", OTHERS, OTHERS.when)
        count = _counts[key] = _counts.get(key, 0) + 1
    level = logging.DEBUG if count > 1 else logging.WARNING if kind.slow else logging.INFO
    _log.log(level, "`%s`: %s: %s", pattern, kind.name, reason)


__all__ = ["KINDS", "Fallback", "Kind", "fallbacks", "note", "reset_fallbacks"]
