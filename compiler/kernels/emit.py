"""Triton text of the kernels of one attention: forward, and backward by rows (dq) and by columns (dk and dv)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from attnc.compiler import fold
from attnc.compiler.derivatives import Derivative
from attnc.compiler.ir import Element, Index, Lookup, Tensor, Truth, Value
from attnc.compiler.kernels.bricks import Grid
from attnc.compiler.kernels.depth import Accumulated, Piece, accumulated, pieces
from attnc.compiler.kernels.index_text import COLUMNS, HELPERS, ROWS, IndexText, Text
from attnc.compiler.kernels.inputs import address
from attnc.compiler.kernels.lines import Lines
from attnc.compiler.kernels.scores import Score, Term
from attnc.compiler.kernels.source import TYPES, VECTOR, Argument, KernelSource, declaration, described
from attnc.compiler.kernels.value_text import LN_2, LOG2_E, VALUE_HELPERS, ValueText
from attnc.compiler.kernels.walks import Listed, Sides, Walk
from attnc.compiler.simulation.gpu_clocks import BYTES, TileShape
from attnc.compiler.values import dot, scale, vector

PAIRS = ROWS | COLUMNS
_PRODUCT = dot(vector("q"), vector("k"))


@dataclass(frozen=True)
class Problem:
    """What kernels are made for: how tiles are found, by rows of queries and by rows of keys, and what a head is.

    `told`: lines about the pattern for the head of the text. `tensors` and `sizes`: inputs and named sizes that the
    walks or scores read. `documents`: each row has a window. `grid`: tiles are bricks of it. `tf32`: whether fp32 is multiplied as TF32. `delayed`:
    values are multiplied one tile late. `score`: None for the plain one; `widths`: dk and dv as
    it reads them. `boxes`: tiles of q, k and v are copied by the hardware (TMA).
    """

    name: str
    told: tuple[str, ...]
    by_query: Walk
    by_key: Walk
    dk: int
    dv: int
    dtype: str
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[str, ...] = ()
    documents: bool = False
    grid: Grid | None = None
    score: Score | None = None
    widths: tuple[int, int] = (0, 0)
    tf32: bool = False
    delayed: bool = False
    boxes: bool = False

    @property
    def vector(self) -> int:
        """Entries in a unit of strides."""
        return VECTOR // BYTES[self.dtype]

    @property
    def precision(self) -> str:
        """What products of fp32 are asked for, as arguments of tl.dot."""
        if self.dtype != "float32":
            return ""
        return f', input_precision="{"tf32" if self.tf32 else "ieee"}"'


def emit_forward(problem: Problem, tiles: TileShape) -> KernelSource:
    """The forward: out and LSE."""
    return Forward(problem, tiles).source()


def emit_dq(problem: Problem, tiles: TileShape) -> KernelSource:
    """The gradient of q, by rows of queries."""
    return QueryGradient(problem, tiles).source()


def emit_dkdv(problem: Problem, tiles: TileShape) -> KernelSource:
    """The gradients of k and v, by rows of keys, over all query heads of a kv head."""
    return KeyGradients(problem, tiles).source()


@dataclass
class Kernel:
    """What the kernels have in common. Sub-classes say what a program loads, does with a tile, and stores."""

    problem: Problem
    tiles: TileShape
    lines: Lines = field(default_factory=Lines)
    texts: IndexText = field(init=False)
    values: ValueText = field(init=False)

    # --- what sub-classes say

    stage: ClassVar[str]
    read: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """Tensors of the call that are read, (batch, head, token, width), and below those that are written."""
    written: ClassVar[tuple[str, ...]]
    rows_of: ClassVar[tuple[str, ...]]
    """Numbers of every query of a head, in fp32, one after another."""
    kept: ClassVar[tuple[str, ...]]
    """Of these a program has its own rows; of the others it has tiles, one after another."""
    numbers_columns: ClassVar[bool] = False
    """Whether the numbers of a tile's columns are asked for in every tile."""

    @property
    def accumulated(self) -> Accumulated:
        """The widest that is added up."""
        raise NotImplementedError

    def start(self) -> None:
        """Load what a program keeps."""
        raise NotImplementedError

    def tile(self, tile: str, partial: bool) -> None:
        """Do a tile."""
        raise NotImplementedError

    def finish(self) -> None:
        """Store."""
        raise NotImplementedError

    # --- the whole

    @property
    def walk(self) -> Walk:
        return self.problem.by_query

    @property
    def sides(self) -> Sides:
        return Sides("row", "queries", self.tiles.q_tile, "key", "keys", self.tiles.k_tile)

    @property
    def title(self) -> str:
        """What the kernel makes, as part of its name."""
        return self.stage

    def source(self) -> KernelSource:
        """The kernel."""
        function = f"{self.problem.name}_{self.title}"
        arguments = self._arguments()
        self.texts = texts = self._texts()
        self.values = ValueText(self._atoms(), texts, self.element_text)
        lines = self.lines
        lines.depth = 1
        self.write(texts)
        head = Lines()
        self._head(head)
        helpers = [HELPERS[name] for name in texts.helpers] + [VALUE_HELPERS[name] for name in self.values.helpers]
        for helper in helpers:
            head.add(*helper.rstrip().split("\n"), "", "")
        head.add(*declaration(function, arguments))
        text = str(head) + str(lines)
        bricks = None if self.problem.grid is None else prod(self.problem.grid.bricks(self.row_brick))
        return KernelSource(self.title, function, text, arguments, self.tiles, self.accumulated.parts, bricks)

    @property
    def row_brick(self) -> tuple[int, ...]:
        """The sides of the program's own brick, and below those of the bricks that it walks."""
        assert self.problem.grid is not None
        return self.problem.grid.q_brick if self.stationary == "query" else self.problem.grid.k_brick

    @property
    def column_brick(self) -> tuple[int, ...]:
        """The sides of the bricks that the program walks."""
        assert self.problem.grid is not None
        return self.problem.grid.k_brick if self.stationary == "query" else self.problem.grid.q_brick

    def write(self, texts: IndexText) -> None:
        """All lines."""
        self._places()
        self.start()
        if self.stationary == "query":
            self.load_terms("query", "there", "row", "own")
        self._loops(texts)
        self.lines.add("")
        self.finish()

    def _head(self, head: Lines) -> None:
        head.add(*(f"# {line}".rstrip() for line in (*self.problem.told, *self._about())))
        head.add("", "import triton", "import triton.language as tl", "", "")
        walk = self.walk
        if any("FAR" in line for line in self.lines.lines):
            far = "1 << 40" if walk.is_wide else "1 << 30"
            head.add(f"FAR: tl.constexpr = tl.constexpr({far})  # past every token", "", "")

    def _about(self) -> Sequence[str]:
        p, t = self.problem, self.tiles
        return [
            f"{_TITLES[self.stage]}. Heads of {p.dk} and {p.dv} in {p.dtype}, tiles of {t.q_tile} queries and "
            f"{t.k_tile} keys, {t.warps} warps, {t.stages} stages."
        ]

    def _arguments(self) -> tuple[Argument, ...]:
        p = self.problem
        names = [name for name in (*self.read, *self.written) if not self._is_boxed(name)]
        found = [Argument(name, f"*{TYPES[p.dtype]}") for name in names]
        found += [box for name in (*self.read, *self.written) if self._is_boxed(name) for box in self._boxes(name)]
        found += [Argument(name, "*fp32") for name in self.rows_of]
        if self.problem.documents:
            found.append(Argument("windows", "*i32"))
        found += [Argument(tensor.name, f"*{_KINDS[tensor.kind]}") for tensor in self.problem.tensors]
        terms = self.given()
        found += [Argument(term.tensor.name, "*fp32") for term in terms]
        found += [Argument(name, "*fp32") for name in self.gradients()]
        found += self.more_pointers()
        found += self.walk.arguments(self.sides)
        for name in names:
            found += [Argument(f"{name}_{dim}", kind) for dim, kind in _STRIDES]
        if self.problem.documents:
            found.append(Argument("windows_0", "i64"))
        for tensor in self.problem.tensors:
            found += [Argument(f"{tensor.name}_{i}", "i64") for i in range(len(tensor.dims))]
        for term in terms:
            found += [Argument(f"{term.tensor.name}_{i}", "i64") for i in range(3)]
        counts = _COUNTS + (("distances",) if any(term.side == "distance" for term in terms) else ())
        found += [Argument(name, "i32") for name in counts + p.sizes]
        return (*found, Argument("scale", "fp32"))

    def more_pointers(self) -> list[Argument]:
        """Other tensors that are read or written."""
        return []

    def _is_boxed(self, name: str) -> bool:
        """Whether the hardware copies a tensor. A program's own brick would go to registers, not to shared memory."""
        p = self.problem
        return p.boxes and (p.grid is None or name not in self.kept or name in self.written)

    def _boxes(self, name: str) -> Iterator[Argument]:
        """The descriptors of a tensor: for its pieces, and for the part that a program adds up."""
        p, grid = self.problem, self.problem.grid
        is_own = name in self.kept
        sides: tuple[int, ...] = (self.sides.row_tile if is_own else self.sides.column_tile,)
        axes: tuple[tuple[int, int], ...] = ()
        if grid is not None:
            sides = self.row_brick if is_own else self.column_brick
            axes = tuple((axis.extent, axis.stride) for axis in grid.axes)
        folded = grid is not None and grid.is_folded
        size = p.dv if name in ("v", "dout", "out", "dv") else p.dk
        if name in self.read:
            for i, piece in enumerate(pieces(size)):
                yield described(f"{name}_box_{i}", name, p.dtype, sides, piece.width, axes, folded)
        found = accumulated(size)
        if name in self.written:
            for i, piece in enumerate(found.pieces):
                yield described(f"{name}_box_{i}", name, p.dtype, sides, piece.width, axes, folded)
        elif found.parts > 1 and name not in self.kept:
            yield described(f"{name}_box_part", name, p.dtype, sides, found.step, axes, folded)

    # --- where a program is

    def _places(self) -> None:
        add, sides = self.lines.add, self.sides
        add("# This program: a tile of rows of one lane, which is a batch entry and a head.")
        add("lane = tl.program_id(0) % lanes")
        if self.accumulated.parts > 1:
            add("part = tl.program_id(1)")
        self.heads()
        if isinstance(self.walk, Listed):
            add("tiles = tl.num_programs(0) // lanes", f"entry = tl.load(list_of_lane + {self.query_lane})")
            add("row_tile = tl.load(tile_order + entry * tiles + tl.program_id(0) // lanes)")
            add("entry = entry * (tiles + 1) + row_tile")
        else:
            add("row_tile = tl.num_programs(0) // lanes - 1 - tl.program_id(0) // lanes")
        add(f"column = tl.arange(0, {sides.column_tile})")
        if self.problem.grid is not None:
            self._columns_of_bricks(self.problem.grid)
        self.own_places()

    def _columns_of_bricks(self, grid: Grid) -> None:
        """Where the columns of a brick are in it, as places, as tokens from its first, and as bits."""
        add = self.lines.add
        tokens, bits, offset = [], [], 0
        for a, (axis, side) in enumerate(zip(grid.axes, self.column_brick, strict=True)):
            add(f"column_{a} = {_inside('column', self.column_brick, a)}")
            tokens.append(f"column_{a} * {axis.stride}" if axis.stride > 1 else f"column_{a}")
            bits.append(f"({1 << offset} << column_{a})")
            offset += side
        add(f"column_token = {' + '.join(tokens)}", f"column_bits = {' | '.join(bits)}")

    def _rows_of_bricks(self, grid: Grid) -> None:
        """The program's brick, and where its rows are in the grid."""
        add = self.lines.add
        counts, brick, tests, tokens = grid.bricks(self.row_brick), self.row_brick, [], []
        add(f"inner = tl.arange(0, {self.sides.row_tile})")
        for a, (axis, side) in enumerate(zip(grid.axes, brick, strict=True)):
            add(
                f"own_{a} = {_inside('row_tile', counts, a)}",
                f"at_{a} = own_{a} * {side} + {_inside('inner', brick, a)}",
            )
            tests.append(f"(at_{a} < {axis.extent})")
        add(f"there = {' & '.join(tests)}")
        for a, axis in enumerate(grid.axes):
            add(f"at_{a} = tl.minimum(at_{a}, {axis.extent - 1})")
            tokens.append(f"at_{a} * {axis.stride}" if axis.stride > 1 else f"at_{a}")
        add(f"row = {' + '.join(tokens)}")

    def inside(self) -> str:
        """Whether the columns of a partial tile are there."""
        return "column_there" if self.problem.grid is not None else f"{self.sides.column} < {self.sides.columns}"

    def _batch(self, heads: str) -> str:
        return f"lane // {heads}" if self.problem.boxes else f"(lane // {heads}).to(tl.int64)"

    query_lane: ClassVar[str] = "lane"
    """A lane of query heads that is of the program."""

    def heads(self) -> None:
        self.lines.add(f"batch = {self._batch('heads')}", "head = lane % heads", "kv_head = head // group")

    def own_places(self) -> None:
        """The program's own rows."""
        sides, add = self.sides, self.lines.add
        if self.problem.grid is not None:
            self._rows_of_bricks(self.problem.grid)
        else:
            add(f"row = row_tile * {sides.row_tile} + tl.arange(0, {sides.row_tile})")
            add(f"there = row < {sides.rows}")
        self.positions()

    def positions(self) -> None:
        """Where the rows stand in the pattern."""
        add = self.lines.add
        if self.problem.documents:
            self._windows("queries")
            add("window_first = window_key", "window_last = window_key_end - 1")
            add("query = safe - window_row + window_shift")
        else:
            add("query = row" if self.problem.grid is not None else "query = tl.minimum(row, queries - 1) + shift")

    def _windows(self, rows: str) -> None:
        """Windows of every row: where their queries and keys begin and end, and how queries are shifted."""
        add = self.lines.add
        add(f"safe = tl.minimum(row, {rows} - 1)")
        add("window = windows + batch * windows_0 + safe")
        for i, name in enumerate(("row", "row_end", "key", "key_end", "shift")):
            add(f"window_{name} = tl.load(window + {i} * {rows})" if i else f"window_{name} = tl.load(window)")

    def moved(self) -> str:
        """What a column's number is more than its place."""
        return " + window_key" if self.problem.documents else ""

    def _texts(self) -> IndexText:
        wide = ".to(tl.int64)" if self.walk.is_wide else ""
        key = Text("(key[None, :] - window_key[:, None])", PAIRS) if self.problem.documents else Text("key", COLUMNS)
        names: dict[Index, Text] = {fold.place("q"): Text(f"query{wide}", ROWS), fold.place("k"): key, **self._sizes()}
        return IndexText(names, self._read)

    def _sizes(self) -> dict[Index, Text]:
        documents = self.problem.documents
        names: dict[Index, Text] = {fold.head_index(name): Text(name) for name in ("head", "kv_head", "batch")}
        for name in ("heads", "group", *self.problem.sizes):
            names[fold.extent(name)] = Text(name)
        names[fold.extent("kv_heads")] = Text("heads // group", binds=7)
        names[fold.extent("dk")], names[fold.extent("dv")] = (Text(str(n)) for n in self.problem.widths)
        if documents:
            names[fold.extent("queries")] = Text("(window_row_end - window_row)", ROWS)
            names[fold.extent("keys")] = Text("(window_key_end - window_key)", ROWS)
        else:
            names[fold.extent("queries")], names[fold.extent("keys")] = Text("queries"), Text("keys")
        return names

    def _read(self, node: Lookup, indices: tuple[Text, ...]) -> Text:
        """An element of an input of integers or truth values."""
        where, axes = address(node.tensor, indices, self._of_place)
        return Text(f"tl.load({where})", axes)

    def _of_place(self, dim: str, text: Text) -> Text:
        """A position as an index into the tokens, queries or keys of the call."""
        if self.problem.documents:
            by = "window_key" if dim in ("token", "key") else "window_row - window_shift"
            return Text(f"{text.at(5)} + {by}", ROWS, 5)
        return Text(f"{text.at(5)} - shift", text.axes, 5) if dim == "query" else text

    # --- loops

    def _loops(self, texts: IndexText) -> None:
        self.begin(texts)
        self.walk.loops(self.lines, self.sides, self._body, self._full_loop)

    def begin(self, texts: IndexText) -> None:
        """What the loops need first."""
        self.lines.add("")
        self.walk.start(self.lines, self.sides, texts, self.moved())
        self.lines.add("")

    def _body(self, tile: str, partial: bool) -> None:
        if partial or self.numbers_columns or self.problem.score is not None:
            self.column_numbers(tile)
        if partial:
            self.walk.visible(self.lines, self.sides)
            if self.problem.grid is not None:
                self._columns_there(self.problem.grid, tile)
        self.tile(tile, partial)

    def column_numbers(self, tile: str) -> None:
        """The tokens of a tile's columns."""
        if self.problem.grid is None:
            self.lines.add(f"{self.sides.column} = {tile} * {self.sides.column_tile} + column")
        else:
            self.lines.add(f"{self.sides.column} = {self._tile_token(tile)} + column_token")

    def _brick(self, tile: str) -> list[str]:
        """The number of a brick along every axis; `tile` is that along the last."""
        assert self.problem.grid is not None
        last = len(self.problem.grid.axes) - 1
        return [tile if a == last else f"brick_{a}" for a in range(last + 1)]

    def _tile_token(self, tile: str) -> str:
        """The first token of a brick."""
        assert self.problem.grid is not None
        found = zip(self._brick(tile), self.column_brick, self.problem.grid.axes, strict=True)
        return "(" + " + ".join(f"{brick} * {side * axis.stride}" for brick, side, axis in found) + ")"

    def _columns_there(self, grid: Grid, tile: str) -> None:
        """Which columns of a brick are in the grid."""
        tests = [
            f"({brick} * {side} + column_{a} < {axis.extent})"
            for a, (brick, side, axis) in enumerate(zip(self._brick(tile), self.column_brick, grid.axes, strict=True))
            if axis.extent % side
        ]
        self.lines.add(f"column_there = {' & '.join(tests) if tests else 'column >= 0'}")

    def _full_loop(self, begin: str, end: str) -> None:
        with self.lines.block(f"for tile in range({begin}, {end}):"):
            self._body("tile", False)

    # --- scores

    stationary: ClassVar[str] = "query"
    """The side whose rows a program has."""

    def given(self) -> list[Term]:
        """The terms that the kernel reads."""
        score = self.problem.score
        return [] if score is None else list(score.terms)

    def gradients(self) -> list[str]:
        """The gradients of terms that the kernel writes, (batch, head, token)."""
        return [f"d{term.tensor.name}" for term in self.given() if term.varies and term.side == self.stationary]

    def _atoms(self) -> dict[Value, Text]:
        """What the formula of a score is made of, by name."""
        if self.problem.score is None:
            return {}
        names: dict[Value, Text] = {_PRODUCT: Text("product", PAIRS), scale(): Text("scale")}
        for term in self.problem.score.terms:
            axes = PAIRS if term.side == "distance" else ROWS if term.side == self.stationary else COLUMNS
            names[term.element] = Text(term.tensor.name + ("_own" if axes == ROWS else "_of"), axes)
        return names

    def element_text(self, node: Element, indices: tuple[Text, ...]) -> Text:
        """An element of a real input, read pair by pair."""
        where, axes = address(node.tensor, indices, self._of_place)
        mask = ", mask=visible, other=0.0" if self._is_partial and axes == PAIRS else ""
        return Text(f"tl.load({where}{mask}).to(tl.float32)", axes)

    _is_partial: bool = field(init=False, default=False)

    def load_terms(self, side: str, inside: str, place: str, suffix: str) -> None:
        """Load the terms of a side."""
        for term in self.given():
            if term.side == side:
                name = term.tensor.name
                where = f"{name} + batch * {name}_0 + head * {name}_1 + {place} * {name}_2"
                mask = f", mask={inside}, other=0.0" if inside else ""
                self.lines.add(f"{name}_{suffix} = tl.load({where}{mask})")

    def _moving_terms(self, partial: bool) -> None:
        """Load the terms of a tile's columns, and of its pairs."""
        sides = self.sides
        other = "key" if self.stationary == "query" else "query"
        self.load_terms(other, self.inside() if partial else "", sides.column, "of")
        for term in self.given():
            if term.side == "distance":
                name = term.tensor.name
                gap = self.texts.of(fold.sub(fold.place("q"), fold.place("k")))
                where = f"{name} + batch * {name}_0 + head * {name}_1 + ({gap.text} + distances)"
                mask = ", mask=visible, other=0.0" if partial else ""
                self.lines.add(f"{name}_of = tl.load({where}{mask})")

    def scored(self, partial: bool) -> None:
        """`score` of a tile from `product`, in natural logarithms; of the plain score it is the product."""
        if self.problem.score is None:
            return
        self._is_partial = partial
        self._moving_terms(partial)
        self.values._known.clear()
        self.lines.add(f"score = {self.values.of(self.problem.score.formula).over(PAIRS).text}")

    @property
    def product_name(self) -> str:
        """What the product of a tile is called."""
        return "score" if self.problem.score is None else "product"

    @property
    def factor(self) -> str:
        """What makes a score a power of 2."""
        return "scale" if self.problem.score is None else repr(LOG2_E)

    def slope(self, change: str, partial: bool) -> str:
        """The change of the product from that of the score."""
        score = self.problem.score
        if score is None:
            return change
        found = score.by_product
        if found is None:
            self.lines.add(f"pushed = tl.zeros_like({change})")
        else:
            self.lines.add(f"pushed = {self.pushed(found, change, partial)}")
        return "pushed"

    def pushed(self, found: Derivative, change: str, partial: bool) -> str:
        """What a change of the score is to one of its parts."""
        by = self.values.of(found.by)
        text = change if by.text == "1.0" else f"{change} * {by.over(PAIRS).at(8)}"
        tests = ["visible"] if partial else []
        if not isinstance(found.where, Truth):
            tests.append(self.values.truth(found.where).over(PAIRS).at(6))
        return f"tl.where({' & '.join(tests)}, {text}, 0.0)" if tests else text

    def zero_gradients(self) -> None:
        """Set the sums of the gradients of terms to zero."""
        for name in self.gradients():
            self.lines.add(f"{name}_sum = tl.zeros(({self.sides.row_tile},), tl.float32)")

    def add_gradients(self, change: str, partial: bool) -> None:
        """Add a tile to the gradients of terms."""
        score = self.problem.score
        for term in self.given():
            if not term.varies or term.side != self.stationary:
                continue
            assert score is not None
            found = score.by_term(term)
            if found is not None:
                name = f"d{term.tensor.name}_sum"
                self.lines.add(f"{name} += tl.sum({self.pushed(found, change, partial)}, 1)")

    def store_gradients(self, rows: str) -> None:
        """Write the gradients of terms of a head."""
        for name in self.gradients():
            where = f"(batch * heads + head).to(tl.int64) * {rows} + row"
            self.lines.add(f"tl.store({name} + {where}, {name}_sum, mask=there)")

    # --- loads and stores

    def base(self, name: str, head: str, moving: bool) -> None:
        """Where a tensor's head begins, and of a moving side how far apart its tiles are."""
        unit = self.problem.vector
        self.lines.add(f"{name}_base = {name} + (batch * {name}_batch + {head} * {name}_head) * {unit}")
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

    def own(self, name: str, head: str, size: int) -> None:
        """Load the program's own rows of a tensor."""
        rows = self.sides.row_tile
        if not self._is_boxed(name):
            self.base(name, head, moving=False)
        for i, piece in enumerate(pieces(size)):
            if self._is_boxed(name):
                self._load_box(f"{name}_{i}", f"{name}_box_{i}", head, self._box_row(), rows, piece)
                continue
            mask = _conjunction("there[:, None]", _valid(piece))
            where = f"{name}_base + {name}_rows + {_entries(piece)}"
            self.lines.add(f"{name}_{i} = tl.load({where}, mask={mask}, other=0.0)")

    def _load_box(self, to: str, box: str, head: str, row: str, rows: int, piece: Piece, start: str = "") -> None:
        where = f"[{self._box_lane(head)}, {row}, {start or piece.start}]"
        self.lines.add(f"{to} = {box}.load({where}).reshape({rows}, {piece.width})")

    def _box_lane(self, head: str) -> str:
        """A lane as coordinates of a box."""
        grid = self.problem.grid
        if grid is None or not grid.is_folded:
            return f"batch, {head}"
        return f"batch * {'(heads // group)' if head == 'kv_head' else 'heads'} + {head}"

    def _box_row(self) -> str:
        """The program's own rows as coordinates of a box."""
        if self.problem.grid is None:
            return f"row_tile * {self.sides.row_tile}"
        return ", ".join(f"own_{a} * {side}" for a, side in enumerate(self.row_brick))

    def _box_column(self, tile: str) -> str:
        """A tile as coordinates of a box."""
        if self.problem.grid is None:
            return f"{tile} * {self.sides.column_tile}"
        return ", ".join(f"{brick} * {side}" for brick, side in zip(self._brick(tile), self.column_brick, strict=True))

    def _where(self, name: str, tile: str) -> str:
        """Where a tile of a moving tensor begins."""
        if self.problem.grid is None:
            return f"{name}_base + {tile} * {name}_step"
        return f"{name}_base + {self._tile_token(tile)} * {name}_step"

    def moving(self, name: str, head: str, size: int) -> None:
        """Prepare the loads of a tensor's tiles."""
        if self.problem.boxes:
            return
        self.base(name, head, moving=True)
        token = "column" if self.problem.grid is None else "column_token"
        self.lines.add(f"{name}_rows = {token}[:, None] * ({name}_token * {self.problem.vector})")
        for i, piece in enumerate(pieces(size)):
            self.lines.add(f"{name}_inner_{i} = {name}_rows + {_entries(piece)}")

    def load(self, name: str, head: str, size: int, tile: str, partial: bool) -> None:
        """Load a tile of the moving side."""
        columns = self.sides.column_tile
        for i, piece in enumerate(pieces(size)):
            if self.problem.boxes:
                self._load_box(f"{name}_{i}", f"{name}_box_{i}", head, self._box_column(tile), columns, piece)
                continue
            inside = f"({self.inside()})[:, None]" if partial else None
            mask = _conjunction(inside, _valid(piece))
            masked = "" if mask is None else f", mask={mask}, other=0.0"
            self.lines.add(f"{name}_{i} = tl.load({self._where(name, tile)} + {name}_inner_{i}{masked})")

    def load_sum(self, name: str, head: str, size: int, tile: str, partial: bool, loaded: bool) -> list[str]:
        """The pieces of a moving tensor that are added up: all of them, or that of the program's part."""
        found = accumulated(size)
        if found.parts == 1:
            if not loaded:
                self.load(name, head, size, tile, partial)
            return [f"{name}_{i}" for i, _ in enumerate(found.pieces)]
        columns, to = self.sides.column_tile, f"{name}_part"
        if self.problem.boxes:
            start = f"part * {found.step}"
            self._load_box(to, f"{name}_box_part", head, self._box_column(tile), columns, found.pieces[0], start)
            return [to]
        inside = f"({self.inside()})[:, None]" if partial else None
        entries = f"(part * {found.step} + tl.arange(0, {found.step}))[None, :]"
        where = f"{self._where(name, tile)} + {name}_rows + {entries}"
        self.lines.add(f"{to} = tl.load({where}, mask={_conjunction(inside, f'{entries} < {size}')}, other=0.0)")
        return [to]

    def store(self, name: str, head: str, values: list[tuple[str, Piece]], size: int) -> None:
        """Write the program's own rows of a tensor."""
        rows, step, add = self.sides.row_tile, accumulated(size).step, self.lines.add
        if self.problem.boxes:
            for i, (value, piece) in enumerate(values):
                where = f"[{self._box_lane(head)}, {self._box_row()}, {f'part * {step}' if step else piece.start}]"
                grid = self.problem.grid
                sides = (
                    f"1, 1, {rows}" if grid is None else ", ".join(map(str, (*_ONES[grid.is_folded], *self.row_brick)))
                )
                shaped = f"{value}.to(tl.{self.problem.dtype}).reshape({sides}, {piece.width})"
                add(f"{name}_box_{i}.store({where}, {shaped})")
            return
        self.base(name, head, moving=False)
        for value, piece in values:
            entries, valid = _entries(piece), _valid(piece)
            if step:
                entries = f"(part * {step} + tl.arange(0, {step}))[None, :]"
                valid = f"{entries} < {size}"
            mask = _conjunction("there[:, None]", valid)
            where = f"{name}_base + {name}_rows + {entries}"
            add(f"tl.store({where}, {value}.to(tl.{self.problem.dtype}), mask={mask})")

    # --- sums and products

    def product(self, left: str, right: str, size: int, to: str) -> None:
        """`to` = left · rightᵀ over the width of a head."""
        for i, _ in enumerate(pieces(size)):
            more = f", {to}" if i else ""
            self.lines.add(f"{to} = tl.dot({left}_{i}, tl.trans({right}_{i}){more}{self.problem.precision})")

    def sums(self, name: str, size: int) -> list[tuple[str, Piece]]:
        """The accumulators of a width, by name."""
        return [(f"{name}_{i}", piece) for i, piece in enumerate(accumulated(size).pieces)]

    def zero(self, name: str, size: int) -> None:
        """Set accumulators to zero."""
        for one, piece in self.sums(name, size):
            self.lines.add(f"{one} = tl.zeros(({self.sides.row_tile}, {piece.width}), tl.float32)")


