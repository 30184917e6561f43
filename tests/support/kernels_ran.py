"""Which kernels of recurrences ran."""

from __future__ import annotations

import pytest

from attnc.runtime.gpu.recurrent.call import Call


def kernels_ran(patch: pytest.MonkeyPatch) -> list[str]:
    """A list that the stages of all kernels are added to from here on."""
    ran: list[str] = []
    run = Call.run

    def noted(call: Call, stage: str) -> None:
        ran.append(stage)
        run(call, stage)

    patch.setattr(Call, "run", noted)
    return ran
