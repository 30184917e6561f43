"""Suggest the known word that is nearest to an unknown word."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word nearest to `word`, or None if no word is near."""
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
    """Return a help text that suggests the nearest known word, or `otherwise` if no word is near."""
    near = closest(word, known)
    return f"did you mean `{near}`?" if near else otherwise
