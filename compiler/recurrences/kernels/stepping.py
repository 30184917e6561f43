"""The problem that token-by-token kernels solve: a token's operations, and the tiles of its states on the chip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from attnc.compiler.ir.value_nodes import Axes
from attnc.compiler.recurrences.step_tape import StepTape

LEAST = 16
"""Minimum number of entries of a tile along an axis, as products of matrices require."""
MOST = 256 * 128
"""Maximum number of entries of a tile."""
OF_A_PART = 2048
"""Target number of entries of a tile where programs divide an axis into parts."""


@dataclass(frozen=True)
class Stepping:
    """The problem that token-by-token kernels are emitted for.

    `precision`: of fp32 products of matrices. `sizes`: the sizes of named axes. `varying`: the leaves and tests that
    differ between tokens. `starts`: the start values of the states. `resets`: whether states may start anew before a
    token. `keeps`: whether the forward pass stores the states before stretches. `registers`: the target's.
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
        """Return the number of entries along an axis."""
        return axis if isinstance(axis, int) else dict(self.sizes)[axis]

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Return the numbers of entries along axes."""
        return tuple(map(self.size, axes))

    @cached_property
    def along(self) -> str | int | None:
        """The axis that is divided among programs; None if there is none."""
        return self.tape.parts_along()

    def block(self, axis: str | int) -> int:
        """Return the number of entries of a tile along an axis, a power of two."""
        full = max(LEAST, 1 << (self.size(axis) - 1).bit_length())
        if axis != self.along:
            return full
        matrices = [op.axes for op in self.tape.ops if len(op.axes) == 2]
        rows = max((self.block(axes[0]) for axes in matrices if axes[0] != axis), default=1)
        undivided = max((self.entries(axes) for axes in matrices if axis not in axes), default=0)
        return min(full, max(LEAST, max(OF_A_PART, undivided) // rows))

    @property
    def parts(self) -> int:
        """The number of programs of a head."""
        return 1 if self.along is None else -(-self.size(self.along) // self.block(self.along))

    @property
    def warps(self) -> int:
        """The number of warps of a program."""
        if self.largest <= OF_A_PART:
            return 4
        return 8 if self.largest <= 8 * OF_A_PART else 16

    @property
    def is_tight(self) -> bool:
        """Whether only two or three tiles fit into registers, so that matrices are computed where they are read."""
        return self.largest > 4 * OF_A_PART

    @cached_property
    def largest(self) -> int:
        """The number of entries of the largest tile."""
        return max((self.entries(op.axes) for op in self.tape.ops), default=1)

    def entries(self, axes: Axes) -> int:
        """Return the number of entries of a tile."""
        return prod(map(self.block, axes))

    def is_part(self, axes: Axes) -> bool:
        """Check whether a value's entries are divided among the programs of a head."""
        return self.along is not None and self.along in axes
