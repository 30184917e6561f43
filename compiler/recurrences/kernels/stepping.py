"""The problem of token-by-token kernels: what a token does, and how its states lie on the chip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from attnc.compiler.recurrences.step_tape import StepTape
from attnc.compiler.value_nodes import Axes

LEAST = 16
"""Entries along an axis that tiles have at least, as products of matrices ask."""
MOST = 256 * 128
"""Entries of a tile at most."""
OF_A_PART = 2048
"""Entries of a tile that is one of several parts."""


@dataclass(frozen=True)
class Stepping:
    """The problem that token-by-token kernels are emitted for.

    `precision`: of products of matrices, which are of fp32 numbers. `sizes`: of axes that have names. `varying`: the
    leaves and tests that are not of all tokens alike. `starts`: what the states begin with. `resets`: tokens may begin
    anew. `keeps`: the forward pass stores the states before stretches. `registers`: as the target has it.
    """

    name: str
    tape: StepTape
    sizes: tuple[tuple[str, int], ...]
    varying: frozenset[int]
    starts: tuple[float, ...]
    resets: bool
    keeps: bool
    precision: str
    registers: int | None

    def size(self, axis: str | int) -> int:
        """Entries along an axis."""
        return axis if isinstance(axis, int) else dict(self.sizes)[axis]

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Entries along axes."""
        return tuple(map(self.size, axes))

    @cached_property
    def along(self) -> str | int | None:
        """The axis whose entries are done apart."""
        return self.tape.parts_along()

    def block(self, axis: str | int) -> int:
        """Entries of a tile along an axis, a power of two."""
        whole = max(LEAST, 1 << (self.size(axis) - 1).bit_length())
        if axis != self.along:
            return whole
        matrices = [op.axes for op in self.tape.ops if len(op.axes) == 2]
        rows = max((self.block(own[0]) for own in matrices if own[0] != axis), default=1)
        undivided = max((self.entries(own) for own in matrices if axis not in own), default=0)
        return min(whole, max(LEAST, max(OF_A_PART, undivided) // rows))

    @property
    def parts(self) -> int:
        """Programs of a lane."""
        return 1 if self.along is None else -(-self.size(self.along) // self.block(self.along))

    @property
    def warps(self) -> int:
        """The number of warps of a program."""
        if self.largest <= OF_A_PART:
            return 4
        return 8 if self.largest <= 8 * OF_A_PART else 16

    @property
    def is_tight(self) -> bool:
        """Whether there are registers for two or three tiles only, so that matrices are made where they are read."""
        return self.largest > 4 * OF_A_PART

    @cached_property
    def largest(self) -> int:
        """Entries of the largest tile."""
        return max((self.entries(op.axes) for op in self.tape.ops), default=1)

    def entries(self, axes: Axes) -> int:
        """Entries of a tile."""
        return prod(map(self.block, axes))

    def is_part(self, axes: Axes) -> bool:
        """Whether a value's entries are divided among the programs of a lane."""
        return self.along is not None and self.along in axes
