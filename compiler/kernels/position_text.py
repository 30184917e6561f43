"""The positions of a program: its batch entry and head, its own rows, and the tokens of the tiles that it walks."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from attnc.compiler.ir import Index, Lookup, fold
from attnc.compiler.kernels.attention_problem import PAIRS, AttentionProblem
from attnc.compiler.kernels.brick_ranges import BrickGrid
from attnc.compiler.kernels.content_masks import UNIT, MaskTiles, is_along_keys
from attnc.compiler.kernels.depth import Accumulated
from attnc.compiler.kernels.index_text import COLUMNS, ROWS, Axes, ExprText, IndexText, aligned
from attnc.compiler.kernels.inputs import TOKENS, address, input_name, size_name
from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import ValueText
from attnc.compiler.kernels.walks import ListedWalk, Sides, Walk


@dataclass
class KernelFrame:
    """A kernel while its text is written: its problem, its tiles, its lines so far and its sides."""

    problem: AttentionProblem
    tiles: TileShape
    lines: Lines = field(default_factory=Lines)
    texts: IndexText = field(init=False)
    values: ValueText = field(init=False)
    is_partial: bool = field(init=False, default=False)

    stage: ClassVar[str]
    read: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """Tensors of the call that the kernel reads, (batch, heads, tokens, width)."""
    written: ClassVar[tuple[str, ...]]
    """Tensors of the call that the kernel writes, (batch, heads, tokens, width)."""
    kept: ClassVar[tuple[str, ...]]
    """Tensors whose rows stay in registers; all others are streamed tile by tile."""
    numbers_columns: ClassVar[bool] = False
    """Whether every tile needs the numbers of its columns, even if it has no mask."""

    stationary: ClassVar[str] = "query"
    """The side of the tokens whose rows a program owns."""
    query_lane: ClassVar[str] = "lane"
    """The text of a lane of query heads that the program computes."""

    @property
    def accumulated(self) -> Accumulated:
        """The entries of the widest tensor that the program accumulates."""
        raise NotImplementedError

    @property
    def walk(self) -> Walk:
        """The walk by which the program finds its tiles."""
        return self.problem.by_query

    @property
    def sides(self) -> Sides:
        """The names of the program's sides."""
        return Sides("row", "queries", self.tiles.q_tile, "key", "keys", self.tiles.k_tile)

    @property
    def row_brick(self) -> tuple[int, ...]:
        """The sides of the program's own brick."""
        assert self.problem.grid is not None
        return self.problem.grid.q_brick if self.stationary == "query" else self.problem.grid.k_brick

    @property
    def column_brick(self) -> tuple[int, ...]:
        """The sides of the bricks that the program walks."""
        assert self.problem.grid is not None
        return self.problem.grid.k_brick if self.stationary == "query" else self.problem.grid.q_brick

    def is_boxed(self, name: str) -> bool:
        """Whether the hardware copies a tensor. It does not load a program's own brick, which must go to registers."""
        p = self.problem
        return p.boxes and (p.grid is None or name not in self.kept or name in self.written)

    def inside(self) -> str:
        """Return the condition that a column of a partial tile exists, as text."""
        return f"{self.sides.column} < {self.sides.columns}"


def moved_by(text: ExprText, by: str) -> ExprText:
    """Return a position plus an offset that differs from row to row."""
    axes, (position, offset) = aligned(text, ExprText(by, ROWS, 5))
    return ExprText(f"{position.at(5)} + {offset.text}", axes, 5)


