"""Planners by the text of their pattern (`identity`), so that an operator finds one and equal patterns share one."""

from __future__ import annotations

from weakref import WeakValueDictionary

from attnc.compiler.attentions import packed
from attnc.compiler.ir import Pattern
from attnc.compiler.last_rows import last_rows
from attnc.compiler.locks import fork_safe_lock
from attnc.compiler.lowering.lower import lower
from attnc.runtime import identity
from attnc.runtime.identity import Form, How
from attnc.runtime.plans import Planner
from attnc.runtime.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.runtime.tuning.choice_keys import CompiledPattern
from attnc.runtime.tuning.choice_source import wanted_of
from attnc.runtime.tuning.tuned import Tuned
from attnc.spec.program import BoundProgram

_LOCK = fork_safe_lock()

_alive: WeakValueDictionary[str, Planner] = WeakValueDictionary()
_read: Recent[Planner] = Recent(SETTINGS.specs)


def shared_planner(text: str, bound: BoundProgram, how: How, form: Form = "whole") -> Planner:
    """The planner of a pattern whose text is `text`: one for all, found again by `planner_of` as long as it is held."""
    return _alive.get(text) or _held(text, lower(bound), how, form)


def planner_in(form: Form, text: str, pattern: Pattern, how: How) -> Planner:
    """The planner of a form of a pattern that is lowered; `text` is that of the form. Raises OtherRowsError."""
    return _alive.get(text) or _held(text, pattern, how, form)


def _held(text: str, pattern: Pattern, how: How, form: Form) -> Planner:
    own = {"whole": lambda: pattern, "packed": lambda: packed(pattern), "last rows": lambda: last_rows(pattern)}[form]()
    made = Planner(text, own, how.strict, tuned=_tuned(own, how, form))
    with _LOCK:  # setdefault looks first and stores then: two threads would have a planner each
        return _alive.setdefault(text, made)


def _tuned(pattern: Pattern, how: How, form: Form) -> Tuned | None:
    """What is tuned for a pattern; steps of decoding are not, whose kernels have choices of their own."""
    wanted = wanted_of(how.tune)
    if wanted.source == "model" or form == "last rows":
        return None
    return Tuned(CompiledPattern(pattern, form, how.strict, how.deterministic), wanted)


def planner_of(text: str) -> Planner:
    """The planner of a text that `identity.write` made, here or in another process.

    Those held elsewhere are found; of the others, the ones asked for last are kept. Raises ArgumentError, SpecError.
    """
    return _alive.get(text) or _read.get(text, lambda: shared_planner(text, *identity.read(text)))
