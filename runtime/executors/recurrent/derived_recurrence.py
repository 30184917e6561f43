"""A recurrence with the form derived from its steps; imports no torch."""

from __future__ import annotations

from attnc.compiler.ir import Pattern, Recur
from attnc.compiler.recurrences.derive import derive
from attnc.compiler.recurrences.derived import (
    NoFormError,
)
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm


class DerivedRecurrence:
    """The recurrence of a pattern, or of a branch with a state.

    `derived`: the form that runs chunk by chunk; None if the recurrence runs token by token, for the reason `reason`.
    """

    def __init__(self, pattern: Pattern, recur: Recur) -> None:
        self.pattern = pattern
        self.recur = recur
        self.derived: RecurrenceForm | None = None
        self.reason = ""
        try:
            self.derived = derive(recur)
        except NoFormError as error:
            self.reason = str(error)

    @property
    def derivation(self) -> str:
        """The derivation of the passes from the steps, line by line, or the reason for running token by token."""
        return str(self.derived) if self.derived is not None else f"token by token: {self.reason}"
