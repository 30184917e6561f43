"""The work of one chunk of a pass, counted product by product: the chunk forms of `runtime.recurrent`, row by row.

A chunk is `length` rows, a row a micro-step. L rows, R rows of the state and V columns of it; readers and writers are
the rows that read the state (the query, a correction's read) and that it is written by (the key, a correction's left
side). Of a pair matrix L² entries are computed, or, with a decay of each row, those of its levels: blocks of 1, 2, 4, …
rows, which kernels widen to `least` rows. Work falls into three parts: `local`, before any state is known; `serial`,
the state's own way from chunk to chunk; and `output`, from the states before the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Literal

Gate = Literal["none", "scalar", "rows", "columns"]
Correction = Literal["none", "delta", "rank one"]

BASE = 16
"""Rows of the diagonal blocks of a triangle that are solved by substitution; larger ones are merged by products."""


@dataclass(frozen=True, slots=True)
class PassForm:
    """A pass at its sizes: a state of `rows` × `columns`, `micro` rows of a chunk for a token. `words`: its class."""

    state: str
    words: str
    rows: int
    columns: int
    micro: int
    gate: Gate
    correction: Correction
    reads: int

    @property
    def readers(self) -> int:
        """Rows of a token that read the state."""
        return 1 if self.correction == "none" else 2

    @property
    def writers(self) -> int:
        """Rows of a token that the state is written by."""
        return 2 if self.correction == "rank one" else 1

    @property
    def entries(self) -> int:
        """The number of entries of the state."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Amount:
    """`products`: floating-point operations of matrix products in the dtype of the call; `exact`: of those that merge a
    triangle, which need fp32; `fma`: multiplications and additions outside of products; `exps`: exponentials.
    """

    products: float = 0.0
    exact: float = 0.0
    fma: float = 0.0
    exps: float = 0.0

    @property
    def flop(self) -> float:
        """The FLOPs of products of both kinds."""
        return self.products + self.exact

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.products + other.products, self.exact + other.exact, self.fma + other.fma, self.exps + other.exps
        )

    def __mul__(self, times: float) -> Amount:
        return Amount(self.products * times, self.exact * times, self.fma * times, self.exps * times)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The work of one chunk."""

    local: Amount
    serial: Amount
    output: Amount

    @property
    def total(self) -> Amount:
        """The total work of a chunk."""
        return self.local + self.serial + self.output


def levels(length: int, least: int = 1) -> float:
    """Entries of a pair matrix that are computed level by level, in blocks of at least `least` rows."""
    total, block = 0.0, 1
    while block < length:
        total += length * block / 2 if block >= least else length * min(least, length)
        block *= 2
    return total


def squares(form: PassForm, length: int, least: int = 1) -> float:
    """Entries of a pair matrix that are computed."""
    return levels(length, least) if form.gate == "rows" else float(length * length)


def triangle(length: int) -> Amount:
    """The inverse of a unit triangle: substitution on blocks of `BASE` rows, then merges of pairs of blocks."""
    base = min(BASE, length)
    merges, block = 0.0, base
    while block < length:
        merges += 2.0 * length * block * block
        block *= 2
    return Amount(exact=merges, fma=length * base * (base - 1) / 2)


def decays(form: PassForm, length: int) -> Amount:
    """The exponentials of a chunk's decays, and what they multiply: weights of pairs, or sides at each level."""
    sides, depth = form.readers + form.writers, log2(length) if length > 1 else 0.0
    match form.gate:
        case "none":
            return Amount()
        case "scalar":
            square = float(length * length)
            return Amount(fma=square * form.readers * form.writers, exps=square + 2 * length)
        case "rows":
            own = length * form.rows
            return Amount(fma=own * depth * (sides / 2 + 2), exps=own * (depth + 2))
        case "columns":
            own = length * form.columns
            return Amount(fma=own * depth * 3, exps=own * (depth + 2))


def edges(form: PassForm, length: int) -> Amount:
    """The exponentials that the state's own way needs: of each token, to the end of its chunk."""
    width = {"none": 0, "scalar": 1, "rows": form.rows, "columns": form.columns}[form.gate]
    return Amount(fma=2.0 * length * width, exps=float(length * width))


def forward(form: PassForm, length: int, *, least: int = 1, apart: bool = True) -> Chunk:
    """`apart`: what the corrector makes of keys and values is formed before the states are known (W and U of the UT
    transform), so that the serial part is two products, and decays are made once; else the triangle is applied on the
    way, which needs fewer products, and decays are made for both sides.
    """
    step, pair = _step(form, length), _pair(form, length)
    sides = 2 * squares(form, length, least) * form.rows * form.writers
    output = Amount(form.reads * (step + (_columns(form, length, least) if form.gate == "columns" else pair)))
    asked = Amount(form.reads * sides) + decays(form, length)
    if form.correction == "none":
        return Chunk(asked, Amount(step) + edges(form, length), output)
    rank_one = form.correction == "rank one"
    local = sides + (pair / form.writers if rank_one else 0.0)
    serial = step * (3 if rank_one else 2)
    applied = pair / form.writers
    local, serial = (local + applied + _wide(form, length), serial) if apart else (local, serial + applied)
    again = Amount() if apart else decays(form, length)
    return Chunk(
        asked + Amount(local) + triangle(length) + again,
        Amount(serial) + edges(form, length),
        output,
    )


def backward(form: PassForm, length: int, *, least: int = 1, apart: bool = True) -> Chunk:
    """From the states before chunks, which are kept; all else is computed anew. `apart` as in the forward."""
    step, one = _step(form, length), 2.0 * length * length * form.columns
    sides = 2 * squares(form, length, least) * form.rows * form.readers * form.writers
    adjoint = decays(form, length) * 3
    both = (form.readers + form.writers) * step
    if form.gate == "columns":
        output = 3 * sides + 3 * _columns(form, length, least) + 2 * step + both
        return Chunk(Amount(), Amount(step) + edges(form, length), Amount(form.reads * output) + adjoint)
    if form.correction == "none":
        output = 3 * sides + step + one + one + both
        return Chunk(Amount(), Amount(step) + edges(form, length), Amount(form.reads * output) + adjoint)
    rank_one = form.correction == "rank one"
    own = sides / form.readers
    local = own + step + one + one + (one if rank_one else 0.0)
    serial = 3 * step
    local, serial = (local + one + _wide(form, length), serial) if apart else (local, serial + one)
    output = (sides - own) + 2 * sides + form.readers * form.writers * one + both
    output += step + 2 * one if rank_one else one
    return Chunk(
        Amount(local) + triangle(length) + decays(form, length),
        Amount(serial) + edges(form, length),
        Amount(output) + adjoint,
    )


def _step(form: PassForm, length: int) -> float:
    """One product of rows with the state."""
    return 2.0 * length * form.rows * form.columns


def _pair(form: PassForm, length: int) -> float:
    """Pairs with the values of all writers."""
    return 2.0 * length * length * form.columns * form.writers


def _wide(form: PassForm, length: int) -> float:
    """The triangle applied to the rows that a correction reads."""
    return 2.0 * length * length * form.rows


def _columns(form: PassForm, length: int, least: int) -> float:
    """Pairs with values that are scaled inside each level."""
    return 2.0 * levels(length, least) * form.columns


__all__ = [
    "BASE",
    "Amount",
    "Chunk",
    "Correction",
    "Gate",
    "PassForm",
    "backward",
    "decays",
    "edges",
    "forward",
    "levels",
    "squares",
    "triangle",
]
