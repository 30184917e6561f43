"""Loads, stores and products: by pointers in units of 16 bytes, or as boxes that the hardware copies."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.kernels.depth import DepthSlice, accumulated, pieces
from attnc.compiler.kernels.position_text import PositionText


@dataclass
class Loads(PositionText):
    """The part of a kernel text that loads, stores and multiplies tiles."""

    def base(self, name: str, head: str, moving: bool) -> None:
        """Emit where a tensor's head begins and where its rows are; for the moving side, the step from tile to tile."""
        unit = self.problem.vector
        if not moving:
            self.lines.add(self.head_base(name, head))
        if self.problem.grid is not None:
            if moving:
                self.lines.add(f"{name}_step = {name}_token.to(tl.int64) * {unit}")
            else:
                self.lines.add(f"{name}_rows = row[:, None] * ({name}_token.to(tl.int64) * {unit})")
            return
        if moving:
            size = self.sides.column_tile
            self.lines.add(f"{name}_step = {name}_token.to(tl.int64) * {size * unit}")
        else:
            size = self.sides.row_tile
            self.lines.add(f"{name}_base += row_tile * ({name}_token.to(tl.int64) * {size * unit})")
            inner = f"tl.arange(0, {size})[:, None] * ({name}_token * {unit})"
            self.lines.add(f"{name}_rows = {inner}")

    def head_base(self, name: str, head: str) -> str:
        """Return the line that computes where a head of a tensor begins."""
        return f"{name}_base = {name} + (batch * {name}_batch + {head} * {name}_head) * {self.problem.vector}"

    def load_own(self, name: str, head: str, size: int) -> None:
        """Load the program's own rows of a tensor."""
        rows = self.sides.row_tile
        if not self.is_boxed(name):
            self.base(name, head, moving=False)
        for i, piece in enumerate(pieces(size)):
            if self.is_boxed(name):
                self._load_box(f"{name}_{i}", f"{name}_box_{i}", head, self.box_row(), rows, piece)
                continue
            mask = conjunction("there[:, None]", validity(piece))
            where = f"{name}_base + {name}_rows + {entry_numbers(piece)}"
            self.lines.add(f"{name}_{i} = tl.load({where}, mask={mask}, other=0.0)")

    def _load_box(self, to: str, box: str, head: str, row: str, rows: int, piece: DepthSlice, start: str = "") -> None:
        """Emit the copy of a box by the hardware, as a tile of `rows` rows named `to`."""
        where = f"[{self._box_lane(head)}, {row}, {start or piece.start}]"
        self.lines.add(f"{to} = {box}.load({where}).reshape({rows}, {piece.width})")

    def _box_lane(self, head: str) -> str:
        """Return a lane as coordinates of a box."""
        grid = self.problem.grid
        if grid is None or not grid.is_folded:
            return f"batch, {head}"
        return f"batch * {'(heads // group)' if head == 'kv_head' else 'heads'} + {head}"

    def box_row(self) -> str:
        """Return the program's own rows as coordinates of a box."""
        if self.problem.grid is None:
            return f"row_tile * {self.sides.row_tile}"
        return ", ".join(f"own_{a} * {side}" for a, side in enumerate(self.row_brick))

    def box_column(self, tile: str) -> str:
        """Return a tile as coordinates of a box."""
        if self.problem.grid is None:
            return f"{tile} * {self.sides.column_tile}"
        return ", ".join(
            f"{brick} * {side}" for brick, side in zip(self.brick_of(tile), self.column_brick, strict=True)
        )

    def _tile_address(self, name: str, tile: str) -> str:
        """Return the address at which a tile of a moving tensor begins."""
        if self.problem.grid is None:
            return f"{name}_base + {tile} * {name}_step"
        return f"{name}_base + {self.tile_token(tile)} * {name}_step"

    def emit_tile_addresses(self, name: str, head: str, size: int) -> None:
        """Emit the addresses for loads of a tensor's tiles."""
        if not self.problem.boxes:
            self.lines.add(self.head_base(name, head))
            self.steps(name, size)

    def steps(self, name: str, size: int) -> None:
        """Emit the parts of a tensor's addresses that are equal for all heads."""
        if self.problem.boxes:
            return
        self.base(name, "", moving=True)
        token = "column" if self.problem.grid is None else "column_token"
        self.lines.add(f"{name}_rows = {token}[:, None] * ({name}_token * {self.problem.vector})")
        for i, piece in enumerate(pieces(size)):
            self.lines.add(f"{name}_inner_{i} = {name}_rows + {entry_numbers(piece)}")

    def load(self, name: str, head: str, size: int, tile: str, partial: bool) -> None:
        """Load a tile of the moving side."""
        columns = self.sides.column_tile
        for i, piece in enumerate(pieces(size)):
            if self.problem.boxes:
                self._load_box(f"{name}_{i}", f"{name}_box_{i}", head, self.box_column(tile), columns, piece)
                continue
            inside = f"({self.inside()})[:, None]" if partial else None
            mask = conjunction(inside, validity(piece))
            masked = "" if mask is None else f", mask={mask}, other=0.0"
            self.lines.add(f"{name}_{i} = tl.load({self._tile_address(name, tile)} + {name}_inner_{i}{masked})")

    def load_sum(self, name: str, head: str, size: int, tile: str, partial: bool, loaded: bool) -> list[str]:
        """Return the slices of a moving tensor that the program accumulates: all, or that of the program's part."""
        sums = accumulated(size)
        if sums.parts == 1:
            if not loaded:
                self.load(name, head, size, tile, partial)
            return [f"{name}_{i}" for i, _ in enumerate(sums.pieces)]
        columns, to = self.sides.column_tile, f"{name}_part"
        if self.problem.boxes:
            start = f"part * {sums.step}"
            self._load_box(to, f"{name}_box_part", head, self.box_column(tile), columns, sums.pieces[0], start)
            return [to]
        inside = f"({self.inside()})[:, None]" if partial else None
        entries = f"(part * {sums.step} + tl.arange(0, {sums.step}))[None, :]"
        where = f"{self._tile_address(name, tile)} + {name}_rows + {entries}"
        self.lines.add(f"{to} = tl.load({where}, mask={conjunction(inside, f'{entries} < {size}')}, other=0.0)")
        return [to]

    def store(self, name: str, head: str, values: list[tuple[str, DepthSlice]], size: int) -> None:
        """Store the program's own rows of a tensor."""
        rows, step, add = self.sides.row_tile, accumulated(size).step, self.lines.add
        if self.problem.boxes:
            for i, (value, piece) in enumerate(values):
                where = f"[{self._box_lane(head)}, {self.box_row()}, {f'part * {step}' if step else piece.start}]"
                grid = self.problem.grid
                sides = (
                    f"1, 1, {rows}" if grid is None else ", ".join(map(str, (*_ONES[grid.is_folded], *self.row_brick)))
                )
                shaped = f"{value}.to(tl.{self.problem.dtype}).reshape({sides}, {piece.width})"
                add(f"{name}_box_{i}.store({where}, {shaped})")
            return
        self.base(name, head, moving=False)
        for value, piece in values:
            entries, valid = entry_numbers(piece), validity(piece)
            if step:
                entries = f"(part * {step} + tl.arange(0, {step}))[None, :]"
                valid = f"{entries} < {size}"
            mask = conjunction("there[:, None]", valid)
            where = f"{name}_base + {name}_rows + {entries}"
            add(f"tl.store({where}, {value}.to(tl.{self.problem.dtype}), mask={mask})")

    # --- sums and products

    def product(self, left: str, right: str, size: int, to: str) -> None:
        """Emit `to` = left · rightᵀ, summed over the width of a head."""
        for i, _ in enumerate(pieces(size)):
            accumulator = f", {to}" if i else ""
            self.lines.add(f"{to} = tl.dot({left}_{i}, tl.trans({right}_{i}){accumulator}{self.problem.precision})")

    def add_weighted(self, to: str, left: str, right: str, partial: bool) -> None:
        """Add left · right to `to`; in partial tiles, a careful kernel adds visible pairs only."""
        if partial and self.problem.careful:
            self.lines.add(f"{to} = add_visible({left}, {right}, {to}, visible)")
            return
        self.lines.add(f"{to} = tl.dot({left}.to({right}.dtype), {right}, {to}{self.problem.precision})")

    def sums(self, name: str, size: int) -> list[tuple[str, DepthSlice]]:
        """Return the names and slices of the accumulators for a width."""
        return [(f"{name}_{i}", piece) for i, piece in enumerate(accumulated(size).pieces)]

    def zero(self, name: str, size: int) -> None:
        """Set accumulators to zero."""
        for accumulator, piece in self.sums(name, size):
            self.lines.add(f"{accumulator} = tl.zeros(({self.sides.row_tile}, {piece.width}), tl.float32)")


_ONES = {False: (1, 1), True: (1,)}


def entry_numbers(piece: DepthSlice) -> str:
    """Return the numbers of a slice's entries in the head, along columns, as text."""
    start = f"{piece.start} + " if piece.start else ""
    return f"({start}tl.arange(0, {piece.width}))[None, :]" if start else f"tl.arange(0, {piece.width})[None, :]"


def validity(piece: DepthSlice) -> str | None:
    """Return the mask of a slice's existing entries; None if all exist."""
    return f"(tl.arange(0, {piece.width}) < {piece.valid})[None, :]" if piece.is_padded else None


def conjunction(*tests: str | None) -> str | None:
    """Return the conjunction of the tests that are not None; None if there are none."""
    conditions = [test for test in tests if test is not None]
    if len(conditions) < 2:
        return conditions[0] if conditions else None
    return " & ".join(f"({test})" if "<" in test else test for test in conditions)
