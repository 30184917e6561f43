"""A digest of a pattern's meaning: texts that differ only in local names have the same digest, in every process.

The digest depends on parameters, inputs, and every expression as it was lowered. It does not depend on comments and
layout, which the IR does not have, nor on names that are local to the text: the names of bound variables, axes,
segments, branches, selections and states are replaced by numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.nodes import (
    Arith,
    Compare,
    Coord,
    Data,
    Linear,
    StateAt,
    Tensor,
    UnitCondition,
    Var,
)
from attnc.compiler.ir.pattern import (
    Attend,
    Pattern,
    Recur,
    Segment,
    Selection,
    State,
    Step,
)
from attnc.spec.source import Span

_SILENT: Mapping[type, set[str]] = {Coord: {"name"}, Pattern: {"origins", "general", "parameters"}}
"""Fields that are left out: they are only displayed, are derived from other fields, or are written separately."""

_WORD = re.compile(r"\w+")


def canonical(pattern: Pattern) -> str:
    """Return the digest of a pattern: 32 hexadecimal digits."""
    writer = Writer(own_names(pattern))
    digests = (writer.value(pattern), writer.value(tuple(sorted(pattern.parameters.items()))))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def own_names(pattern: Pattern) -> dict[str, str]:
    """Number the names of attentions, states and selections, which are local to the pattern's text."""
    recurs = (*pattern.stateful, *(() if pattern.recur is None else (pattern.recur,)))
    names = [
        *(node.name for node in pattern.nodes),
        *(recur.name for recur in recurs),
        *(state.name for recur in recurs for state in recur.states),
        *(selection.name for selection in pattern.selections),
    ]
    return {name: f"own {number}" for number, name in enumerate(dict.fromkeys(names))}


_NAMED: Mapping[type, str] = {
    **dict.fromkeys((Attend, Recur, Selection, State, StateAt, Tensor), "name"),
    Step: "state",
}
"""The field of each class that holds a local name, alone or with a suffix behind a dot or space (`near.lse`)."""


class Writer:
    """Computes digests of values, once for each node. `names`: the replacement of every local name."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._known: dict[int, bytes] = {}
        self._alive: list[object] = []  # keeps objects alive, so that no identity is used twice
        self._blocks: dict[Var, str] = {}

    def value(self, value: object) -> bytes:
        """Return the digest of any value in the IR. Raises TypeError for values that cannot occur in the IR."""
        if is_dataclass(value) and not isinstance(value, type):
            digest = self._known.get(id(value))
            if digest is None:
                digest = self._known[id(value)] = self._structure(value)
                self._alive.append(value)
            return digest
        match value:
            case str():
                return digest_of("text", value.encode())
            case tuple() | list():
                return digest_of("list", *map(self.value, value))
            case np.ndarray():
                return digest_of("array", repr((value.dtype.str, value.shape)).encode(), value.tobytes())
            case None | bool() | int() | float() | Fraction():
                return digest_of(type(value).__name__, repr(value).encode())
        raise TypeError(f"{type(value).__name__} is not part of the IR")

    def _structure(self, value: Any) -> bytes:
        """Return the digest of a dataclass, from its kind and its fields."""
        match value:
            case Span():
                return b""
            case Data():
                return self.value(value.array)
            case Linear():  # the order of terms, and the sign under `abs`, depend on names
                return self._linear(value, 1)
            case Arith(op="abs", operands=(Linear() as sum_,)) | Compare(op="eq", value=Linear() as sum_):
                kind_name = "abs" if isinstance(value, Arith) else "eq"
                return digest_of(kind_name, min(self._linear(sum_, sign) for sign in (1, -1)))
            case Arith(op=op) if INTEGER_OPERATIONS[op].is_symmetric:
                return digest_of(op, *sorted(map(self.value, value.operands)))
            case Segment():  # the names of axes are local
                return digest_of("Segment", *map(self.value, ([e for _, e in value.axes], value.offset, value.length)))
            case Var():  # serials distinguish bound variables, except for the unit numbers of blocks
                return digest_of("Var", self._blocks.get(value, str(value.serial)).encode())
            case UnitCondition():
                sides = (("q", value.q_vars), ("k", value.k_vars))
                self._blocks.update((var, f"{side}{i}") for side, variables in sides for i, var in enumerate(variables))
        kind: type = type(value)
        names = [f.name for f in fields(value) if f.init and f.name not in _SILENT.get(kind, set())]
        parts = (digest_of(name, self._field(kind, name, getattr(value, name))) for name in names)
        return digest_of(kind.__name__, *parts)

    def _field(self, kind: type, name: str, value: object) -> bytes:
        if _NAMED.get(kind) == name:
            return self.value(self._renamed(str(value)))
        if kind is Tensor and name == "dims" and isinstance(value, tuple):
            return self.value(tuple(self._renamed(dim, is_dim=True) if isinstance(dim, str) else dim for dim in value))
        return self.value(value)

    def _renamed(self, name: str, *, is_dim: bool = False) -> str:
        """Replace a local name at the start of `name`; `is_dim`: a dimension, which is never a local name alone."""
        word = _WORD.match(name)
        if word is None or word[0] not in self._names or (is_dim and word[0] == name):
            return name
        return f"{self._names[word[0]]}{name[word.end() :]}"

    def _linear(self, value: Linear, sign: int) -> bytes:
        terms = sorted(self.value((term, sign * factor)) for term, factor in value.terms)
        return digest_of("Linear", *terms, self.value(sign * value.constant))


def digest_of(kind: str, *parts: bytes) -> bytes:
    """Hash a kind and parts, each part with its length, so that different lists of parts never collide by joining."""
    hasher = hashlib.sha256(kind.encode())
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()