_ONES = {False: (1, 1), True: (1,)}


def _inside(number: str, sides: tuple[int, ...], axis: int) -> str:
    """The place along an axis of what is numbered with the last axis fastest."""
    below = prod(sides[axis + 1 :])
    text = f"{number} // {below}" if below > 1 else number
    return text if axis == 0 else f"{text} % {sides[axis]}"


_TITLES = {
    "forward": "Output and LSE",
    "dq": "Gradient of q",
    "dkdv": "Gradients of k and v",
    "pairs": "Gradient of what is read pair by pair",
}
_KINDS = {"int": "i32", "bool": "i1", "real": "fp32"}
_COUNTS = ("lanes", "heads", "group", "queries", "keys", "shift")
_STRIDES = (("batch", "i64"), ("head", "i64"), ("token", "i32"))


def _entries(piece: Piece) -> str:
    start = f"{piece.start} + " if piece.start else ""
    return f"({start}tl.arange(0, {piece.width}))[None, :]" if start else f"tl.arange(0, {piece.width})[None, :]"


def _valid(piece: Piece) -> str | None:
    return f"(tl.arange(0, {piece.width}) < {piece.valid})[None, :]" if piece.is_padded else None


def _conjunction(*tests: str | None) -> str | None:
    some = [test for test in tests if test is not None]
    if len(some) < 2:
        return some[0] if some else None
    return " & ".join(f"({test})" if "<" in test else test for test in some)


