"""The key of a tuned choice: everything that is fixed when a pattern is compiled, and nothing that a call adds.

Lengths, batches, numbers of heads and lists belong to a call: a measurement at some of them stands for their bucket.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import attnc.compiler
from attnc.compiler.ir import Pattern
from attnc.compiler.ir.canonical import canonical
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.disk.machine_key import installed

Executor = Literal["cpu", "triton"]


@dataclass(frozen=True)
class Key:
    """A key made of named parts; keys are equal where all parts are."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> Key:
        """Return the key of some parts."""
        return cls(tuple(sorted(parts.items())))

    @cached_property
    def digest(self) -> str:
        """The key as a file name."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:32]

    def differing(self, other: Key) -> list[str]:
        """Return the parts that differ from another key, with both values."""
        parts, other_parts = dict(self.parts), dict(other.parts)
        return [
            f"{name}: {parts.get(name, 'none')}, there {other_parts.get(name, 'none')}"
            for name in dict.fromkeys([*parts, *other_parts])
            if parts.get(name) != other_parts.get(name)
        ]

    def __str__(self) -> str:
        first = ("pattern", "parameters")
        ordered = sorted(
            self.parts, key=lambda part: (part[0] not in first, first.index(part[0]) if part[0] in first else 0)
        )
        return "\n".join(f"{name:<14}{value}" for name, value in ordered)


@dataclass(frozen=True)
class CompiledPattern:
    """A pattern with its compile options: the part of a key that no call changes."""

    pattern: Pattern
    form: str
    strict: bool
    deterministic: bool

    @cached_property
    def program(self) -> str:
        """The canonical text of the pattern, independent of names."""
        return canonical(self.pattern)

    def key(self, sizes: TensorSizes, executor: Executor, target: str, tf32: bool) -> Key:
        """Return the key of calls with heads of one kind on one machine."""
        parts = {
            "pattern": self.pattern.name,
            "parameters": ", ".join(f"{name}={value}" for name, value in sorted(self.pattern.parameters.items()))
            or "none",
            "program": self.program,
            "form": self.form,
            "strict": str(self.strict),
            "deterministic": str(self.deterministic),
            "executor": executor,
            "dk": str(sizes.dk),
            "dv": str(sizes.dv),
            "dtype": sizes.dtype,
            "grouped": str(sizes.heads != sizes.kv_heads),
            "tf32": str(tf32),
            "target": target,
            "emitter": emitter(),
            "torch": installed("torch"),
            "triton": installed("triton"),
        }
        return Key.of(parts)


def bucket_of(sizes: TensorSizes) -> str:
    """Return a call's bucket: lengths and batch · heads, each rounded up to a power of two; marks equal lengths."""
    square = "-square" if sizes.n_q == sizes.n_k else ""
    batch_heads = sizes.batch * sizes.heads
    return f"q{_up(sizes.n_q)}-k{_up(sizes.n_k)}-lanes{_up(batch_heads)}{square}"


BUCKET = re.compile(r"q[0-9]{1,20}-k[0-9]{1,20}-lanes[0-9]{1,20}(-square)?")
"""The form of a bucket's name."""


def _up(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@cache
def emitter() -> str:
    """Return the version of the planner and emitter: a digest of their sources, which changes with every edit."""
    hasher = hashlib.sha256()
    for name, data in _texts(Path(attnc.compiler.__file__).parent):
        hasher.update(name.encode() + b"\0" + data + b"\0")
    return hasher.hexdigest()[:16]


def _texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".json"):
            yield path.relative_to(folder).as_posix(), path.read_bytes()
