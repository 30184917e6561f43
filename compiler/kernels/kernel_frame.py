"""The base of all kernel texts: the sides of a program, and the header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.depth import Accumulated
from attnc.compiler.kernels.index_text import IndexText
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import ValueText
from attnc.compiler.kernels.walks import Sides, Walk
from attnc.compiler.simulation.gpu_clocks import TileShape


@dataclass
class KernelFrame:
    """A kernel that is being written: what it is for, its lines so far, and its sides. Sub-classes say which it is."""

    problem: AttentionProblem
    tiles: TileShape
    lines: Lines = field(default_factory=Lines)
    texts: IndexText = field(init=False)
    values: ValueText = field(init=False)
    is_partial: bool = field(init=False, default=False)

    stage: ClassVar[str]
    read: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """Tensors of the call that are read, (batch, head, token, width), and below those that are written."""
    written: ClassVar[tuple[str, ...]]
    kept: ClassVar[tuple[str, ...]]
    """Tensors whose rows stay in registers; all others are streamed tile by tile."""
    numbers_columns: ClassVar[bool] = False
    """Whether the numbers of a tile's columns are asked for in every tile."""

    stationary: ClassVar[str] = "query"
    """The side whose rows a program has."""
    query_lane: ClassVar[str] = "lane"
    """A lane of query heads that is of the program."""

    @property
    def accumulated(self) -> Accumulated:
        """The widest that is added up."""
        raise NotImplementedError

    @property
    def walk(self) -> Walk:
        """How tiles are found."""
        return self.problem.by_query

    @property
    def sides(self) -> Sides:
        """The names of its sides."""
        return Sides("row", "queries", self.tiles.q_tile, "key", "keys", self.tiles.k_tile)

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

    def is_boxed(self, name: str) -> bool:
        """Whether the hardware copies a tensor. A program's own brick would go to registers, not to shared memory."""
        p = self.problem
        return p.boxes and (p.grid is None or name not in self.kept or name in self.written)

    def inside(self) -> str:
        """Whether the columns of a partial tile are there."""
        return f"{self.sides.column} < {self.sides.columns}"
