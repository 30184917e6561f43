"""A record of the recurrence kernels that ran."""

from __future__ import annotations

import pytest

from attnc.runtime.executors.triton.recurrent.recurrence_tensors import RecurrenceTensors


def kernels_ran(patch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the stages of all kernels are added from now on."""
    ran: list[str] = []
    run = RecurrenceTensors.run

    def noted(call: RecurrenceTensors, stage: str) -> None:
        ran.append(stage)
        run(call, stage)

    patch.setattr(RecurrenceTensors, "run", noted)
    return ran
