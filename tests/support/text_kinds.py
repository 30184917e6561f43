"""The kinds of kernel text: texts of one kind have equal comments and differ in names, numbers and expressions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

Kind = tuple[str, frozenset[str]]
"""A stage, and the comments of its text without numbers."""


def kind_of(stage: str, text: str) -> Kind:
    """Return the kind of a kernel's text."""
    comments = re.findall(r"#(.*)", text.partition("@triton.jit")[2])
    return stage, frozenset(re.sub(r"\d+", "N", comment.strip()) for comment in comments)


def smallest_cover(patterns: Mapping[Kind, set[str]]) -> list[str]:
    """Return few patterns that together have every kind, preferring those with many kinds; ties go by name."""
    left, cover = dict(patterns), list[str]()
    while left:
        counts = Counter(name for names in left.values() for name in names)
        best = max(sorted(counts), key=lambda name: counts[name])
        cover.append(best)
        left = {kind: names for kind, names in left.items() if best not in names}
    return cover
