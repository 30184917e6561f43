"""Tuned choices as one file for shipping: every process that loads it makes the same choices, and measures nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.choices.records import KIND, SCHEMA, Record, read_record
from attnc.runtime.disk.store import MOST, DamagedError, unwrapped, wrapped
from attnc.runtime.disk.whole import write_for_user

LARGEST = 256 * MOST
"""Maximum size of a table in bytes; no more is read."""


@dataclass(frozen=True)
class TunedTable:
    """Records by the name of their entry; `digest`: the digest of the file."""

    records: Mapping[str, Record]
    digest: str = field(default="")

    def __str__(self) -> str:
        return "\n".join(map(str, self.records.values()))


def table_bytes(records: Iterable[Record]) -> bytes:
    """Return a table of records, one per line, after a line with their count; equal for equal records in any order."""
    lines = {record.name: wrapped(KIND, record.name, record.payload()) for record in records}
    entries = [json.dumps([name, lines[name].decode()], ensure_ascii=False) for name in sorted(lines)]
    return "".join(f"{line}\n" for line in (json.dumps({"attnc": SCHEMA, "records": len(entries)}), *entries)).encode()


def save_tuned(path: str | os.PathLike[str], *records: Record) -> None:
    """Write a table of records, the results of `attend.tune`, for `compile_attention(…, tune=path)`. Raises OSError."""
    write_for_user(Path(path), table_bytes(records))


def load_table(path: str | os.PathLike[str]) -> TunedTable:
    """Return the table of a file. Raises ArgumentError for a file that cannot be read, is damaged or truncated."""
    try:
        with Path(path).open("rb") as file:
            head, *lines = file.read(LARGEST).splitlines() or [b""]
    except OSError as error:
        raise ArgumentError(f"tune: the table {path} cannot be read: {error.strerror}") from error
    records = {}
    number = 1
    try:
        header = json.loads(head.decode())
        if header["attnc"] != SCHEMA or header["records"] != len(lines):
            raise DamagedError(f"its header counts {header['records']} records, but {len(lines)} follow")
        for line in lines:
            number += 1
            name, text = json.loads(line.decode())
            record = read_record(unwrapped(KIND, name, text.encode()))
            if record is None or record.name != name:
                raise DamagedError("it holds no tuned choices")
            records[name] = record
    except (DamagedError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError) as error:
        raise ArgumentError(
            f"tune: {path}, line {number}, is not a line of a table that `attnc tune … -o` wrote: {error}"
        ) from error
    table = TunedTable(records, hashlib.sha256(b"\n".join((head, *lines))).hexdigest()[:32])
    remember(table)
    return table


def remember(table: TunedTable) -> None:
    """Make a table available to compiled graphs of this process."""
    _LOADED.setdefault(table.digest, table)


def loaded(digest: str) -> TunedTable | None:
    """Return a table that this process has loaded, None if it has not."""
    return _LOADED.get(digest)


_LOADED: dict[str, TunedTable] = {}
