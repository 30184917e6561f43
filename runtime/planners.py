"""Planners by the text of their pattern (`identity`), so that an operator finds one and equal patterns share one."""

from __future__ import annotations

from weakref import WeakValueDictionary

from attnc.compiler.ir import Pattern
from attnc.compiler.lowering.lower import lower
from attnc.runtime import identity
from attnc.runtime.plans import Planner
from attnc.runtime.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.spec.program import BoundProgram

_alive: WeakValueDictionary[str, Planner] = WeakValueDictionary()
_read: Recent[Planner] = Recent(SETTINGS.specs)


def shared_planner(text: str, bound: BoundProgram, strict: bool, packed: bool = False) -> Planner:
    """The planner of a pattern whose text is `text`: one for all, found again by `planner_of` as long as it is held.

    `packed`: for several sequences in one.
    """
    return _alive.get(text) or _held(text, lower(bound), strict, packed)


def packed_planner(text: str, pattern: Pattern, strict: bool) -> Planner:
    """The planner for several sequences in one of a pattern that is lowered; `text` is that of the packed pattern."""
    return _alive.get(text) or _held(text, pattern, strict, packed=True)


def _held(text: str, pattern: Pattern, strict: bool, packed: bool) -> Planner:
    return _alive.setdefault(text, Planner(text, pattern.packed if packed else pattern, strict))


def planner_of(text: str) -> Planner:
    """The planner of a text that `identity.write` made, here or in another process.

    Those held elsewhere are found; of the others, the ones asked for last are kept. Raises ArgumentError, SpecError.
    """
    return _alive.get(text) or _read.get(text, lambda: shared_planner(text, *identity.read(text)))
