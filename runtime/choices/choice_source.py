"""The meaning of `tune=`: the model's choice, a time in which to measure, or a table of measurements."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.choices.tuned_tables import TunedTable, load_table, loaded

_log = logging.getLogger(__name__)

_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|min|m)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}

LONGEST = 86_400.0
"""Maximum time of measuring that can be requested, in seconds."""

Choices = tuple[tuple[str, str], ...]
"""The options by knob."""


@dataclass(frozen=True)
class ChoiceSource:
    """The source of choices: the cost model, the cache, a table, or `choices` under trial.

    `seconds`: the time to measure choices that are not known.
    """

    source: Literal["model", "cache", "table", "tried"] = "model"
    seconds: float = 0.0
    table: TunedTable | None = None
    choices: Choices = ()

    @property
    def text(self) -> str:
        """The form in a compiled graph: nothing is measured there, but known choices are used."""
        if self.source == "tried":
            return f"tried {json.dumps(self.choices)}"
        return self.source if self.table is None else f"table {self.table.digest}"


def wanted_of(text: str) -> ChoiceSource:
    """Return the source of a `text`. A table that is not loaded leaves the choice to the model, with a warning."""
    source, _, rest = text.partition(" ")
    if source == "tried":
        return ChoiceSource("tried", choices=tuple((str(knob), str(option)) for knob, option in json.loads(rest)))
    if source != "table":
        return ChoiceSource("cache" if source == "cache" else "model")
    table = loaded(rest)
    if table is None:
        _log.warning("a graph was compiled with a table of tuned choices, %s, that is not loaded here", rest)
        return ChoiceSource()
    return ChoiceSource("table", table=table)


def read_wanted(tune: object) -> ChoiceSource:
    """Return the source that `tune=` names. Raises ArgumentError, ArgumentTypeError."""
    if isinstance(tune, os.PathLike) or (isinstance(tune, str) and tune.lower().endswith(".json")):
        return ChoiceSource("table", table=load_table(Path(tune)))
    if isinstance(tune, bool) or not isinstance(tune, str | int | float):
        raise ArgumentTypeError(f"tune is {tune!r}: it must be {_ALLOWED}")
    if tune == "model":
        return ChoiceSource()
    if isinstance(tune, str):
        match = _TIME.fullmatch(tune.strip())
        if match is None:
            raise ArgumentError(f"tune is {tune[:40]!r}: it must be {_ALLOWED}")
        tune = float(match[1]) * _SECONDS[match[2]]
    if not (math.isfinite(tune) and 0 <= tune <= LONGEST):
        raise ArgumentError(f"tune is {tune!r}: a time must be a number of seconds from 0 to {LONGEST:g}")
    return ChoiceSource("cache", float(tune))


_ALLOWED = '"model", a time such as "2s" ("0s": what is in the cache, nothing is measured), or a table.json'
