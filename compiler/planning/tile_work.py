"""The live tiles of a relation in one order of tokens, as kernels walk them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from attnc.compiler.planning.strips import Strips, together


@dataclass(frozen=True, slots=True)
class Order:
    """The order of tokens in tiles; bricks have a side for each axis, residue classes have `divisors`."""

    kind: Literal["natural", "bricks", "residues"]
    q_brick: tuple[int, ...] = ()
    k_brick: tuple[int, ...] = ()
    divisors: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "bricks":
            q, k = ("×".join(map(str, brick)) for brick in (self.q_brick, self.k_brick))
            return f"bricks of {q} queries and {k} keys"
        if self.kind == "residues":
            return f"residue classes modulo {', '.join(map(str, self.divisors))}"
        return "natural order"


NATURAL = Order("natural")


@dataclass(frozen=True, eq=False)
class TileWork:
    """The live tiles of a relation, by rows for the forward and by columns for the gradient of keys.

    `visible`: visible pairs, None where they were not counted. `merged`: rows of the output that two walks write and a
    merge combines. `sampled`: the number of tile rows from which the counts are extrapolated, 0 if all were counted.
    """

    order: Order
    q_tile: int
    k_tile: int
    rows: Strips
    columns: Strips
    visible: int | None
    merged: int = 0
    sampled: int = 0

    def repeated(self, times: int) -> TileWork:
        """Return the work of `times` equal relations."""
        visible = None if self.visible is None else self.visible * times
        rows, columns = self.rows.repeated(times), self.columns.repeated(times)
        return replace(self, rows=rows, columns=columns, visible=visible, merged=self.merged * times)


def joined(parts: Sequence[TileWork], order: Order, q_tile: int, k_tile: int) -> TileWork:
    """Return the work of several relations that are walked by one kernel."""
    counts = [part.visible for part in parts]
    return TileWork(
        order,
        q_tile,
        k_tile,
        together(part.rows for part in parts),
        together(part.columns for part in parts),
        None if None in counts else sum(n for n in counts if n is not None),
        sum(part.merged for part in parts),
        max((part.sampled for part in parts), default=0),
    )
