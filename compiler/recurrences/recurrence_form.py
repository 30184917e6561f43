"""The derived form of a recurrence: stages in the order in which they run, and a token's result."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.ir import Value
from attnc.compiler.recurrences.derived import Stage
from attnc.compiler.recurrences.print_derived import print_derived


@dataclass(frozen=True)
class RecurrenceForm:
    """The derived form: stages in the order in which they run, and a token's `result` as a formula of their reads.

    `reason`: why some states are computed entry by entry instead of by matrix products; empty if none are.
    """

    stages: tuple[Stage, ...]
    result: Value
    reason: str = ""

    def __str__(self) -> str:
        return print_derived(self)
