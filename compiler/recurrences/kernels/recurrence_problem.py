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
from typing import Literal

from attnc.compiler.kernels.kernel_source import BYTES, TYPES, VECTOR
from attnc.compiler.kernels.targets import Target

Gate = Literal["none", "constant", "scalar", "rows"]
Correction = Literal["none", "delta", "comba", "decayed", "old"]
LEAST = 16
"""Minimum side of a tile in a product."""


@dataclass(frozen=True, slots=True)
class RecurrenceClass:
    """The class of a recurrence: everything that its kernel texts depend on, except sizes.

    `gate`: none, one per head at all steps, one per step, or one per row of the state; `columns`: whether there is a
    gate per column. `correction`: "delta" reads by the key and "comba" by a separate read, both after the decay;
    "decayed" and "old" are general corrections of rank one that read the state after or before the decay. `before`,
    `bonus`, `resets`, `micro`: as in `linear_recurrence`.
    """

    gate: Gate = "none"
    columns: bool = False
    correction: Correction = "none"
    before: bool = False
    bonus: bool = False
    resets: bool = False
    micro: int = 1

    @property
    def is_delta(self) -> bool:
        """Whether the correction is a delta rule."""
        return self.correction in ("delta", "comba")

    @property
    def is_rank_one(self) -> bool:
        """Whether the correction is a general one of rank one."""
        return self.correction in ("decayed", "old")

    @property
    def is_corrected(self) -> bool:
        """Whether there is a correction."""
        return self.correction != "none"

    @property
    def is_split(self) -> bool:
        """Whether row gradients need two kernels, one per reader, because both do not fit into registers."""
        return self.is_rank_one and self.gate == "rows"

    @property
    def has_vector_gate(self) -> bool:
        """Whether one gate per step or per head holds for all rows."""
        return self.gate in ("constant", "scalar")

    @property
    def has_total(self) -> bool:
        """Whether a chunk decays or resets the state: by a factor per row, or one for all rows."""
        return self.gate != "none" or self.resets

    @property
    def can_walk(self) -> bool:
        """Whether a single kernel can walk the chunks and compute the outputs.

        With column decay it would need a sweep over levels for each chunk, beside the state. There the states before
        chunks are stored, and a separate kernel computes the outputs.
        """
        return not self.columns

    @property
    def can_fuse(self) -> bool:
        """Whether the walking kernel needs no prepared rows: decay factors are vectors, and no triangle is solved.

        A bonus is a sum over three tiles of rows, for which no registers are left beside the state.
        """
        is_simple = self.can_walk and not self.is_corrected and not self.bonus
        return is_simple and self.gate != "rows" and self.micro == 1

    @property
    def has_weights(self) -> bool:
        """Whether the weights of pairs differ between chunks, with one gate for all rows."""
        return self.gate == "scalar" or self.resets

    @property
    def readers(self) -> tuple[str, ...]:
        """The names of the readers, the query first."""
        return ("q", *({"none": (), "delta": ("k",)}.get(self.correction, ("read",))))

    @property
    def writers(self) -> tuple[str, ...]:
        """The names of the writers, the correction's left side last."""
        return ("k", "left") if self.is_rank_one else ("k",)

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the values that writers write."""
        return {"none": ("v",), "decayed": ("v", "p"), "old": ("v", "p")}.get(self.correction, ("p",))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors of readers and writers, without repetition."""
        return tuple(dict.fromkeys((*self.readers, *self.writers)))

    @property
    def exclusive(self) -> tuple[bool, ...]:
        """For each reader, whether it reads the state before its own step's decay."""
        return (self.before, self.correction == "old")[: len(self.readers)]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All pairs of a reader and a writer, by index."""
        return tuple((i, w) for i in range(len(self.readers)) for w in range(len(self.writers)))

    def pair_name(self, reader: int, writer: int) -> str:
        """Return the name of the pair matrix of a reader and a writer."""
        return f"{self.readers[reader]}_{self.writers[writer]}_pairs"

    @property
    def triangle(self) -> str:
        """The name of the pair matrix that the correction inverts."""
        return self.pair_name(1, len(self.writers) - 1)

    @property
    def slug(self) -> str:
        """The class as a part of kernel names."""
        words = {
            self.gate: self.gate != "none",
            "columns": self.columns,
            self.correction: self.is_corrected,
            "before": self.before,
            "bonus": self.bonus,
            "resets": self.resets,
            f"micro{self.micro}": self.micro > 1,
        }
        return "_".join(word for word, applies in words.items() if applies) or "plain"

    def __str__(self) -> str:
        return self.slug.replace("_", " ")


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
        return self.length // self.form.micro

    @property
    def used(self) -> int:
        """The number of rows of a chunk that hold steps; the rest is padding."""
        return self.per_chunk * self.form.micro

    @property
    def read_at(self) -> int:
        """The index of the step, within a token, whose row holds the query."""
        return 0 if self.form.before else self.form.micro - 1

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
