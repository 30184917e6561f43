"""The problem that kernels of a linear recurrence are emitted for: its class, the head widths, the chunk length.

A token updates the state S (R, C) and reads it:   S ← D S;   S ← S + u (rᵀ S);   S ← S + k vᵀ;   o = qᵀ S

Readers are the vectors that read the state: the query, and the correction's read. Writers are the vectors that write to
it: the key, and the correction's left side. Values are what writers write: v, and the rows p that the correction solves
for. In a chunk that starts with the state S, with A the products of readers and writers times the decays between them,
and T the inverse of a triangle:

    o = q_in S + Σ A_q,writer values        S′ = total ⊙ S + Σ writer_outᵀ values        p = U + W S
    delta rule:   p = T (β v - β r_in S),          T = (1 + β A_r,k)⁻¹
    rank one:     p = T (A_r,k v + r_in S),        T = (1 - A_r,u)⁻¹
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.kernels.kernel_source import BYTES, TYPES, VECTOR
from attnc.compiler.kernels.targets import Target
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass

LEAST = 16
"""Minimum side of a tile in a product."""


@dataclass(frozen=True, slots=True)
class RecurrenceProblem:
    """A class with its sizes: head widths `dk` and `dv`, chunks of `length` rows (a power of two, at least 16).

    `dtype`: of the operands of products.
    """

    form: RecurrenceClass
    dk: int
    dv: int
    dtype: str
    length: int
    target: Target

    @property
    def wk(self) -> int:
        """The number of state rows in scratch, a power of two; rows past `dk` are 0."""
        return padded(self.dk)

    @property
    def wv(self) -> int:
        """The number of state columns in scratch, a power of two; columns past `dv` are 0."""
        return padded(self.dv)

    @property
    def can_walk(self) -> bool:
        """Whether a single kernel can walk the chunks and compute the outputs: with 16-bit inputs and heads up to 256.

        An fp32 product takes three TF32 products. With tiles of pairs and outputs beside the state, their operands are
        spilled on every target, whatever the block shape.
        """
        return self.form.can_walk and not self.is_exact and self.wk <= 256

    @property
    def can_fuse(self) -> bool:
        """Whether the walking kernel needs no prepared rows."""
        return self.can_walk and self.form.can_fuse and self.wk <= 128

    @property
    def segment_width(self) -> int:
        """The number of columns of a segment's result: N, and with a correction also the matrix M."""
        return self.wv + (self.wk if self.form.is_corrected else 0)

    @property
    def per_chunk(self) -> int:
        """The number of tokens of a chunk."""
        return self.form.per_chunk(self.length)

    @property
    def used(self) -> int:
        """The number of rows of a chunk that hold steps; the rest is padding."""
        return self.per_chunk * self.form.micro

    @property
    def operand(self) -> str:
        """Triton's name of the operands' dtype."""
        return TYPES[self.dtype]

    @property
    def is_exact(self) -> bool:
        """Whether inputs have 32 bits."""
        return self.dtype == "float32"

    @property
    def vector(self) -> int:
        """The number of input elements in 16 bytes."""
        return VECTOR // BYTES[self.dtype]

    @property
    def exact(self) -> str:
        """Triton's name for fp32 products that are exact to fp32."""
        return "tf32x3" if self.target.maker == "nvidia" else "ieee"

    @property
    def exact_precision(self) -> str:
        """The `tl.dot` argument for products that are exact to fp32."""
        return f', input_precision="{self.exact}"'

    @property
    def sum_precision(self) -> str:
        """The `tl.dot` argument for fp32 sums as products with a matrix of 0 and 1: as exact as the inputs."""
        if self.target.maker == "nvidia" and not self.is_exact:
            return ', input_precision="tf32"'
        return self.exact_precision

    def dot(self, left: str, right: str, added: str = "") -> str:
        """Return the text of a product of operands, plus `added`."""
        more = f", {added}" if added else ""
        return f"tl.dot({left}, {right}{more}{self.exact_precision if self.is_exact else ''})"

    def rounded(self, x: str) -> str:
        """Return the text of an fp32 value rounded to the operands' dtype."""
        return x if self.is_exact else f"{x}.to({TRITON_TYPES[self.dtype]})"


TRITON_TYPES = {"float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16"}


def padded(width: int) -> int:
    """Return the next power of two, at least 16."""
    return max(LEAST, 1 << (width - 1).bit_length())
