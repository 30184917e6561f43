"""Rates of selection and of attention to selected blocks on a CPU, without torch's kernel, in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChoiceRates:
    """Rates of a machine in nanoseconds, for fp32 and the number of threads with which they were measured.

    Selection: `node`, a node of the selection's expressions, whatever its size; `row`, a row that selects; `place`, a
    candidate block of a row that is ranked by its score; `ordered`, a candidate where a row's candidates are sorted;
    `product`, a dot product of two vectors of 64 elements; `operation`, an element of an operation of a score; `test`,
    an element of a node of a condition; `pooled`, an element of keys or values that is averaged.

    Attention: `listed`, a candidate of a row that is read to build lists; `piece` and `piece_backward`, a block with
    its gathered queries, whatever its size; `taken`, an element of rows that is gathered; `merged`, an element of
    partial results that is gathered, merged by log-sum-exp and scattered; `added`, an element of gradients of rows.
    """

    node: float
    row: float
    place: float
    ordered: float
    product: float
    operation: float
    test: float
    pooled: float
    listed: float
    piece: float
    piece_backward: float
    taken: float
    merged: float
    added: float


GUESSED = ChoiceRates(
    node=90_000.0,
    row=35.0,
    place=2.5,
    ordered=300.0,
    product=1.2,
    operation=0.6,
    test=3.0,
    pooled=1.0,
    listed=1.4,
    piece=60_000.0,
    piece_backward=70_000.0,
    taken=0.15,
    merged=1.5,
    added=0.8,
)
"""Rates of two threads of a CPU with AVX-512, torch 2.13."""
