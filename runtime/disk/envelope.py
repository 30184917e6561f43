"""The file format of a cache entry: JSON with the entry's kind and name, and a digest that detects damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
"""The version of the entry format. Entries of other versions are ignored."""

MOST = 1 << 20
"""Maximum size of an entry in bytes; no more is read."""

Payload = Mapping[str, Any]


class DamagedError(Exception):
    """The bytes are not an entry of that name. The message says why."""


def wrapped(kind: str, name: str, payload: Payload) -> bytes:
    """Return an entry as bytes, which are equal for equal payloads."""
    body = _canonical(payload)
    envelope = {"attnc": SCHEMA, "kind": kind, "name": name, "sha256": _digest(kind, name, body), "payload": payload}
    return json.dumps(envelope, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"


def unwrapped(kind: str, name: str, data: bytes) -> Payload:
    """Return the payload of an entry. Raises DamagedError for bytes that `wrapped` did not make for this name."""
    try:
        envelope = json.loads(data.decode())
        if envelope["attnc"] != SCHEMA:
            raise DamagedError(f"its format version is {envelope['attnc']!r}, not {SCHEMA}")
        if (envelope["kind"], envelope["name"]) != (kind, name):
            raise DamagedError("the file holds another entry")
        payload = envelope["payload"]
        if envelope["sha256"] != _digest(kind, name, _canonical(payload)):
            raise DamagedError("its digest does not match its content")
    except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise DamagedError(f"it is not an entry of attnc ({type(error).__name__})") from error
    if not isinstance(payload, dict):
        raise DamagedError("its content is not a JSON object")
    return payload


def _canonical(payload: object) -> str:
    return json.dumps(payload, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _digest(kind: str, name: str, body: str) -> str:
    return hashlib.sha256(f"{SCHEMA}\0{kind}\0{name}\0{body}".encode()).hexdigest()
