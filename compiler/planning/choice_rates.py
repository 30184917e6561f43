"""Costs of selection, and of attention to selected blocks, on a CPU beside torch's kernel, in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChoiceRates:
    """Rates of one machine, for fp32 and the number of threads that they were measured with.

    Of a choice: `node`, of the expressions of a selection, whatever its size; `row` that chooses, and each `place` of
    it, ranked by its scores; `ordered`, a place where a row's places are sorted; `product` of two vectors of 64
    numbers; `operation`, an element of one operation of a score; `test`, an element of one node of a condition;
    `pooled`, a number of keys or values that are averaged.

    Of what was chosen: `listed`, a place of a row that is looked at for lists; `piece` and `piece_backward`, gathered
    queries that meet a place, whatever its size; `taken`, a number of rows that is gathered; `merged`, one of what rows
    have so far, which is gathered, merged by log-sum-exp and put back; `added`, one of the gradients of rows.
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
"""Two threads of a CPU with AVX-512, torch 2.13."""
