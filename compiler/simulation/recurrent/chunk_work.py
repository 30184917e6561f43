"""The work of one chunk of a pass, product by product: the chunk forms of `runtime.executors.recurrent`, row by row.

A chunk has `length` rows, one for each micro-step: L rows, with R rows and V columns of the state. Readers are the
vectors that read the state (the query, a correction's read); writers are the vectors that write it (the key, a
correction's left side). Of a pair matrix, L² entries are computed, or, with a decay for each row of the state, the
entries of its levels: blocks of 1, 2, 4, … rows, which kernels widen to `least` rows. The work has three parts:
`local`, before any state is known; `serial`, the update of the state from chunk to chunk; and `output`, from the states
before the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from attnc.compiler.recurrences.recurrence_class import RecurrenceClass

BASE = 16
"""Rows of the diagonal blocks of a triangle that are solved by substitution; products merge them to larger blocks."""


@dataclass(frozen=True, slots=True)
class PassForm:
    """A pass of the class `kind` at its sizes: a state of `rows` × `columns`.

    `words`: the name of its class in reports. `reads`: reads of the state for each token.
    """

    state: str
    words: str
    rows: int
    columns: int
    kind: RecurrenceClass
    reads: int

    @property
    def micro(self) -> int:
        """The number of rows of a chunk for each token."""
        return self.kind.micro

    @property
    def readers(self) -> int:
        """The number of vectors of a micro-step that read the state."""
        return len(self.kind.readers)

    @property
    def writers(self) -> int:
        """The number of vectors of a micro-step that write the state."""
        return len(self.kind.writers)

    @property
    def entries(self) -> int:
        """The number of entries of the state."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of work.

    `products`: floating-point operations of matrix products in the dtype of the call. `exact`: floating-point
    operations of products that merge a triangle, which need fp32. `fma`: multiplications and additions outside of
    products. `exps`: exponentials.
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
    """The work of a chunk in its three parts: `local`, `serial` and `output`."""

    local: Amount
    serial: Amount
    output: Amount

    @property
    def total(self) -> Amount:
        """The total work of a chunk."""
        return self.local + self.serial + self.output


def levels(length: int, least: int = 1) -> float:
    """Return the entries of a pair matrix that are computed level by level, in blocks of at least `least` rows."""
    total, block = 0.0, 1
    while block < length:
        total += length * block / 2 if block >= least else length * min(least, length)
        block *= 2
    return total


def squares(form: PassForm, length: int, least: int = 1) -> float:
    """Return the entries of a pair matrix that are computed: all, or those of its levels with a decay per row."""
    return levels(length, least) if form.kind.gate == "rows" else float(length * length)


def triangle(length: int) -> Amount:
    """Return the work of inverting a unit triangle: substitution on blocks of `BASE` rows, then merges of pairs."""
    base = min(BASE, length)
    merges, block = 0.0, base
    while block < length:
        merges += 2.0 * length * block * block
        block *= 2
    return Amount(exact=merges, fma=length * base * (base - 1) / 2)


def decays(form: PassForm, length: int) -> Amount:
    """Return the exponentials of a chunk's decays and their multiplications with pairs, or with sides at each level."""
    sides, depth = form.readers + form.writers, log2(length) if length > 1 else 0.0
    if form.kind.columns:
        entries = length * form.columns
        return Amount(fma=entries * depth * 3, exps=entries * (depth + 2))
    if form.kind.gate == "rows":
        entries = length * form.rows
        return Amount(fma=entries * depth * (sides / 2 + 2), exps=entries * (depth + 2))
    if form.kind.gate == "none":
        return Amount()
    square = float(length * length)
    return Amount(fma=square * form.readers * form.writers, exps=square + 2 * length)


def edges(form: PassForm, length: int) -> Amount:
    """Return the exponentials of the decays from each row to the end of its chunk, which update the state."""
    widths = {"none": 0, "constant": 1, "scalar": 1, "rows": form.rows}
    width = form.columns if form.kind.columns else widths[form.kind.gate]
    return Amount(fma=2.0 * length * width, exps=float(length * width))


def forward(form: PassForm, length: int, *, least: int = 1, apart: bool = True) -> Chunk:
    """Return the work of a chunk in the forward.

    `apart`: corrected keys and values are computed before the states are known (W and U of the UT transform), so that
    the serial part is two products and decays are computed once. Otherwise the triangle is applied in the serial part,
    which needs fewer products, and decays are computed for both sides.
    """
    step, pair = _step(form, length), _pair(form, length)
    sides = 2 * squares(form, length, least) * form.rows * form.writers
    output = Amount(form.reads * (step + (_columns(form, length, least) if form.kind.columns else pair)))
    reading = Amount(form.reads * sides) + decays(form, length)
    if not form.kind.is_corrected:
        return Chunk(reading, Amount(step) + edges(form, length), output)
    rank_one = form.kind.is_rank_one
    local = sides + (pair / form.writers if rank_one else 0.0)
    serial = step * (3 if rank_one else 2)
    applied = pair / form.writers
    local, serial = (local + applied + _wide(form, length), serial) if apart else (local, serial + applied)
    repeated_decays = Amount() if apart else decays(form, length)
    return Chunk(
        reading + Amount(local) + triangle(length) + repeated_decays,
        Amount(serial) + edges(form, length),
        output,
    )


def backward(form: PassForm, length: int, *, least: int = 1, apart: bool = True) -> Chunk:
    """Return the work of a chunk in the backward, which reads the kept states and recomputes everything else.

    `apart` as in `forward`.
    """
    step, pair_values = _step(form, length), 2.0 * length * length * form.columns
    sides = 2 * squares(form, length, least) * form.rows * form.readers * form.writers
    adjoint = decays(form, length) * 3
    with_state = (form.readers + form.writers) * step
    if form.kind.columns:
        output = 3 * sides + 3 * _columns(form, length, least) + 2 * step + with_state
        return Chunk(Amount(), Amount(step) + edges(form, length), Amount(form.reads * output) + adjoint)
    if not form.kind.is_corrected:
        output = 3 * sides + step + pair_values + pair_values + with_state
        return Chunk(Amount(), Amount(step) + edges(form, length), Amount(form.reads * output) + adjoint)
    rank_one = form.kind.is_rank_one
    corrected_sides = sides / form.readers
    local = corrected_sides + step + pair_values + pair_values + (pair_values if rank_one else 0.0)
    serial = 3 * step
    local, serial = (local + pair_values + _wide(form, length), serial) if apart else (local, serial + pair_values)
    output = (sides - corrected_sides) + 2 * sides + form.readers * form.writers * pair_values + with_state
    output += step + 2 * pair_values if rank_one else pair_values
    return Chunk(
        Amount(local) + triangle(length) + decays(form, length),
        Amount(serial) + edges(form, length),
        Amount(output) + adjoint,
    )


def _step(form: PassForm, length: int) -> float:
    """Return the operations of a product of the chunk's rows with the state."""
    return 2.0 * length * form.rows * form.columns


def _pair(form: PassForm, length: int) -> float:
    """Return the operations of a product of pair matrices with the values of all writers."""
    return 2.0 * length * length * form.columns * form.writers


def _wide(form: PassForm, length: int) -> float:
    """Return the operations of a product of the triangle with the rows that a correction reads."""
    return 2.0 * length * length * form.rows


def _columns(form: PassForm, length: int, least: int) -> float:
    """Return the operations of products of pairs with values that are scaled inside each level."""
    return 2.0 * levels(length, least) * form.columns
