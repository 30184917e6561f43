"""The bytes of an entry: JSON that says what it is, and a digest by which damage is seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
"""The form of an entry. An entry of another form is as good as none."""

MOST = 1 << 20
"""Bytes of an entry that is read."""

Payload = Mapping[str, Any]


class DamagedError(Exception):
    """Bytes that are no entry of that name. The message says why."""


def wrapped(kind: str, name: str, payload: Payload) -> bytes:
    """An entry as bytes: the same for the same payload."""
    body = _canonical(payload)
    told = {"attnc": SCHEMA, "kind": kind, "name": name, "sha256": _digest(kind, name, body), "payload": payload}
    return json.dumps(told, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"


def unwrapped(kind: str, name: str, data: bytes) -> Payload:
    """The payload of an entry. Raises DamagedError for anything that `wrapped` did not make for this kind and name."""
    try:
        told = json.loads(data.decode())
        if told["attnc"] != SCHEMA:
            raise DamagedError(f"it has the form {told['attnc']!r}, not {SCHEMA}")
        if (told["kind"], told["name"]) != (kind, name):
            raise DamagedError("it is another entry under this name")
        payload = told["payload"]
        if told["sha256"] != _digest(kind, name, _canonical(payload)):
            raise DamagedError("its digest does not fit its content")
    except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise DamagedError(f"it is no entry of attnc ({type(error).__name__})") from error
    if not isinstance(payload, dict):
        raise DamagedError("its content is no table of values")
    return payload


def _canonical(payload: object) -> str:
    return json.dumps(payload, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _digest(kind: str, name: str, body: str) -> str:
    return hashlib.sha256(f"{SCHEMA}\0{kind}\0{name}\0{body}".encode()).hexdigest()