@dataclass
class PositionText(KernelFrame):
    """The part of a kernel text that computes positions."""

    def emit_program(self) -> None:
        """Emit the program's tile and its batch entry and head."""
        add, sides = self.lines.add, self.sides
        add("# This program: a tile of rows of one lane, which is a batch entry and a head.")
        add("lane = tl.program_id(0) % lanes")
        if self.accumulated.parts > 1:
            add("part = tl.program_id(1)")
        self.emit_heads()
        if isinstance(self.walk, ListedWalk):
            add("tiles = tl.num_programs(0) // lanes", f"entry = tl.load(list_of_lane + {self.query_lane})")
            add("row_tile = tl.load(tile_order + entry * tiles + tl.program_id(0) // lanes)")
            add("entry = entry * (tiles + 1) + row_tile")
        else:
            add("row_tile = tl.num_programs(0) // lanes - 1 - tl.program_id(0) // lanes")
        add(f"column = tl.arange(0, {sides.column_tile})")
        if self.problem.grid is not None:
            self.emit_axes(self.problem.grid)
            self.emit_brick_columns(self.problem.grid)
        self.emit_rows()

    def emit_axes(self, grid: BrickGrid) -> None:
        """Emit the extent and the stride of every axis, and the number of row bricks along all axes but the first."""
        for a, (extent, stride) in enumerate(zip(grid.extents, grid.strides, strict=True)):
            self.lines.add(f"extent_{a} = {self.texts.of(extent).text}", f"stride_{a} = {self.texts.of(stride).text}")
        for a, side in enumerate(self.row_brick):
            if a:
                self.lines.add(f"bricks_{a} = (extent_{a} + {side - 1}) // {side}")

    def emit_brick_columns(self, grid: BrickGrid) -> None:
        """Emit the columns of a brick as coordinates, as tokens relative to the brick's first token, and as bits."""
        add = self.lines.add
        bits, offset = [], 0
        for a, side in enumerate(self.column_brick):
            add(f"column_{a} = {_coordinate('column', self.column_brick, a)}")
            bits.append(f"({1 << offset} << column_{a})")
            offset += side
        add(f"column_token = {_token_at(grid, 'column')}", f"column_bits = {' | '.join(bits)}")

    def emit_brick_rows(self, grid: BrickGrid) -> None:
        """Emit the program's brick and the coordinates of its rows in the grid."""
        add = self.lines.add
        brick, last = self.row_brick, len(grid.axes) - 1
        add(f"inner = tl.arange(0, {self.sides.row_tile})")
        rest = "row_tile"
        for a in range(last, 0, -1):
            add(f"own_{a} = {rest} % bricks_{a}")
            rest = f"{rest} // bricks_{a}"
        add(f"own_0 = {rest}")
        for a, side in enumerate(brick):
            add(f"at_{a} = own_{a} * {side} + {_coordinate('inner', brick, a)}")
        add(f"there = {' & '.join(f'(at_{a} < extent_{a})' for a in range(last + 1))}")
        add(*(f"at_{a} = tl.minimum(at_{a}, extent_{a} - 1)" for a in range(last + 1)))
        add(f"row = {_token_at(grid, 'at')}")

    def batch_text(self, heads: str) -> str:
        """Return the batch entry of a lane; `heads` is the number of heads, as text."""
        return f"lane // {heads}" if self.problem.boxes else f"(lane // {heads}).to(tl.int64)"

    def emit_heads(self) -> None:
        """Emit the batch entry and the heads of a lane."""
        self.lines.add(f"batch = {self.batch_text('heads')}", "head = lane % heads", "kv_head = head // group")

    def emit_rows(self) -> None:
        """Emit the numbers of the program's own rows."""
        sides, add = self.sides, self.lines.add
        if self.problem.grid is not None:
            self.emit_brick_rows(self.problem.grid)
        else:
            add(f"row = row_tile * {sides.row_tile} + tl.arange(0, {sides.row_tile})")
            add(f"there = row < {sides.rows}")
        self.emit_positions()

    def emit_positions(self) -> None:
        """Emit the positions of the rows in the pattern."""
        add = self.lines.add
        if self.problem.documents:
            self.emit_windows("queries")
            add("window_first = window_key", "window_last = window_key_end - 1")
            add("query = safe - window_row + window_shift")
        else:
            add("query = row" if self.problem.grid is not None else "query = tl.minimum(row, queries - 1) + shift")

    def emit_windows(self, rows: str) -> None:
        """Emit the window of every row: where its queries and keys begin and end, and the shift of its queries."""
        add = self.lines.add
        add(f"safe = tl.minimum(row, {rows} - 1)")
        add("window = windows + batch * windows_0 + safe")
        for i, name in enumerate(("row", "row_end", "key", "key_end", "shift")):
            add(f"window_{name} = tl.load(window + {i} * {rows})" if i else f"window_{name} = tl.load(window)")

    def position_offset(self) -> str:
        """Return the offset that is added to a position to get the column's number, as text."""
        return " + window_key" if self.problem.documents else ""

    def index_writer(self) -> IndexText:
        """Return the writer of index expressions over the rows, the columns and the sizes of the call."""
        wide = ".to(tl.int64)" if self.walk.is_wide else ""
        key = (
            ExprText("(key[None, :] - window_key[:, None])", PAIRS)
            if self.problem.documents
            else ExprText("key", COLUMNS)
        )
        names: dict[Index, ExprText] = {
            fold.place("q"): ExprText(f"query{wide}", ROWS),
            fold.place("k"): key,
            **self.size_names(),
        }
        return IndexText(names, self.read_exact, wide_place=fold.place("q") if self.walk.is_wide else None)

    def size_names(self) -> dict[Index, ExprText]:
        """Return the names of a call's heads and sizes."""
        documents = self.problem.documents
        names: dict[Index, ExprText] = {fold.head_index(name): ExprText(name) for name in ("head", "kv_head", "batch")}
        for name in ("heads", "group"):
            names[fold.extent(name)] = ExprText(name)
        for name in self.problem.sizes:
            names[fold.extent(name)] = ExprText(size_name(name))
        names[fold.extent("kv_heads")] = ExprText("heads // group", binds=7)
        names[fold.extent("dk")], names[fold.extent("dv")] = (ExprText(str(n)) for n in self.problem.widths)
        if documents:
            names[fold.extent("queries")] = ExprText("(window_row_end - window_row)", ROWS)
            names[fold.extent("keys")] = ExprText("(window_key_end - window_key)", ROWS)
        else:
            names[fold.extent("queries")], names[fold.extent("keys")] = ExprText("queries"), ExprText("keys")
        return names

    def read_exact(self, node: Lookup, indices: tuple[ExprText, ...]) -> ExprText:
        """Return the text of an element of an input of integers or truth values."""
        if isinstance(self.walk, MaskTiles) and is_along_keys(node):
            return self.read_padded(node)
        where, axes = address(node.tensor, indices, self.call_index)
        return ExprText(f"tl.load({where}{self.load_mask(axes)})", axes)

    def read_padded(self, node: Lookup) -> ExprText:
        """Return the text of elements for all keys of a tile: rows are padded, so loads are wide and need no mask."""
        texts = IndexText({**self.texts.names, **self.padded_names()}, self.read_exact)
        *leading, _ = (
            self.call_index(str(dim), texts.of(index)) if dim in TOKENS else texts.of(index)
            for dim, index in zip(node.tensor.dims, node.indices, strict=True)
        )
        axes, (*leading_parts, key) = aligned(*leading, texts.of(fold.place("k")))
        name = input_name(node.tensor)
        rows = [f"{part.at(7)} * ({name}_{i} // {UNIT} * {UNIT})" for i, part in enumerate(leading_parts)]
        return ExprText(f"tl.load({' + '.join([name, *rows, key.at(6)])})", axes)

    def padded_names(self) -> dict[Index, ExprText]:
        """Return names for padded reads: queries that exist, and keys as the tile numbers them."""
        return {}

    def load_mask(self, axes: Axes) -> str:
        """Return the mask arguments of a load in a partial tile, for hidden pairs and missing columns."""
        if not self.is_partial or axes == ROWS or not axes:
            return ""
        return f", mask={'visible' if axes == PAIRS else self.inside()}, other=0"

    def call_index(self, dim: str, text: ExprText) -> ExprText:
        """Return a position as an index into the tokens, queries or keys of the call."""
        if self.problem.documents:
            return moved_by(text, "window_key" if dim in ("token", "key") else "window_row - window_shift")
        return ExprText(f"{text.at(5)} - shift", text.axes, 5) if dim == "query" else text

    def column_numbers(self, tile: str) -> None:
        """Emit the tokens of a tile's columns."""
        if self.problem.grid is None:
            self.lines.add(f"{self.sides.column} = {tile} * {self.sides.column_tile} + column")
        else:
            self.lines.add(f"{self.sides.column} = {self.tile_token(tile)} + column_token")

    def brick_of(self, tile: str) -> list[str]:
        """Return the number of a brick along every axis; `tile` is the number along the last axis."""
        assert self.problem.grid is not None
        last = len(self.problem.grid.axes) - 1
        return [tile if a == last else f"brick_{a}" for a in range(last + 1)]

    def tile_token(self, tile: str) -> str:
        """Return the first token of a brick, as text."""
        assert self.problem.grid is not None
        *first, last = (f"{brick} * {side}" for brick, side in zip(self.brick_of(tile), self.column_brick, strict=True))
        return f"({' + '.join([*(f'{coordinate} * stride_{a}' for a, coordinate in enumerate(first)), last])})"


def _token_at(grid: BrickGrid, prefix: str) -> str:
    """Return the token at the coordinates named `prefix`_0, `prefix`_1 and so on, as text; offsets give an offset."""
    last = len(grid.axes) - 1
    return " + ".join(f"{prefix}_{a} * stride_{a}" if a < last else f"{prefix}_{a}" for a in range(last + 1))


def _coordinate(number: str, sides: tuple[int, ...], axis: int) -> str:
    """Return the coordinate along an axis of a number that counts with the last axis fastest, as text."""
    inner_size = prod(sides[axis + 1 :])
    text = f"{number} // {inner_size}" if inner_size > 1 else number
    return text if axis == 0 else f"{text} % {sides[axis]}"
