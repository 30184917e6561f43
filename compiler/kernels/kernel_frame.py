"""The base of all kernel texts: the problem, the lines, and the sides of a program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.depth import Accumulated
from attnc.compiler.kernels.index_text import IndexText
from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import ValueText
from attnc.compiler.kernels.walks import Sides, Walk


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
