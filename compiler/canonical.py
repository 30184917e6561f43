"""A pattern by what it means: one digest for all texts that say the same in other names, in every process.

Told apart are parameters, inputs, and every expression as it was lowered. Not told apart are comments and layout, which
the IR does not have, and names that are the text's own: of bound variables, axes, segments, branches, selections and
states, which stand here as numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from attnc.compiler.ir import (
    Arith,
    Attend,
    Compare,
    Coord,
    Data,
    Linear,
    Pattern,
    Recur,
    Segment,
    Selection,
    State,
    StateAt,
    Step,
    Tensor,
    UnitCondition,
    Var,
)
from attnc.spec.source import Span

_SILENT: Mapping[type, set[str]] = {Coord: {"name"}, Pattern: {"origins", "general", "parameters"}}
"""Fields that are display only, are derived from others, or stand beside the rest."""

_SYMMETRIC = ("mul", "min", "max", "bitand", "bitor", "xor")
_WORD = re.compile(r"\w+")


def canonical(pattern: Pattern) -> str:
    """The digest of a pattern: 32 hexadecimal digits."""
    writer = Writer(own_names(pattern))
    told = (writer.value(pattern), writer.value(tuple(sorted(pattern.parameters.items()))))
    return hashlib.sha256(b"".join(told)).hexdigest()[:32]


def own_names(pattern: Pattern) -> dict[str, str]:
    """Names that only the text knows, by number: what attentions, states and selections gave is read by them."""
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
"""The fields that hold such a name, alone or with what is asked of it behind a point or a space (`near.lse`)."""


class Writer:
    """Digests of values, each node's computed once. `names`: what stands for a name wherever it is read."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._known: dict[int, bytes] = {}
        self._alive: list[object] = []  # so that an identity stays one object's
        self._blocks: dict[Var, str] = {}

    def value(self, value: object) -> bytes:
        """The digest of anything that stands in an IR. Raises TypeError for what never does."""
        if is_dataclass(value) and not isinstance(value, type):
            known = self._known.get(id(value))
            if known is None:
                known = self._known[id(value)] = self._structure(value)
                self._alive.append(value)
            return known
        match value:
            case str():
                return digest_of("text", value.encode())
            case tuple() | list():
                return digest_of("list", *map(self.value, value))
            case np.ndarray():
                return digest_of("array", repr((value.dtype.str, value.shape)).encode(), value.tobytes())
            case None | bool() | int() | float() | Fraction():
                return digest_of(type(value).__name__, repr(value).encode())
        raise TypeError(f"{type(value).__name__} is no part of an IR")

    def _structure(self, value: Any) -> bytes:
        """Return the digest of a dataclass, from its kind and its fields."""
        match value:
            case Span():
                return b""
            case Data():
                return self.value(value.array)
            case Linear():  # in an order, and under `abs` with a sign, that names decide
                return self._linear(value, 1)
            case Arith(op="abs", operands=(Linear() as inside,)) | Compare(op="eq", value=Linear() as inside):
                what = "abs" if isinstance(value, Arith) else "eq"
                return digest_of(what, min(self._linear(inside, sign) for sign in (1, -1)))
            case Arith(op=op) if op in _SYMMETRIC:
                return digest_of(op, *sorted(map(self.value, value.operands)))
            case Segment():  # the names of axes are the text's own
                return digest_of("Segment", *map(self.value, ([e for _, e in value.axes], value.offset, value.length)))
            case Var():  # serials tell apart what is bound, but for the numbers of blocks
                return digest_of("Var", self._blocks.get(value, str(value.serial)).encode())
            case UnitCondition():
                sides = (("q", value.q_vars), ("k", value.k_vars))
                self._blocks.update((var, f"{side}{i}") for side, own in sides for i, var in enumerate(own))
        kind: type = type(value)
        told = [f.name for f in fields(value) if f.init and f.name not in _SILENT.get(kind, set())]
        parts = (digest_of(name, self._field(kind, name, getattr(value, name))) for name in told)
        return digest_of(kind.__name__, *parts)

    def _field(self, kind: type, name: str, value: object) -> bytes:
        if _NAMED.get(kind) == name:
            return self.value(self._renamed(str(value)))
        if kind is Tensor and name == "dims" and isinstance(value, tuple):
            return self.value(tuple(self._renamed(dim, asked=True) if isinstance(dim, str) else dim for dim in value))
        return self.value(value)

    def _renamed(self, name: str, *, asked: bool = False) -> str:
        """A name without the text's own; `asked`: a dimension, which is never such a name alone."""
        found = _WORD.match(name)
        if found is None or found[0] not in self._names or (asked and found[0] == name):
            return name
        return f"{self._names[found[0]]}{name[found.end() :]}"

    def _linear(self, value: Linear, sign: int) -> bytes:
        terms = sorted(self.value((term, sign * factor)) for term, factor in value.terms)
        return digest_of("Linear", *terms, self.value(sign * value.constant))


def digest_of(kind: str, *parts: bytes) -> bytes:
    """Parts as they stand, each with its length, so that no two lists of them look alike."""
    hasher = hashlib.sha256(kind.encode())
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()
