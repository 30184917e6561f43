"""Commands called in process, with their output or its JSON."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest

from attnc.runtime.cli import main

GOOD = "pattern near\n    visible 0 <= q - k < 4\n"
BAD = "pattern near\n    visible 0 <= q - kk < 4\n"


@dataclass(frozen=True)
class Done:
    """The exit status of a command, and its output."""

    status: int
    out: str
    err: str


def run(*arguments: str) -> Done:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    return Done(status, out.getvalue(), err.getvalue())


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    values: dict[str, Any] = json.loads(out)
    assert values["schema"] == 1
    return status, values