class Forward(Kernel):
    """softmax(scale * q kᵀ) v, tile by tile, with the running maximum and sum of every row."""

    stage: ClassVar[str] = "forward"
    kept = ("q", "out")
    written: ClassVar[tuple[str, ...]] = ("out",)
    rows_of = ("lse",)

    @property
    def accumulated(self) -> Accumulated:
        return accumulated(self.problem.dv)

    def start(self) -> None:
        add, p = self.lines.add, self.problem
        add("")
        self.own("q", "head", p.dk)
        self.moving("k", "kv_head", p.dk)
        self.moving("v", "kv_head", p.dv)
        add(f'most = tl.full(({self.sides.row_tile},), float("-inf"), tl.float32)')
        add(f"total = tl.zeros(({self.sides.row_tile},), tl.float32)")
        self.zero("sum", p.dv)

    def tile(self, tile: str, partial: bool) -> None:
        self.weights(tile, partial)
        self.lines.add("total = total * rescale + tl.sum(weight, 1)")
        values = self.load_sum("v", "kv_head", self.problem.dv, tile, partial, loaded=False)
        for (name, _), value in zip(self.sums("sum", self.problem.dv), values, strict=True):
            self.lines.add(f"{name} = {name} * rescale[:, None]")
            self.lines.add(f"{name} = tl.dot(weight.to({value}.dtype), {value}, {name}{self.problem.precision})")

    def _full_loop(self, begin: str, end: str) -> None:
        if not self.problem.delayed or self.accumulated.parts > 1:
            super()._full_loop(begin, end)
            return
        add = self.lines.add
        add("# The weights of a tile are multiplied with its values while the next tile's are computed.")
        with self.lines.block(f"if {begin} < {end}:"):
            self._column_numbers(begin)
            self.multiplied(begin, False)
            self.softmax(False)
            self._rescaled()
            with self.lines.block(f"for tile in range({begin} + 1, {end}):"):
                self._column_numbers("tile")
                self.multiplied("tile", False)
                self._add_values("tile - 1")
                self.softmax(False)
                self._rescaled()
            self._add_values(f"{end} - 1")

    def _column_numbers(self, tile: str) -> None:
        if self.problem.score is not None:
            self.column_numbers(tile)

    def _rescaled(self) -> None:
        self.lines.add("total = total * rescale + tl.sum(weight, 1)")
        self.lines.add(f"kept = weight.to(tl.{self.problem.dtype})")
        for name, _ in self.sums("sum", self.problem.dv):
            self.lines.add(f"{name} = {name} * rescale[:, None]")

    def _add_values(self, tile: str) -> None:
        values = self.load_sum("v", "kv_head", self.problem.dv, f"({tile})", False, loaded=False)
        for (name, _), value in zip(self.sums("sum", self.problem.dv), values, strict=True):
            self.lines.add(f"{name} = tl.dot(kept, {value}, {name}{self.problem.precision})")

    def weights(self, tile: str, partial: bool) -> None:
        """`weight` of a tile, and what the sums so far have to be rescaled by."""
        self.multiplied(tile, partial)
        self.softmax(partial)

    def multiplied(self, tile: str, partial: bool) -> None:
        """The products of a tile."""
        self.load("k", "kv_head", self.problem.dk, tile, partial)
        self.product("q", "k", self.problem.dk, self.product_name)

    def softmax(self, partial: bool) -> None:
        """The weights of a tile from its products, against the largest score so far."""
        add, p = self.lines.add, self.problem
        self.scored(partial)
        if partial:
            add('score = tl.where(visible, score, float("-inf"))')
        add("before = most", f"most = tl.maximum(most, tl.max(score, 1) * {self.factor})")
        base = "most"
        if partial or p.score is not None:
            add('base = tl.where(most == float("-inf"), 0.0, most)')
            base = "base"
        add(f"weight = tl.exp2(score * {self.factor} - {base}[:, None])", f"rescale = tl.exp2(before - {base})")

    def finish(self) -> None:
        add, p = self.lines.add, self.problem
        if p.score is not None and p.score.extra is not None:
            self._count_extra()
        add("# A row that sees nothing gives 0, and an LSE of -inf.")
        add("whole = tl.where(total > 0.0, total, 1.0)")
        for name, _ in self.sums("sum", p.dv):
            add(f"{name} = {name} / whole[:, None]")
        self.store("out", "head", self.sums("sum", p.dv), p.dv)
        add(f'found = tl.where(total > 0.0, (most + tl.log2(whole)) * {LN_2}, float("-inf"))')
        store = "tl.store(lse + lane.to(tl.int64) * queries + row, found, mask=there)"
        if self.accumulated.parts > 1:
            with self.lines.block("if part == 0:"):
                add(store)
        else:
            add(store)

    def given(self) -> list[Term]:
        extra = None if self.problem.score is None else self.problem.score.extra
        return [*super().given(), *([] if extra is None else [extra])]

    def gradients(self) -> list[str]:
        return []

    def _count_extra(self) -> None:
        """The extra logit of a row that sees something takes its share."""
        self.lines.add(
            "# The extra logit takes its share of what a row sees.",
            f"logit = of_extra_own * {LOG2_E!r}",
            "before = most",
            "most = tl.where(total > 0.0, tl.maximum(most, logit), most)",
            'base = tl.where(most == float("-inf"), 0.0, most)',
            "rescale = tl.exp2(before - base)",
            "total = tl.where(total > 0.0, total * rescale + tl.exp2(logit - base), total)",
        )
        for name, _ in self.sums("sum", self.problem.dv):
            self.lines.add(f"{name} = {name} * rescale[:, None]")


