"""The frame of a tiled kernel: its header, its arguments and its loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from attnc.compiler.ir import Value
from attnc.compiler.kernels import visible_products
from attnc.compiler.kernels.depth import accumulated, pieces
from attnc.compiler.kernels.index_text import HELPERS, IndexText
from attnc.compiler.kernels.inputs import input_name, size_name, strides
from attnc.compiler.kernels.kernel_source import (
    POINTED,
    TYPES,
    KernelArgument,
    KernelSource,
    declaration,
    descriptor_argument,
    preface,
    stride_arguments,
    typed_arguments,
)
from attnc.compiler.kernels.scored_pairs import Scored
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import VALUE_HELPERS, ValueText
from attnc.compiler.kernels.visible_products import RESULT_SUM, RETURN_WHERE_FINITE

CAREFUL = "_careful"
"""Suffix of the names of careful kernels, which multiply visible pairs only (`visible_products`)."""


@dataclass
class TiledKernel(Scored):
    """A kernel that walks tiles. Subclasses emit what a program loads, computes for a tile, and stores."""

    def start(self) -> None:
        """Emit the loads of rows that the program keeps."""
        raise NotImplementedError

    def tile(self, tile: str, partial: bool) -> None:
        """Emit the work on a tile."""
        raise NotImplementedError

    def finish(self) -> None:
        """Emit the stores of the results."""
        raise NotImplementedError

    @property
    def makes(self) -> str:
        """The results of the kernel, in words."""
        return _TITLES[self.stage]

    @property
    def is_specialised(self) -> bool:
        """Whether the warps of a program have separate tasks; Triton then divides the registers among them."""
        return False

    @property
    def is_guarded(self) -> bool:
        """Whether each loop is enclosed in a branch (`Lines.guarded`)."""
        return self.problem.guarded

    # --- the text

    @property
    def title(self) -> str:
        """The results of the kernel, as part of its name."""
        return self.stage

    def source(self) -> KernelSource:
        """Return the kernel."""
        function = f"{self.problem.name}_{self.title}{CAREFUL if self.problem.careful else ''}"
        arguments = self._arguments()
        self.texts = texts = self.index_writer()
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
        """Emit all lines of the kernel's body."""
        self.emit_program()
        self.start()
        if self.stationary == "query":
            self.load_terms("query", "there", "row", "own")
        self.emit_loops(texts)
        self.lines.add("")
        self.finish()

    def _head(self, head: Lines) -> None:
        p, t = self.problem, self.tiles
        about = (
            f"{self.makes}. Heads of {p.dk} and {p.dv} in {p.dtype}, tiles of {t.q_tile} queries and "
            f"{t.k_tile} keys, {t.warps} warps, {t.stages} stages."
        )
        head.add(*preface(*p.header, about))
        if any("FAR" in line for line in self.lines.lines):
            far = "1 << 40" if self.walk.is_wide else "1 << 30"
            head.add(f"FAR: tl.constexpr = tl.constexpr({far})  # past every token", "", "")

    def _arguments(self) -> tuple[KernelArgument, ...]:
        p = self.problem
        names = [name for name in (*self.read, *self.written) if not self.is_boxed(name)]
        arguments = typed_arguments(f"*{TYPES[p.dtype]}", *names)
        arguments += [box for name in (*self.read, *self.written) if self.is_boxed(name) for box in self._boxes(name)]
        arguments += typed_arguments("*fp32", *self.row_numbers)
        if self.problem.documents:
            arguments.append(KernelArgument("windows", "*i32"))
        arguments += [KernelArgument(input_name(tensor), f"*{POINTED[tensor.kind]}") for tensor in self.problem.tensors]
        terms = self.read_terms()
        arguments += typed_arguments("*fp32", *(term.tensor.name for term in terms), *self.gradients())
        arguments += [*self.more_pointers(), *([RESULT_SUM] if p.careful else [])]
        arguments += self.walk.arguments(self.sides)
        arguments += [argument for name in names for argument in stride_arguments(name)]
        if self.problem.documents:
            arguments.append(KernelArgument("windows_0", "i64"))
        arguments += [
            KernelArgument(f"{input_name(tensor)}_{i}", "i64") for tensor in p.tensors for i in strides(tensor)
        ]
        arguments += [KernelArgument(f"{term.tensor.name}_{i}", "i64") for term in terms for i in range(2)]
        counts = _COUNTS + (("distances",) if any(term.side == "distance" for term in terms) else ())
        arguments += typed_arguments("i32", *counts, *map(size_name, p.sizes))
        return (*arguments, KernelArgument("scale", "fp32"))

    def more_pointers(self) -> list[KernelArgument]:
        """Return the pointers of other tensors that the kernel reads or writes."""
        return []

    def _boxes(self, name: str) -> Iterator[KernelArgument]:
        """Yield the descriptors of a tensor: of its slices, and of the part that a program accumulates."""
        p, grid = self.problem, self.problem.grid
        is_kept = name in self.kept
        sides: tuple[int, ...] = (self.sides.row_tile if is_kept else self.sides.column_tile,)
        axes: tuple[tuple[int, int], ...] = ()
        if grid is not None:
            sides = self.row_brick if is_kept else self.column_brick
            axes = tuple((axis.extent, axis.stride) for axis in grid.axes)
        folded = grid is not None and grid.is_folded
        size = p.dv if name in ("v", "dout", "out", "dv") else p.dk
        if name in self.read:
            for i, piece in enumerate(pieces(size)):
                yield descriptor_argument(f"{name}_box_{i}", name, p.dtype, sides, piece.width, axes, folded)
        sums = accumulated(size)
        if name in self.written:
            for i, piece in enumerate(sums.pieces):
                yield descriptor_argument(f"{name}_box_{i}", name, p.dtype, sides, piece.width, axes, folded)
        elif sums.parts > 1 and name not in self.kept:
            yield descriptor_argument(f"{name}_box_part", name, p.dtype, sides, sums.step, axes, folded)

    # --- loops

    def emit_loops(self, texts: IndexText) -> None:
        """Emit all loops."""
        self.begin(texts)
        self.walk.loops(self.lines, self.sides, self.body, self.full_loop)

    def begin(self, texts: IndexText) -> None:
        """Emit the lines before the loops."""
        self.lines.add("")
        self.walk.start(self.lines, self.sides, texts, self.position_offset())
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
        """Emit the mask of a partial tile; its own loads are masked by the rows and columns that exist."""
        was_partial, self.is_partial = self.is_partial, True
        self.texts.forget()
        self.walk.visible(self.lines, self.sides, self.texts)
        self.texts.forget()
        self.is_partial = was_partial

    def full_loop(self, begin: str, end: str) -> None:
        """Emit the loop over full tiles."""
        with self.lines.loop("tile", begin, end, specialised=self.is_specialised):
            self.body("tile", False)


_TITLES = {
    "forward": "Output and LSE",
    "dq": "Gradient of q",
    "dkdv": "Gradients of k and v",
    "pairs": "Gradient of what is read pair by pair",
}
_COUNTS = ("lanes", "heads", "group", "queries", "keys", "shift")
