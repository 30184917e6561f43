"""What `tune=` asks for: the model's choice, a time in which to measure, or a table of what was measured."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnc.runtime.errors import ArgumentError, ArgumentTypeError
from attnc.runtime.tuning.tables import Table, load_table, loaded

_log = logging.getLogger(__name__)

_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|m)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}


@dataclass(frozen=True)
class Wish:
    """Whence choices come: the cost model, the cache, or a table; `seconds`: to measure in what is not known."""

    source: Literal["model", "cache", "table"] = "model"
    seconds: float = 0.0
    table: Table | None = None

    @property
    def text(self) -> str:
        """As a compiled graph carries it: nothing is measured there, but what is known is used."""
        return self.source if self.table is None else f"table {self.table.digest}"


def wish_of(text: str) -> Wish:
    """The wish of a `text`. A table that this process has not loaded leaves the choice to the model, with a warning."""
    source, _, digest = text.partition(" ")
    if source != "table":
        return Wish("cache" if source == "cache" else "model")
    table = loaded(digest)
    if table is None:
        _log.warning("a graph was compiled with a table of tuned choices, %s, that is not loaded here", digest)
        return Wish()
    return Wish("table", table=table)


def read_wish(tune: object) -> Wish:
    """What `tune=` says. Raises ArgumentError, ArgumentTypeError, OSError."""
    if isinstance(tune, os.PathLike) or (isinstance(tune, str) and tune.endswith(".json")):
        return Wish("table", table=load_table(Path(tune)))
    if isinstance(tune, bool) or not isinstance(tune, str | int | float):
        raise ArgumentTypeError(f"tune is {tune!r}: it must be {_ALLOWED}")
    if tune == "model":
        return Wish()
    if isinstance(tune, str):
        found = _TIME.fullmatch(tune.strip())
        if found is None:
            raise ArgumentError(f"tune is {tune!r}: it must be {_ALLOWED}")
        return Wish("cache", float(found[1]) * _SECONDS[found[2]])
    if not (math.isfinite(tune) and tune >= 0):
        raise ArgumentError(f"tune is {tune!r}: a time is a number of seconds, 0 or more")
    return Wish("cache", float(tune))


_ALLOWED = '"model", a time such as "2s" ("0s": what is in the cache, nothing is measured), or a table.json'