class QueryGradient(Kernel):
    """dq = scale * dS k with dS = P ∘ (dO vᵀ - delta), P = exp(S - LSE)."""

    stage: ClassVar[str] = "dq"
    kept = ("q", "dout", "dq")
    read = ("q", "k", "v", "dout")
    written: ClassVar[tuple[str, ...]] = ("dq",)
    rows_of = ("lse", "delta")

    @property
    def accumulated(self) -> Accumulated:
        return accumulated(self.problem.dk)

    def start(self) -> None:
        self.lines.add("")
        self.own_rows()
        self.moving("k", "kv_head", self.problem.dk)
        self.moving("v", "kv_head", self.problem.dv)
        self.zero("sum", self.problem.dk)
        self.zero_gradients()

    def own_rows(self) -> None:
        """Load what the program has of its rows."""
        add, p = self.lines.add, self.problem
        self.own("q", "head", p.dk)
        self.own("dout", "head", p.dv)
        add("of_row = lane.to(tl.int64) * queries + row")
        add('own_lse = tl.load(lse + of_row, mask=there, other=float("inf"))')
        add("own_delta = tl.load(delta + of_row, mask=there, other=0.0)")

    def tile(self, tile: str, partial: bool) -> None:
        add, p = self.lines.add, self.problem
        self.change(tile, partial)
        self.add_gradients("change", partial)
        change = self.slope("change", partial)
        keys = self.load_sum("k", "kv_head", p.dk, tile, partial, loaded=True)
        for (name, _), key in zip(self.sums("sum", p.dk), keys, strict=True):
            add(f"{name} = tl.dot({change}.to({key}.dtype), {key}, {name}{p.precision})")

    def change(self, tile: str, partial: bool) -> None:
        """`change`: how the result changes with the scores of a tile."""
        add, p = self.lines.add, self.problem
        self.load("k", "kv_head", p.dk, tile, partial)
        self.product("q", "k", p.dk, self.product_name)
        self.scored(partial)
        add(f"weight = tl.exp2(score * {self.factor} - own_lse[:, None])")
        if partial:
            add("weight = tl.where(visible, weight, 0.0)")
        self.load("v", "kv_head", p.dv, tile, partial)
        self.product("dout", "v", p.dv, "change")
        add("change = weight * (change - own_delta[:, None])")

    def finish(self) -> None:
        for name, _ in self.sums("sum", self.problem.dk):
            if self.problem.score is None:
                self.lines.add(f"{name} = {name} * (scale * {LN_2})")
        self.store_gradients("queries")
        self.store("dq", "head", self.sums("sum", self.problem.dk), self.problem.dk)


