"""The base of gather kernels: arguments, loads of rows and keys, masks, products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from attnc.compiler.kernels.depth import pieces
from attnc.compiler.kernels.index_text import HELPERS
from attnc.compiler.kernels.kernel_source import (
    TYPES,
    KernelArgument,
    KernelSource,
    TileShape,
    declaration,
    preface,
    stride_arguments,
    typed_arguments,
)
from attnc.compiler.kernels.loads import conjunction, entry_numbers, validity
from attnc.compiler.kernels.selected.selected_problem import SelectedProblem
from attnc.compiler.kernels.text_lines import Lines

PREFIX = "chosen_"
"""The prefix of the names of gather kernels."""


@dataclass
class GatherFrame(ABC):
    """A gather kernel while its text is written. `tiles`: numbers of gathered queries and of keys in a tile."""

    problem: SelectedProblem
    tiles: TileShape
    lines: Lines = field(default_factory=lambda: Lines(depth=1))
    arguments: dict[str, KernelArgument] = field(default_factory=dict)

    stage: ClassVar[str]
    makes: ClassVar[str]

    @abstractmethod
    def write(self) -> None:
        """Emit all lines of the kernel's body."""

    def source(self) -> KernelSource:
        """Return the kernel."""
        self.write()
        p, head = self.problem, Lines()
        arguments = sorted(self.arguments.values(), key=lambda argument: argument.is_number)
        function = f"{PREFIX}{self.stage}"
        about = f"{self.makes}. Heads of {p.dk} and {p.dv} in {p.dtype}."
        head.add(*preface("Attention to chosen places: made by attnc.", about))
        for helper in () if p.rest is None else p.rest.helpers:
            head.add(*HELPERS[helper].strip().split("\n"), "", "")
        head.add(*declaration(function, arguments))
        text = str(head) + str(self.lines)
        return KernelSource(self.stage, function, text, tuple(arguments), self.tiles, registers=p.target.registers)

    def add(self, *lines: str) -> None:
        """Add lines at the current depth."""
        self.lines.add(*lines)

    # --- arguments

    def declare(self, arguments: Iterable[KernelArgument]) -> None:
        """Declare arguments."""
        self.arguments.update((argument.name, argument) for argument in arguments)

    def pointers(self, kind: str, *names: str) -> None:
        """Declare tensors without strides."""
        self.declare(typed_arguments(f"*{kind}", *names))

    def numbers(self, *names: str) -> None:
        """Declare counts."""
        self.declare(typed_arguments("i32", *names))

    def tensor(self, name: str) -> None:
        """Declare a tensor of the call, (batch, heads, tokens, width)."""
        self.declare([KernelArgument(name, f"*{TYPES[self.problem.dtype]}"), *stride_arguments(name)])

    def head_base(self, name: str, head: str) -> str:
        """Declare a tensor and return the line that computes where one of its heads begins."""
        self.tensor(name)
        return f"{name}_at = {name} + (batch * {name}_batch + {head} * {name}_head) * {self.problem.vector}"

    # --- gathered rows

    def row_addresses(self, name: str, row: str) -> str:
        """Return the line that computes where gathered rows begin."""
        return f"{name}_rows = {name}_at + {row}.to(tl.int64)[:, None] * ({name}_token * {self.problem.vector})"

    def load_rows(self, name: str, size: int, there: str | None) -> None:
        """Load gathered rows; `there`: the mask of rows that exist, None if all do."""
        for i, piece in enumerate(pieces(size)):
            mask = conjunction(there and f"{there}[:, None]", validity(piece))
            masked = "" if mask is None else f", mask={mask}, other=0.0"
            self.add(f"{name}_{i} = tl.load({name}_rows + {entry_numbers(piece)}{masked})")

    def store_rows(self, name: str, size: int, there: str, sums: str, kind: str) -> None:
        """Store sums as gathered rows; `there`: the mask of rows that exist."""
        for i, piece in enumerate(pieces(size)):
            mask = conjunction(f"{there}[:, None]", validity(piece))
            self.add(f"tl.store({name}_rows + {entry_numbers(piece)}, {sums}_{i}.to(tl.{kind}), mask={mask})")

    # --- sums and products

    def zero(self, sums: str, size: int, rows: int) -> None:
        """Set sums to zero."""
        for i, piece in enumerate(pieces(size)):
            self.add(f"{sums}_{i} = tl.zeros(({rows}, {piece.width}), tl.float32)")

    def scale_sums(self, sums: str, size: int, factor: str) -> None:
        """Multiply sums by a factor."""
        self.add(*(f"{sums}_{i} = {sums}_{i} * {factor}" for i, _ in enumerate(pieces(size))))

    def product(self, left: str, right: str, size: int, to: str) -> None:
        """Emit `to` = left · rightᵀ, summed over the width of a head."""
        for i, _ in enumerate(pieces(size)):
            accumulator = f", {to}" if i else ""
            self.add(f"{to} = tl.dot({left}_{i}, tl.trans({right}_{i}){accumulator}{self.problem.precision})")

    def add_product(self, sums: str, size: int, weights: str, rows: str) -> None:
        """Add weights · rows to sums."""
        for i, _ in enumerate(pieces(size)):
            product = f"tl.dot({weights}.to({rows}_{i}.dtype), {rows}_{i}, {sums}_{i}{self.problem.precision})"
            self.add(f"{sums}_{i} = {product}")

    # --- the condition besides the selection

    def emit_positions(self, inside: str) -> None:
        """Emit the positions of keys in the sequence, if the condition of pairs reads them."""
        rest = self.problem.rest
        if rest is None:
            return
        if self.problem.ordered:
            self.pointers("i32", "order")
            self.add(f"position = tl.load(order + key, mask={inside}, other=0)")
        else:
            self.add("position = key")

    def declare_rest(self, text: str) -> str:
        """Declare the numbers of the condition of pairs besides the selection, and return its text."""
        rest = self.problem.rest
        assert rest is not None
        self.declare(typed_arguments("i64" if rest.wide else "i32", *(f"n{i}" for i in range(rest.numbers))))
        return text

    def emit_query_positions(self, where: str, inside: str | None = None) -> None:
        """Emit the positions of the gathered queries, whose `row` is computed."""
        if self.problem.rest is None:
            return
        if self.problem.stacked:
            masked = "" if inside is None else f", mask={inside}, other=0"
            self.pointers("i32", "queries_of")
            self.add(f"query = tl.load(queries_of + {where}{masked})")
        else:
            self.add("query = row")
