"""Files for commands to look at, and commands called with JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from attnc.runtime.cli import main

GOOD = "pattern near\n    visible 0 <= q - k < 4\n"
BAD = "pattern near\n    visible 0 <= q - kk < 4\n"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    values: dict[str, Any] = json.loads(out)
    assert values["schema"] == 1
    return status, values