class KeyGradients(Kernel):
    """dv = Pᵀ dO and dk = scale * dSᵀ q, with Sᵀ = k qᵀ so that what is computed is what is multiplied."""

    stage: ClassVar[str] = "dkdv"
    kept = ("k", "v", "dk", "dv")
    read = ("q", "k", "v", "dout")
    written: ClassVar[tuple[str, ...]] = ("dk", "dv")
    rows_of = ("lse", "delta")
    numbers_columns = True
    stationary = "key"
    query_lane = "batch * heads + kv_head * group"

    @property
    def walk(self) -> Walk:
        return self.problem.by_key

    @property
    def sides(self) -> Sides:
        return Sides("row", "keys", self.tiles.k_tile, "query", "queries", self.tiles.q_tile)

    @property
    def accumulated(self) -> Accumulated:
        return accumulated(max(self.problem.dk, self.problem.dv))

    def heads(self) -> None:
        self.lines.add("kv_heads = heads // group", f"batch = {self._batch('kv_heads')}", "kv_head = lane % kv_heads")

    def positions(self) -> None:
        add = self.lines.add
        if self.problem.documents:
            self._windows("keys")
            add("window_first = window_row", "window_last = window_row_end - 1")
            add("place = safe - window_key")
        else:
            add("place = tl.minimum(row, keys - 1)" if self.problem.grid is None else "place = row")

    def moved(self) -> str:
        return " + window_row - window_shift" if self.problem.documents else " - shift"

    def _texts(self) -> IndexText:
        wide = ".to(tl.int64)" if self.walk.is_wide else ""
        query = Text("(query + shift)", COLUMNS)
        if self.problem.documents:
            query = Text("(query[None, :] - (window_row - window_shift)[:, None])", PAIRS)
        names: dict[Index, Text] = {
            fold.place("k"): Text(f"place{wide}", ROWS),
            fold.place("q"): query,
            **self._sizes(),
        }
        return IndexText(names, self._read)

    def _of_place(self, dim: str, text: Text) -> Text:
        if self.problem.documents:
            by = "window_key" if dim in ("token", "key") else "window_row - window_shift"
            return Text(f"{text.at(5)} + {by}", ROWS, 5)
        return Text(f"{text.at(5)} - shift", text.axes, 5) if dim == "query" else text

    def start(self) -> None:
        p = self.problem
        self.lines.add("")
        self.own("k", "kv_head", p.dk)
        self.own("v", "kv_head", p.dv)
        self.zero("key_sum", p.dk)
        self.zero("value_sum", p.dv)

    def _loops(self, texts: IndexText) -> None:
        add, p, walk = self.lines.add, self.problem, self.walk
        by_head = walk.reads_head
        if not by_head:
            self.begin(texts)
        with self.lines.block("for member in range(group):"):
            add("head = kv_head * group + member")
            if isinstance(walk, Listed):
                add("entry = tl.load(list_of_lane + batch * heads + head) * (tiles + 1) + row_tile")
            if by_head:
                self.begin(texts)
            self.moving("q", "head", p.dk)
            self.moving("dout", "head", p.dv)
            add("of_head = (batch * heads + head) * queries.to(tl.int64)")
            self.load_terms(self.stationary, "there", "row", "own")
            self.zero_gradients()
            walk.loops(self.lines, self.sides, self._body, self._full_loop)
            self.store_gradients("keys")

    def tile(self, tile: str, partial: bool) -> None:
        add, p = self.lines.add, self.problem
        inside = f', mask={self.inside()}, other=float("inf")' if partial else ""
        self.load("q", "head", p.dk, tile, partial)
        self.product("k", "q", p.dk, self.product_name)
        self.scored(partial)
        add(f"lse_of = tl.load(lse + of_head + query{inside})")
        add(f"weight = tl.exp2(score * {self.factor} - lse_of[None, :])")
        if partial:
            add("weight = tl.where(visible, weight, 0.0)")
        self.load("dout", "head", p.dv, tile, partial)
        outputs = self.load_sum("dout", "head", p.dv, tile, partial, loaded=True)
        for (name, _), value in zip(self.sums("value_sum", p.dv), outputs, strict=True):
            add(f"{name} = tl.dot(weight.to({value}.dtype), {value}, {name}{p.precision})")
        inside = f", mask={self.inside()}, other=0.0" if partial else ""
        add(f"delta_of = tl.load(delta + of_head + query{inside})")
        self.product("v", "dout", p.dv, "change")
        add("change = weight * (change - delta_of[None, :])")
        self.add_gradients("change", partial)
        change = self.slope("change", partial)
        queries = self.load_sum("q", "head", p.dk, tile, partial, loaded=True)
        for (name, _), query in zip(self.sums("key_sum", p.dk), queries, strict=True):
            add(f"{name} = tl.dot({change}.to({query}.dtype), {query}, {name}{p.precision})")

    def finish(self) -> None:
        p = self.problem
        for name, _ in self.sums("key_sum", p.dk) if p.score is None else ():
            self.lines.add(f"{name} = {name} * (scale * {LN_2})")
        self.store("dk", "kv_head", self.sums("key_sum", p.dk), p.dk)
        self.store("dv", "kv_head", self.sums("value_sum", p.dv), p.dv)
