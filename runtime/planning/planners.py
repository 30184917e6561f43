"""Planners by the text of their pattern (`identity`), so that operators find them and equal patterns share one."""

from __future__ import annotations

from weakref import WeakValueDictionary

from attnc.compiler.ir import Pattern
from attnc.compiler.locks import fork_safe_lock
from attnc.compiler.lowering.lower import lower
from attnc.compiler.passes.attentions import packed
from attnc.compiler.passes.last_rows import last_rows
from attnc.runtime.choices.choice_keys import CompiledPattern
from attnc.runtime.choices.choice_source import wanted_of
from attnc.runtime.choices.tuned import Tuned
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.runtime.texts import identity
from attnc.runtime.texts.identity import Form, How
from attnc.spec.program import BoundProgram

_LOCK = fork_safe_lock()

_live_planners: WeakValueDictionary[str, Planner] = WeakValueDictionary()
_read: Recent[Planner] = Recent(SETTINGS.specs)


def shared_planner(text: str, bound: BoundProgram, compile_options: How, form: Form = "whole") -> Planner:
    """Return the shared planner of the pattern with this `text`; `planner_of` finds it while it is referenced."""
    return _live_planners.get(text) or _held(text, lower(bound), compile_options, form)


def planner_in(form: Form, text: str, pattern: Pattern, compile_options: How) -> Planner:
    """Return the planner of a form of a lowered pattern; `text` is the text of that form. Raises OtherRowsError."""
    return _live_planners.get(text) or _held(text, pattern, compile_options, form)


def _held(text: str, pattern: Pattern, compile_options: How, form: Form) -> Planner:
    forms = {"whole": lambda: pattern, "packed": lambda: packed(pattern), "last rows": lambda: last_rows(pattern)}
    formed = forms[form]()
    planner = Planner(text, formed, compile_options.strict, tuned=_tuned(formed, compile_options, form))
    with _LOCK:  # setdefault is not atomic: two threads would get one planner each
        return _live_planners.setdefault(text, planner)


def _tuned(pattern: Pattern, compile_options: How, form: Form) -> Tuned | None:
    """Return the tuned choices of a pattern; None for decoding, whose kernels have choices of their own."""
    wanted = wanted_of(compile_options.tune)
    if wanted.source == "model" or form == "last rows":
        return None
    return Tuned(CompiledPattern(pattern, form, compile_options.strict, compile_options.deterministic), wanted)


def planner_of(text: str) -> Planner:
    """Return the planner of a text that `identity.write` made, in this process or another.

    Referenced planners are found; of the others, the most recently used are kept. Raises ArgumentError, SpecError.
    """
    return _live_planners.get(text) or _read.get(text, lambda: shared_planner(text, *identity.read(text)))
