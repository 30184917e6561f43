"""A kernel as a whole: its head, its arguments, its loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from attnc.compiler.ir import Value
from attnc.compiler.kernels import visible_products
from attnc.compiler.kernels.depth import accumulated, pieces
from attnc.compiler.kernels.index_text import HELPERS, IndexText
from attnc.compiler.kernels.inputs import input_name, size_name, strides
from attnc.compiler.kernels.kernel_source import TYPES, KernelArgument, KernelSource, declaration, described
from attnc.compiler.kernels.scored_pairs import Scored
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import VALUE_HELPERS, ValueText
from attnc.compiler.kernels.visible_products import RESULT_SUM, RETURN_WHERE_FINITE

CAREFUL = "_careful"
"""The end of the names of kernels that multiply visible pairs alone (`visible_products`)."""


@dataclass
class TiledKernel(Scored):
    """A kernel. Sub-classes say what a program loads, does with a tile, and stores."""

    def start(self) -> None:
        """Load what a program keeps."""
        raise NotImplementedError

    def tile(self, tile: str, partial: bool) -> None:
        """Do a tile."""
        raise NotImplementedError

    def finish(self) -> None:
        """Store."""
        raise NotImplementedError

    @property
    def makes(self) -> str:
        """The results of the kernel, in words."""
        return _TITLES[self.stage]

    @property
    def is_specialised(self) -> bool:
        """Whether the warps of a program have tasks of their own: then Triton shares registers out among them."""
        return False

    @property
    def is_guarded(self) -> bool:
        """Whether loops stand in branches of their own."""
        return self.problem.guarded

    # --- the whole

    @property
    def title(self) -> str:
        """The results of the kernel, as part of its name."""
        return self.stage

    def source(self) -> KernelSource:
        """The kernel."""
        function = f"{self.problem.name}_{self.title}{CAREFUL if self.problem.careful else ''}"
        arguments = self._arguments()
        self.texts = texts = self.made_texts()
        score = self.problem.score
        grouped = frozenset[Value]() if score is None else score.grouped
        self.values = ValueText(self.atoms(), texts, self.element_text, grouped=grouped)
        lines = self.lines
        lines.depth, lines.guarded = 1, self.is_guarded
        if self.problem.careful:
            lines.add(*RETURN_WHERE_FINITE)
        self.write(texts)
        head = Lines()
        self._head(head)
        helpers = [HELPERS[name] for name in texts.helpers] + [VALUE_HELPERS[name] for name in self.values.helpers]
        if self.problem.careful:
            helpers.append(visible_products.helper(self.problem.precision))
        for helper in helpers:
            head.add(*helper.rstrip().split("\n"), "", "")
        head.add(*declaration(function, arguments))
        text = str(head) + str(lines)
        bricks = None if self.problem.grid is None else prod(self.problem.grid.bricks(self.row_brick))
        parts, registers = self.accumulated.parts, None if self.is_specialised else self.problem.registers
        return KernelSource(self.title, function, text, arguments, self.tiles, parts, bricks, registers)

    def write(self, texts: IndexText) -> None:
        """All lines."""
        self.program()
        self.start()
        if self.stationary == "query":
            self.load_terms("query", "there", "row", "own")
        self.loops_of(texts)
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
            f"{self.makes}. Heads of {p.dk} and {p.dv} in {p.dtype}, tiles of {t.q_tile} queries and "
            f"{t.k_tile} keys, {t.warps} warps, {t.stages} stages."
        ]

    def _arguments(self) -> tuple[KernelArgument, ...]:
        p = self.problem
        names = [name for name in (*self.read, *self.written) if not self.is_boxed(name)]
        found = [KernelArgument(name, f"*{TYPES[p.dtype]}") for name in names]
        found += [box for name in (*self.read, *self.written) if self.is_boxed(name) for box in self._boxes(name)]
        found += [KernelArgument(name, "*fp32") for name in self.rows_of]
        if self.problem.documents:
            found.append(KernelArgument("windows", "*i32"))
        found += [KernelArgument(input_name(tensor), f"*{_KINDS[tensor.kind]}") for tensor in self.problem.tensors]
        terms = self.given()
        found += [KernelArgument(term.tensor.name, "*fp32") for term in terms]
        found += [KernelArgument(name, "*fp32") for name in self.gradients()]
        found += [*self.more_pointers(), *([RESULT_SUM] if p.careful else [])]
        found += self.walk.arguments(self.sides)
        for name in names:
            found += [KernelArgument(f"{name}_{dim}", kind) for dim, kind in _STRIDES]
        if self.problem.documents:
            found.append(KernelArgument("windows_0", "i64"))
        for tensor in self.problem.tensors:
            found += [KernelArgument(f"{input_name(tensor)}_{i}", "i64") for i in strides(tensor)]
        for term in terms:
            found += [KernelArgument(f"{term.tensor.name}_{i}", "i64") for i in range(2)]
        counts = _COUNTS + (("distances",) if any(term.side == "distance" for term in terms) else ())
        found += [KernelArgument(name, "i32") for name in (*counts, *map(size_name, p.sizes))]
        return (*found, KernelArgument("scale", "fp32"))

    def more_pointers(self) -> list[KernelArgument]:
        """Other tensors that are read or written."""
        return []

    def _boxes(self, name: str) -> Iterator[KernelArgument]:
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

    # --- loops

    def loops_of(self, texts: IndexText) -> None:
        """All loops."""
        self.begin(texts)
        self.walk.loops(self.lines, self.sides, self.body, self.full_loop)

    def begin(self, texts: IndexText) -> None:
        """Emit the lines before the loops."""
        self.lines.add("")
        self.walk.start(self.lines, self.sides, texts, self.moved())
        self.lines.add("")

    def body(self, tile: str, partial: bool) -> None:
        """Emit the work on a tile, after its column numbers and its mask."""
        if partial or self.numbers_columns or self.problem.score is not None:
            self.column_numbers(tile)
        if partial:
            self.mask()
        if self.problem.score is not None:
            self.moving_terms(partial)
        self.tile(tile, partial)

    def mask(self) -> None:
        """The mask of a partial tile; what it loads is loaded where the tile has rows and columns."""
        before, self.is_partial = self.is_partial, True
        self.texts.forget()
        self.walk.visible(self.lines, self.sides, self.texts)
        self.texts.forget()
        self.is_partial = before

    def full_loop(self, begin: str, end: str) -> None:
        """The loop over full tiles."""
        with self.lines.loop("tile", begin, end, specialised=self.is_specialised):
            self.body("tile", False)


_TITLES = {
    "forward": "Output and LSE",
    "dq": "Gradient of q",
    "dkdv": "Gradients of k and v",
    "pairs": "Gradient of what is read pair by pair",
}
_KINDS = {"int": "i32", "bool": "i1", "real": "fp32"}
_COUNTS = ("lanes", "heads", "group", "queries", "keys", "shift")
_STRIDES = (("batch", "i64"), ("head", "i64"), ("token", "i32"))
