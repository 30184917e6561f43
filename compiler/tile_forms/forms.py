"""The forms of one set of tiles, each made when it is asked for, and which of them is smallest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from attnc.compiler.planning.runs import Resolved
from attnc.compiler.tile_forms.bounds import Bounds
from attnc.compiler.tile_forms.brick_tiles import BrickProduct
from attnc.compiler.tile_forms.fit_bounds import fit_bounds
from attnc.compiler.tile_forms.rectangles import Rectangles, merge_rectangles
from attnc.compiler.tile_forms.tile_lists import TileLists, list_tiles
from attnc.compiler.tile_forms.tile_runs import TileRuns, find_tile_runs

Name = Literal["bounds", "runs", "lists"]


@dataclass(frozen=True, slots=True)
class TileBounds:
    """Loop bounds of the full tiles and of the partial ones."""

    full: Bounds
    partial: Bounds

    @property
    def bytes(self) -> int:
        """Their size."""
        return self.full.bytes + self.partial.bytes

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {line}"
            for name, bounds in (("full", self.full), ("partial", self.partial))
            for line in str(bounds).split("\n")
        )


@dataclass(frozen=True)
class Forms:
    """Runs, and what else they can be said as."""

    runs: TileRuns

    @cached_property
    def bounds(self) -> TileBounds | None:
        """Loop bounds, None where the full or the partial tiles have none."""
        full = fit_bounds(self.runs.full)
        partial = None if full is None else fit_bounds(self.runs.partial)
        return None if full is None or partial is None else TileBounds(full, partial)

    @cached_property
    def lists(self) -> TileLists:
        """Lists of single tiles."""
        return list_tiles(self.runs)

    @cached_property
    def rectangles(self) -> Rectangles:
        """The full tiles as rectangles. Not by row, so not among the forms that are compared."""
        return merge_rectangles(self.runs.full)

    @cached_property
    def transposed(self) -> Forms:
        """The forms by tile column, for gradients of keys and values."""
        return Forms(self.runs.transposed())

    @property
    def sizes(self) -> dict[Name, int]:
        """Bytes that say where the tiles are, of every form there is; no list is made.

        Masks and the classes of partial tiles, 4 bytes each, come on top where a kernel looks masks up.
        """
        full, partial = self.runs.full, self.runs.partial
        pointers = 8 * (self.runs.frame.rows + 1)
        sizes: dict[Name, int] = {} if self.bounds is None else {"bounds": self.bounds.bytes}
        sizes["runs"] = pointers + 8 * (len(full) + len(partial))
        sizes["lists"] = pointers + 4 * (full.tiles + partial.tiles)
        return sizes

    @property
    def smallest(self) -> Name:
        """The smallest form; of equal ones, that with the simpler loop."""
        sizes = self.sizes
        return min(sizes, key=lambda name: sizes[name])

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.sizes.items())
        none = "" if self.bounds is not None else "; no loop bounds were found"
        full, partial = self.runs.full, self.runs.partial
        tiles, runs = full.tiles + partial.tiles, len(full) + len(partial)
        mean = f"; {tiles / runs:.1f} tiles a run" if runs else ""
        return f"{self.smallest}: {sizes}{none}{mean}"


def forms_of(resolved: Resolved) -> Forms:
    """The forms of a relation's live tiles."""
    return Forms(find_tile_runs(resolved))


@dataclass(frozen=True)
class BrickForms:
    """A product of axes, and what it can be said as."""

    product: BrickProduct

    @cached_property
    def axes(self) -> tuple[Forms, ...]:
        """The forms of every axis; a kernel that loops over bricks loops over the axes."""
        return tuple(map(Forms, self.product.axes))

    @property
    def sizes(self) -> dict[Literal["axes", "lists"], int]:
        """Bytes that say where the bricks are, with the smallest form of each axis and as one list; none is made."""
        axes = sum(axis.sizes[axis.smallest] for axis in self.axes)
        rows = prod(axis.frame.rows for axis in self.product.axes)
        return {"axes": axes, "lists": 8 * (rows + 1) + 4 * (self.product.full + self.product.partial)}

    @property
    def smallest(self) -> Literal["axes", "lists"]:
        """The smaller form."""
        return "axes" if self.sizes["axes"] <= self.sizes["lists"] else "lists"

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.sizes.items())
        return "\n".join([f"{self.smallest}: {sizes}", *(f"axis {i}: {axis}" for i, axis in enumerate(self.axes))])
