"""The targets that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Maker = Literal["nvidia", "amd"]


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture. `shared_kib`: maximum shared memory of a program. `boxes`: the hardware copies tiles (TMA).

    `delayed`: products with values overlap the next tile's softmax if they are computed one tile late. `registers`: the
    maximum number of registers that the assembler may use for a thread; None if the assembler chooses well by itself.
    On sm_100 it spills a few registers to fit one more program. `specialised`: the warps of a program can have separate
    tasks.
    """

    name: str
    maker: Maker
    shared_kib: int
    boxes: bool = False
    delayed: bool = False
    registers: int | None = None
    specialised: bool = False

    @property
    def products_on_chip(self) -> str:
        """Triton's name for the precision at which products of fp32 matrices on the chip are accurate to fp32.

        On NVIDIA it is three TF32 products, except on sm_100, where Triton 3.7.1 fails to compile some of them.
        """
        return "tf32x3" if self.maker == "nvidia" and self.name != "sm_100" else "ieee"


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "nvidia", 163),
        Target("sm_90", "nvidia", 227, boxes=True, delayed=True),
        Target("sm_100", "nvidia", 227, boxes=True, registers=255, specialised=True),
        Target("gfx942", "amd", 64),
    )
}
