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

import numpy as np

from attnc.compiler.ir import Arith, Coord, Data, Linear, Pattern, Round, Segment, Var
from attnc.spec.source import Span

_SILENT: Mapping[type, set[str]] = {Coord: {"name"}, Pattern: {"origins", "general", "parameters"}}
"""Fields that are display only, are derived from others, or stand beside the rest."""

_SYMMETRIC = ("mul", "min", "max", "bitand", "bitor", "xor")
_WORD = re.compile(r"\w+")


def canonical(pattern: Pattern) -> str:
    """The digest of a pattern: 32 hexadecimal digits."""
    writer = _Writer(_own_names(pattern))
    told = (writer.value(pattern), writer.value(tuple(sorted(pattern.parameters.items()))))
    return hashlib.sha256(b"".join(told)).hexdigest()[:32]


def _own_names(pattern: Pattern) -> dict[str, str]:
    """Names that only the text knows, by number: what attentions, states and selections gave is read by them."""
    recurs = (*pattern.stateful, *(() if pattern.recur is None else (pattern.recur,)))
    groups = {
        "attention": [node.name for node in pattern.nodes],
        "recurrence": [recur.name for recur in recurs],
        "state": [state.name for recur in recurs for state in recur.states],
        "selection": [selection.name for selection in pattern.selections],
    }
    found: dict[str, str] = {}
    for kind, names in groups.items():
        for name in dict.fromkeys(names):
            found.setdefault(name, f"{kind} {len(found)}")
    found.pop(pattern.name, None)  # of a pattern without branches, which is also the name of its kernels
    return found


class _Writer:
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
                return _digest("text", _WORD.sub(lambda word: self._names.get(word[0], word[0]), value).encode())
            case tuple() | list():
                return _digest("list", *map(self.value, value))
            case np.ndarray():
                return _digest("array", repr((value.dtype.str, value.shape)).encode(), value.tobytes())
            case None | bool() | int() | float() | Fraction():
                return _digest(type(value).__name__, repr(value).encode())
        raise TypeError(f"{type(value).__name__} is no part of an IR")

    def _structure(self, value: object) -> bytes:
        """Of a dataclass: its kind and its fields."""
        match value:
            case Span():
                return b""
            case Data():
                return self.value(value.array)
            case Linear():  # in an order, and under `abs` with a sign, that names decide
                return self._linear(value, 1)
            case Arith(op="abs", operands=(Linear() as inside,)):
                return _digest("abs", min(self._linear(inside, sign) for sign in (1, -1)))
            case Arith(op=op) if op in _SYMMETRIC:
                return _digest(op, *sorted(map(self.value, value.operands)))
            case Segment():  # the names of axes are the text's own
                return _digest("Segment", *map(self.value, ([e for _, e in value.axes], value.offset, value.length)))
            case Var():  # serials tell apart what is bound, but for the numbers of blocks
                return _digest("Var", self._blocks.get(value, str(value.serial)).encode())
            case Round():
                sides = (("q", value.q_vars), ("k", value.k_vars))
                self._blocks.update((var, f"{side}{i}") for side, own in sides for i, var in enumerate(own))
        silent = _SILENT.get(type(value), set())
        told = [f.name for f in fields(value) if f.init and f.name not in silent]  # type: ignore[arg-type]
        return _digest(type(value).__name__, *(_digest(name, self.value(getattr(value, name))) for name in told))

    def _linear(self, value: Linear, sign: int) -> bytes:
        terms = sorted(self.value((term, sign * factor)) for term, factor in value.terms)
        return _digest("Linear", *terms, self.value(sign * value.constant))


def _digest(kind: str, *parts: bytes) -> bytes:
    """Parts as they stand, each with its length, so that no two lists of them look alike."""
    hasher = hashlib.sha256(kind.encode())
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()
