"""The problem that kernels of a linear recurrence are emitted for: its class, the head widths, the chunk.

Of a token with a state S (R, C):   S ← D S;   S ← S + u (rᵀ S);   S ← S + k vᵀ;   o = qᵀ S

Readers are rows that read the state: the query, and the correction's read. Writers are rows that it is written by: the
key, and the correction's left side. Values are what writers write: v, and the rows p that the correction solves for. In
a chunk that starts with the state S, A the pairs of readers and writers under the decays between them, T the inverse of
a triangle:

    o = q_in S + Σ A_q,writer values        S′ = total ⊙ S + Σ writer_outᵀ values        p = U + W S
    delta rule:   p = T (β v - β r_in S),          T = (1 + β A_r,k)⁻¹
    rank one:     p = T (A_r,k v + r_in S),        T = (1 - A_r,u)⁻¹
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler.kernels.kernel_source import TYPES, VECTOR
from attnc.compiler.kernels.targets import Target
from attnc.compiler.simulation.gpu_clocks import BYTES

Gate = Literal["none", "constant", "scalar", "rows"]
Correction = Literal["none", "delta", "comba", "decayed", "old"]
LEAST = 16
"""The shortest side of a product."""


@dataclass(frozen=True, slots=True)
class RecurrenceClass:
    """The class of a recurrence: all that its kernels' texts depend on but sizes.

    `gate`: none, one for a head at all steps, one for a step, or one for each of the state's rows; `columns`: one for
    each of its columns. `correction`: "delta" reads by the key and "comba" by a read of its own, both after the decay;
    "decayed" and "old" are any of rank one, of the state after or before the decay. `before`, `bonus`, `resets`,
    `micro` as in `linear_recurrence`.
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
        """Whether the correction is a delta rule's."""
        return self.correction in ("delta", "comba")

    @property
    def is_rank_one(self) -> bool:
        """Whether the correction is any of rank one."""
        return self.correction in ("decayed", "old")

    @property
    def is_corrected(self) -> bool:
        """Whether there is a correction."""
        return self.correction != "none"

    @property
    def is_split(self) -> bool:
        """Whether gradients along rows take two kernels, one for each reader: both at once are too much."""
        return self.is_rank_one and self.gate == "rows"

    @property
    def has_vector_gate(self) -> bool:
        """Whether a step, or a head, has one gate for all rows."""
        return self.gate in ("constant", "scalar")

    @property
    def has_total(self) -> bool:
        """Whether a chunk leaves less of a state: a factor for each of its rows, or one for all."""
        return self.gate != "none" or self.resets

    @property
    def can_walk(self) -> bool:
        """Whether one kernel walks and gives the outputs too. Where columns decay it would have a sweep over levels in
        each of its turns, beside the state: there states before chunks are stored, and read by a kernel of their own.
        """
        return not self.columns

    @property
    def can_fuse(self) -> bool:
        """Whether that kernel could do without prepared rows: factors of decays are vectors, no triangle is solved.

        A bonus is a sum over three tiles of rows, which no registers are left for beside the state.
        """
        whole = self.can_walk and not self.is_corrected and not self.bonus
        return whole and self.gate != "rows" and self.micro == 1

    @property
    def has_weights(self) -> bool:
        """Whether one gate for all rows weighs the pairs of each chunk otherwise."""
        return self.gate == "scalar" or self.resets

    @property
    def readers(self) -> tuple[str, ...]:
        """Rows that read the state, the query first."""
        return ("q", *({"none": (), "delta": ("k",)}.get(self.correction, ("read",))))

    @property
    def writers(self) -> tuple[str, ...]:
        """Rows that the state is written by; a correction's is the last."""
        return ("k", "left") if self.is_rank_one else ("k",)

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the values that writers write."""
        return {"none": ("v",), "decayed": ("v", "p"), "old": ("v", "p")}.get(self.correction, ("p",))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The rows of steps that are read, each once."""
        return tuple(dict.fromkeys((*self.readers, *self.writers)))

    @property
    def exclusive(self) -> tuple[bool, ...]:
        """The readers' flags: True where a reader sees the state before its own step's decay."""
        return (self.before, self.correction == "old")[: len(self.readers)]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Readers and writers, by their numbers."""
        return tuple((i, w) for i in range(len(self.readers)) for w in range(len(self.writers)))

    def pair_name(self, reader: int, writer: int) -> str:
        """Return the name of the pair matrix of a reader and a writer."""
        return f"{self.readers[reader]}_{self.writers[writer]}_pairs"

    @property
    def triangle(self) -> str:
        """The name of the pair matrix that is solved."""
        return self.pair_name(1, len(self.writers) - 1)

    @property
    def slug(self) -> str:
        """The class as part of a name."""
        words = {
            self.gate: self.gate != "none",
            "columns": self.columns,
            self.correction: self.is_corrected,
            "before": self.before,
            "bonus": self.bonus,
            "resets": self.resets,
            f"micro{self.micro}": self.micro > 1,
        }
        return "_".join(word for word, said in words.items() if said) or "plain"

    def __str__(self) -> str:
        return self.slug.replace("_", " ")


@dataclass(frozen=True, slots=True)
class RecurrenceProblem:
    """A class, heads of `dk` and `dv`, and chunks of `length` rows, a power of two from 16; products are of `dtype`."""

    form: RecurrenceClass
    dk: int
    dv: int
    dtype: str
    length: int
    target: Target

    @property
    def wk(self) -> int:
        """The width of rows of the state in scratch, a power of two; what is past `dk` is 0."""
        return padded(self.dk)

    @property
    def wv(self) -> int:
        """The width of columns of the state in scratch, a power of two; what is past `dv` is 0."""
        return padded(self.dv)

    @property
    def can_walk(self) -> bool:
        """Whether one kernel walks and gives the outputs too: of numbers of 16 bits, and of heads that registers hold.

        Products of fp32 are three of TF32 each: with tiles of pairs and outputs beside the state their parts are
        spilled on every target, whatever the blocks.
        """
        return self.form.can_walk and not self.is_exact and self.wk <= 256

    @property
    def can_fuse(self) -> bool:
        """Whether that kernel needs no prepared rows."""
        return self.can_walk and self.form.can_fuse and self.wk <= 128

    @property
    def segment_width(self) -> int:
        """Columns of what a segment of the sequence makes of states: with a correction its matrix stands beside."""
        return self.wv + (self.wk if self.form.is_corrected else 0)

    @property
    def per_chunk(self) -> int:
        """Tokens of a chunk."""
        return self.length // self.form.micro

    @property
    def used(self) -> int:
        """Rows of a chunk that steps stand at."""
        return self.per_chunk * self.form.micro

    @property
    def read_at(self) -> int:
        """The step of a token at which its query stands."""
        return 0 if self.form.before else self.form.micro - 1

    @property
    def operand(self) -> str:
        """Triton's name of the dtype of products."""
        return TYPES[self.dtype]

    @property
    def is_exact(self) -> bool:
        """Whether inputs have 32 bits."""
        return self.dtype == "float32"

    @property
    def vector(self) -> int:
        """Numbers of the inputs in 16 bytes."""
        return VECTOR // BYTES[self.dtype]

    @property
    def exact(self) -> str:
        """Triton's name for fp32 products that are exact to fp32."""
        return "tf32x3" if self.target.maker == "nvidia" else "ieee"

    @property
    def exact_precision(self) -> str:
        """How products of fp32 are asked for that must be right to fp32."""
        return f', input_precision="{self.exact}"'

    @property
    def sum_precision(self) -> str:
        """How sums of fp32 are asked for that are products with a matrix of 0 and 1: as exact as the inputs are."""
        if self.target.maker == "nvidia" and not self.is_exact:
            return ', input_precision="tf32"'
        return self.exact_precision

    def dot(self, left: str, right: str, added: str = "") -> str:
        """A product of operands, of the inputs' dtype; `added` to it."""
        more = f", {added}" if added else ""
        return f"tl.dot({left}, {right}{more}{self.exact_precision if self.is_exact else ''})"

    def rounded(self, x: str) -> str:
        """fp32 as an operand."""
        return x if self.is_exact else f"{x}.to({TRITON_TYPES[self.dtype]})"


TRITON_TYPES = {"float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16"}


def padded(width: int) -> int:
    """The next power of two, at least 16."""
    return max(LEAST, 1 << (width - 1).bit_length())
