"""The targets that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Maker = Literal["nvidia", "amd"]


@dataclass(frozen=True, slots=True)
class Target:
    """A family of GPUs. `shared_kib`: shared memory of a program at most. `boxes`: the hardware copies tiles (TMA).

    `delayed`: products with values overlap the next tile's softmax if they come one tile late. `registers`: what the
    assembler may use; None where it finds that out by itself, while on sm_100 it spills a few for one more program.
    `specialised`: warps of a program can have tasks of their own.
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
        """Triton's name of products of fp32 matrices that are computed on the chip, right to fp32.

        Three of TF32; but on sm_100 Triton 3.7.1 fails to compile some of these.
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
