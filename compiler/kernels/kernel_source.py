"""The text of one kernel, with its arguments and compile options."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Stage = Literal["forward", "delta", "dq", "dkdv", "pairs", "decode", "merge"]

TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "i1"}
"""Triton's names of dtypes."""

POINTED = {"int": "i32", "bool": "i1", "real": "fp32"}
"""Triton's types of the entries of inputs, by kind."""

VECTOR = 16
"""Unit of strides in bytes. Strides are passed as multiples of it, so that Triton knows that loads are aligned."""


BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by the dtypes that kernels support."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """The tiles of a kernel, the warps of a program, and the stages (buffers) of keys and values."""

    q_tile: int
    k_tile: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.q_tile}×{self.k_tile}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True, slots=True)
class KernelArgument:
    """A parameter of a kernel. `type` is Triton's type: `*bf16` for a pointer, `i32`, `i64` or `fp32` for a number.

    `box`: the shape of the boxes that the hardware copies; the argument is then the descriptor of the tensor `of`,
    (batch, heads, tokens, width). `axes`: the extent and stride of each axis, if the tokens form a grid. `folded`:
    batch entries and heads form one dimension of the box.
    """

    name: str
    type: str
    of: str = ""
    box: tuple[int, ...] = ()
    axes: tuple[tuple[int, int], ...] = ()
    folded: bool = False

    @property
    def is_pointer(self) -> bool:
        """Whether the argument is the address of a tensor, which is a multiple of 16 bytes."""
        return self.type.startswith("*")

    @property
    def is_number(self) -> bool:
        """Whether the argument is a number, neither a pointer nor a descriptor."""
        return not (self.is_pointer or self.box)

    @property
    def declared(self) -> str:
        """The parameter in the kernel's signature. Numbers are typed, so that their values cause no recompilation."""
        return f"{self.name}: tl.{_DECLARED[self.type]}" if self.is_number else self.name


def typed_arguments(kind: str, *names: str) -> list[KernelArgument]:
    """Return the arguments of one type."""
    return [KernelArgument(name, kind) for name in names]


def stride_arguments(name: str) -> list[KernelArgument]:
    """Return the strides of a tensor of the call, (batch, heads, tokens, width), whose last dimension is contiguous."""
    return [*typed_arguments("i64", f"{name}_batch", f"{name}_head"), KernelArgument(f"{name}_token", "i32")]


class StrideUnits:
    """The parts of a kernel's description that follow from the dtype of its vectors."""

    dtype: str
    tf32: bool

    @property
    def vector(self) -> int:
        """The number of entries in a unit of strides."""
        return VECTOR // BYTES[self.dtype]

    @property
    def precision(self) -> str:
        """The precision of fp32 products, as arguments of tl.dot."""
        if self.dtype != "float32":
            return ""
        return f', input_precision="{"tf32" if self.tf32 else "ieee"}"'


def preface(*about: str) -> list[str]:
    """Return the lines at the beginning of a text: comments and imports."""
    return [*(f"# {line}".rstrip() for line in about), "", "import triton", "import triton.language as tl", "", ""]


def descriptor_argument(
    name: str,
    of: str,
    dtype: str,
    sides: tuple[int, ...],
    width: int,
    axes: tuple[tuple[int, int], ...] = (),
    folded: bool = False,
) -> KernelArgument:
    """Return the argument for a tensor's descriptor; `sides`: the rows of a box, or its sides along a grid's axes."""
    box = (1, *sides, width) if folded else (1, 1, *sides, width)
    return KernelArgument(name, f"tensordesc<{TYPES[dtype]}[{', '.join(map(str, box))}]>", of, box, axes, folded)


_DECLARED = {"i32": "int32", "i64": "int64", "fp32": "float32"}


@dataclass(frozen=True)
class KernelSource:
    """The text of one kernel, a complete module. `function`: the kernel's name in it; `stage`: what it computes.

    A program computes one tile of `stationary` tokens (queries, or keys for key gradients) of one lane: a batch entry
    with a query head, or with a kv head for key gradients. `parts`: the number of programs for each tile, along the
    width of a head; 0 if the call decides it. `row_tiles`: the number of tiles of a lane; None if it follows from the
    number of tokens. `registers`: the maximum number of registers that the assembler may use for a thread.
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
        """The options with which Triton compiles the text."""
        options = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages, "enable_fp_fusion": True}
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    @cached_property
    def digest(self) -> str:
        """The digest of the text and its compile options; equal kernels have equal digests."""
        content = f"{self.text}\0{sorted(self.options.items())}"
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()

    @property
    def stationary(self) -> int:
        """The number of tokens in the tile that a program owns."""
        return self.tiles.k_tile if self.stage == "dkdv" else self.tiles.q_tile

    def __str__(self) -> str:
        return self.text


def declaration(function: str, arguments: Sequence[KernelArgument]) -> list[str]:
    """Return the lines above a kernel's body. Numbers are not specialised, so their values cause no recompilation."""
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
    """Join words by commas into lines of at most `width` characters."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 <= width:
            lines[-1] += f", {word}"
        else:
            lines.append(word)
    return lines
