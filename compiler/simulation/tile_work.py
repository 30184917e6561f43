"""The live tiles of a relation in one order of its tokens, as kernels walk them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from attnc.compiler.simulation.strips import Strips, together


@dataclass(frozen=True, slots=True)
class Order:
    """How tokens stand in tiles. Bricks have a side for each axis; `divisors`: of the classes of residues."""

    kind: Literal["natural", "bricks", "residues"]
    q_brick: tuple[int, ...] = ()
    k_brick: tuple[int, ...] = ()
    divisors: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "bricks":
            q, k = ("×".join(map(str, brick)) for brick in (self.q_brick, self.k_brick))
            return f"bricks of {q} queries and {k} keys"
        if self.kind == "residues":
            return f"classes of residues modulo {', '.join(map(str, self.divisors))}"
        return "natural order"


NATURAL = Order("natural")


@dataclass(frozen=True, eq=False)
class TileWork:
    """The live tiles of one relation: by rows as the forward walks them, by columns as the gradient of keys does.

    `visible`: pairs, None where they were not counted. `merged`: rows of the output that two walks write and a third
    has to join. `sampled`: of how many tile rows all of this was inferred, 0 where all were counted.
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
        """So many of it."""
        visible = None if self.visible is None else self.visible * times
        rows, columns = self.rows.repeated(times), self.columns.repeated(times)
        return replace(self, rows=rows, columns=columns, visible=visible, merged=self.merged * times)


def joined(parts: Sequence[TileWork], order: Order, q_tile: int, k_tile: int) -> TileWork:
    """Several works as one, walked side by side."""
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
