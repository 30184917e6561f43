"""Kernels of the library as they are emitted now, and the kinds of their texts, which a process finds once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnc.runtime.texts.library import pattern_names, routing_names
from attnc.runtime.toolchain import library_gate, routing_gate
from attnc.runtime.toolchain.kernel_gate import GateCase as Kernel
from attnc.runtime.toolchain.selection import cases, named, whole_library
from text_kinds import Kind, kind_of

TARGET, WIDTHS = "sm_90", (64, 128)
EMITTED = pytest.mark.xdist_group("emitted")
"""Tests that emit the kernels of the whole library: one worker runs them, and finds the kinds of texts once."""

_kinds: dict[str, frozenset[Kind]] = {}


def emitted(name: str | None) -> Iterator[Kernel]:
    """Yield the kernels as emitted now; for None, those of the whole library except routing, with duplicates once."""
    patterns = whole_library() if name is None else named([name] if name in pattern_names() else [])
    states = library_gate.whole_library() if name is None else [name]
    if name in routing_names():
        yield from routing_gate.cases([name], [TARGET], WIDTHS)
        return
    for one in cases(patterns, [TARGET], WIDTHS, ["bfloat16"]):
        if isinstance(one, Kernel):
            yield one
    yield from library_gate.cases([one for one in states if one not in pattern_names()], [TARGET], WIDTHS)


def kernels_of(name: str) -> list[Kernel]:
    """Emit the kernels of a pattern, and note the kinds of their texts."""
    kernels = list(emitted(name))
    first = (kernel.source for kernel in kernels if kernel.head_dim == WIDTHS[0])
    _kinds[name] = frozenset(kind_of(source.stage, source.text) for source in first)
    return kernels


def kinds_of(name: str) -> frozenset[Kind]:
    """Return the kinds of the texts of a pattern for heads of the first width."""
    if name not in _kinds:
        kernels_of(name)
    return _kinds[name]
