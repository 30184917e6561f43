"""What a tuned choice belongs to: everything that is fixed when a pattern is compiled, and nothing that a call brings.

Lengths, batches, numbers of heads and lists are a call's: what was measured at some of them stands for their bucket.
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
from attnc.compiler.canonical import canonical
from attnc.compiler.ir import Pattern
from attnc.runtime.disk.machine_key import installed
from attnc.runtime.tensor_checks import TensorSizes

Executor = Literal["cpu", "triton"]


@dataclass(frozen=True)
class Key:
    """Named parts, by name; equal keys are those of which no part differs."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> Key:
        """The key of some parts."""
        return cls(tuple(sorted(parts.items())))

    @cached_property
    def digest(self) -> str:
        """The key as the name of a file."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:32]

    def differing(self, other: Key) -> list[str]:
        """The parts in which another key differs, as they stand here and there."""
        own, others = dict(self.parts), dict(other.parts)
        return [
            f"{name}: {own.get(name, 'none')}, there {others.get(name, 'none')}"
            for name in dict.fromkeys([*own, *others])
            if own.get(name) != others.get(name)
        ]

    def __str__(self) -> str:
        first = ("pattern", "parameters")
        ordered = sorted(
            self.parts, key=lambda part: (part[0] not in first, first.index(part[0]) if part[0] in first else 0)
        )
        return "\n".join(f"{name:<14}{value}" for name, value in ordered)


@dataclass(frozen=True)
class CompiledPattern:
    """A pattern with how it was compiled: the part of a key that no call changes."""

    pattern: Pattern
    form: str
    strict: bool
    deterministic: bool

    @cached_property
    def program(self) -> str:
        """What the pattern means, whatever its text calls it."""
        return canonical(self.pattern)

    def key(self, sizes: TensorSizes, executor: Executor, target: str, tf32: bool) -> Key:
        """The key of calls with heads of one kind on one machine."""
        told = {
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
        return Key.of(told)


def bucket_of(sizes: TensorSizes) -> str:
    """The bucket of a call's lengths and lanes: each up to the next power of two; as many queries as keys are told."""
    square = "-square" if sizes.n_q == sizes.n_k else ""
    lanes = sizes.batch * sizes.heads
    return f"q{_up(sizes.n_q)}-k{_up(sizes.n_k)}-lanes{_up(lanes)}{square}"


BUCKET = re.compile(r"q[0-9]{1,20}-k[0-9]{1,20}-lanes[0-9]{1,20}(-square)?")
"""What the name of a bucket looks like."""


def _up(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@cache
def emitter() -> str:
    """The version of what plans and emits: the digest of its texts, so that it cannot be forgotten to change."""
    hasher = hashlib.sha256()
    for name, data in _texts(Path(attnc.compiler.__file__).parent):
        hasher.update(name.encode() + b"\0" + data + b"\0")
    return hasher.hexdigest()[:16]


def _texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".json"):
            yield path.relative_to(folder).as_posix(), path.read_bytes()
