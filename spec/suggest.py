"""Did you mean: the nearest known word to an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, or None where nothing is near."""
    candidates = sorted(set(known) - {word})
    swapped = [c for c in candidates if sorted(c) == sorted(word) and len(word) > 1]
    if swapped:
        return swapped[0]
    near = get_close_matches(word, candidates, n=1, cutoff=0.65)
    if near:
        return near[0]
    lower = [c for c in candidates if c.lower() == word.lower()]
    return lower[0] if lower else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A help line that names the nearest known word, or `otherwise`."""
    near = closest(word, known)
    return f"did you mean `{near}`?" if near else otherwise
