"""The rates of this machine that costs of plans use: read from a file, or guessed if nothing was measured."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnc.compiler.planning.rates import AMX, PLAIN, ROWS, ChoiceRates, Rates, Table
from attnc.runtime.disk.folder import cache_folder
from attnc.runtime.disk.machine_key import has_matrix_tiles, installed, this_cpu
from attnc.runtime.disk.store import Payload, store
from attnc.runtime.planning.plausible import implausible

_log = logging.getLogger(__name__)

SCHEMA = 6
KIND = "rates"


def rates() -> Rates:
    """Return the rates for plan costs: measured with the current number of threads if available, else a guess."""
    return _rates(torch.get_num_threads(), cache_folder())


@lru_cache(8)
def _rates(threads: int, folder: Path | None) -> Rates:
    """Return the rates for a number of threads and a cache folder."""
    own_rates = measured()
    if own_rates is not None:
        return own_rates
    return AMX if has_matrix_tiles() else PLAIN


def measured() -> Rates | None:
    """Return the rates measured on this machine with torch's current number of threads; None if nothing was measured.

    Rates that are implausible for this processor, such as rates measured under load, are rejected with a logged
    warning.
    """
    payload = store().read(KIND, entry_name())
    stored_rates = None if payload is None else _rates_of(payload)
    reason = None if stored_rates is None else implausible(stored_rates, torch.get_num_threads())
    if reason is None:
        return stored_rates
    _warn_of(str(store().path(KIND, entry_name())), reason)
    return None


@lru_cache(8)
def _warn_of(file: str, reason: str) -> None:
    """Log that rates are not used, once for each file and reason."""
    _log.warning(
        "the rates in %s are not used: %s; they were probably measured on a busy machine: run `attnc doctor --measure` "
        "to measure them again",
        file,
        reason,
    )


def entry_name() -> str:
    """Return the name of the cache entry for this machine, its threads and this torch."""
    identity = f"{this_cpu()}\0torch {installed('torch')}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def rates_file() -> Path | None:
    """Return the file with the rates of this machine; None if nothing was measured."""
    return None if measured() is None else store().path(KIND, entry_name())


def save(rates_to_store: Rates) -> bool:
    """Store rates for this machine and its threads, atomically; False if they cannot be written."""
    kept = store().write(KIND, entry_name(), {"schema": SCHEMA, "machine": this_cpu(), **asdict(rates_to_store)})
    forget()
    return kept


def forget() -> None:
    """Drop cached rates, so that rates written by another process are read."""
    _rates.cache_clear()


def _rates_of(payload: Payload) -> Rates | None:
    """Return the rates of an entry; None if its schema differs or its numbers are invalid."""
    data = dict(payload)
    try:
        if data.pop("schema") != SCHEMA:
            return None
        data.pop("machine")
        data["choices"] = ChoiceRates(**data["choices"])
        data["peak"] = {name: tuple(float(x) for x in pair) for name, pair in data["peak"].items()}
        data["elements"] = {name: _checked(table) for name, table in data["elements"].items()}
        rates = Rates(**data)
        numbers = [
            rates.call,
            rates.merge,
            rates.copy,
            rates.mask,
            rates.evaluate,
            rates.spread,
            *asdict(rates.choices).values(),
            *rates.alone.values(),
            *rates.masked.values(),
            *rates.backward.values(),
        ]
        numbers += [*rates.row.values(), *(x for pair in rates.peak.values() for x in pair)]
        return rates if "float32" in rates.elements and all(map(_is_rate, numbers)) else None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None


def _checked(table: Any) -> Table:
    narrow, wide = (tuple(float(x) for x in row) for row in table)
    if not (len(narrow) == len(wide) == len(ROWS) and all(map(_is_rate, (*narrow, *wide)))):
        raise ValueError("not a table of rates")
    return narrow, wide


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1e9
