"""A kernel as text, with what it must be called with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from attnc.compiler.simulation.gpu_clocks import TileShape

Stage = Literal["forward", "delta", "dq", "dkdv", "pairs", "decode", "merge"]

TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "i1"}
"""Triton's names of dtypes."""

VECTOR = 16
"""Bytes in which strides are counted, so that loads are known to be aligned whatever the strides are."""


@dataclass(frozen=True, slots=True)
class KernelArgument:
    """A parameter of a kernel; `type` is Triton's: `*bf16` a pointer, `i32`, `i64`, `fp32` a number.

    `box`: it describes the tensor `of`, (batch, head, token, width), for copies of such boxes by the hardware; with
    the tokens as a grid where `axes` says their extents and strides, and batch entries and heads as one if `folded`.
    """

    name: str
    type: str
    of: str = ""
    box: tuple[int, ...] = ()
    axes: tuple[tuple[int, int], ...] = ()
    folded: bool = False

    @property
    def is_pointer(self) -> bool:
        """Whether it is the address of a tensor, which is a multiple of 16."""
        return self.type.startswith("*")

    @property
    def is_number(self) -> bool:
        """Whether it is a number."""
        return not (self.is_pointer or self.box)

    @property
    def declared(self) -> str:
        """As it stands in the text: numbers are typed, so that their values make no variants."""
        return f"{self.name}: tl.{_DECLARED[self.type]}" if self.is_number else self.name


def described(
    name: str,
    of: str,
    dtype: str,
    sides: tuple[int, ...],
    width: int,
    axes: tuple[tuple[int, int], ...] = (),
    folded: bool = False,
) -> KernelArgument:
    """The descriptor of a tensor for boxes of a head: of so many rows, or with sides along the axes of a grid."""
    box = (1, *sides, width) if folded else (1, 1, *sides, width)
    return KernelArgument(name, f"tensordesc<{TYPES[dtype]}[{', '.join(map(str, box))}]>", of, box, axes, folded)


_DECLARED = {"i32": "int32", "i64": "int64", "fp32": "float32"}


@dataclass(frozen=True)
class KernelSource:
    """The text of one kernel, a module by itself; `function` is its name there, `stage` what it makes.

    A program does the tile `row_tile` of `stationary` (queries, or keys for their gradients) of a lane, which is a
    batch entry and a head: query heads, or kv heads for the gradients of keys. `parts`: programs for each, along the
    width of a head; 0: as many as the call says.
    `row_tiles`: how many tiles there are; None: as many as the tokens make. `registers`: what the assembler may use.
    """

    stage: str
    function: str
    text: str
    arguments: tuple[KernelArgument, ...]
    tiles: TileShape
    parts: int = 1
    row_tiles: int | None = None
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """The compile options of Triton."""
        found = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages, "enable_fp_fusion": True}
        return found if self.registers is None else {**found, "maxnreg": self.registers}

    @cached_property
    def digest(self) -> str:
        """Equal kernels have equal digests: the text and how it is compiled are all there is to them."""
        told = f"{self.text}\0{sorted(self.options.items())}"
        return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()

    @property
    def stationary(self) -> int:
        """Tokens of a program's own tile."""
        return self.tiles.k_tile if self.stage == "dkdv" else self.tiles.q_tile

    def __str__(self) -> str:
        return self.text


def declaration(function: str, arguments: Sequence[KernelArgument]) -> list[str]:
    """The head of a kernel. Numbers are not specialised on: their values make no variants."""
    numbers = [f'"{argument.name}"' for argument in arguments if argument.is_number]
    return [
        "NUMBERS = [",
        *(f"    {line}," for line in wrapped(numbers)),
        "]",
        "",
        "",
        "@triton.jit(do_not_specialize=NUMBERS)",
        f"def {function}(",
        *(f"    {line}," for line in wrapped([argument.declared for argument in arguments])),
        "):",
    ]


def wrapped(words: Sequence[str], width: int = 112) -> list[str]:
    """Words in lines."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 <= width:
            lines[-1] += f", {word}"
        else:
            lines.append(word)
    return lines
