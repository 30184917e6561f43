"""The class of a linear recurrence: how its state decays, and which vectors read and write it.

A token updates the state S (R, C) in steps and reads it:   S ← D S;   S ← S + u (rᵀ S);   S ← S + k vᵀ;   o = qᵀ S

The planner, the chunk forms of torch, the kernels and the simulation all ask this class what a recurrence has.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

Gate = Literal["none", "constant", "scalar", "rows"]
Corrected = Literal["none", "delta", "comba", "decayed", "old"]

ONCE_A_TOKEN = frozenset({"q", "out"})
"""Tensors with one row per token, not one per step."""


@dataclass(frozen=True, slots=True)
class RecurrenceClass:
    """The class of a linear recurrence: everything that its chunk forms and kernels depend on, except sizes.

    `gate`: none, one per head at all steps, one per step, or one per row of the state; `columns`: whether there is a
    gate per column. `correction`: "delta" reads by the key and "comba" by a separate read, both after the decay;
    "decayed" and "old" are general corrections of rank one that read the state after or before the decay. `before`:
    outputs read the state before their token. `resets`: states may start anew. `micro`: the steps of a token.
    """

    gate: Gate = "none"
    columns: bool = False
    correction: Corrected = "none"
    before: bool = False
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
        """Whether the walking kernel needs no prepared rows: decay factors are vectors, and no triangle is solved."""
        return self.can_walk and not self.is_corrected and self.gate != "rows" and self.micro == 1

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
    def read_at(self) -> int:
        """The index of the step, within a token, whose row holds the query."""
        return 0 if self.before else self.micro - 1

    def per_chunk(self, length: int) -> int:
        """Return the number of tokens of a chunk of `length` rows, at least 1."""
        return max(length // self.micro, 1)

    def chunks(self, tokens: int, length: int) -> int:
        """Return the number of chunks of `length` rows of a sequence of `tokens` tokens."""
        return ceil(tokens / self.per_chunk(length))

    @property
    def slug(self) -> str:
        """The class as a part of kernel names."""
        words = {
            self.gate: self.gate != "none",
            "columns": self.columns,
            self.correction: self.is_corrected,
            "before": self.before,
            "resets": self.resets,
            f"micro{self.micro}": self.micro > 1,
        }
        return "_".join(word for word, applies in words.items() if applies) or "plain"

    def __str__(self) -> str:
        return self.slug.replace("_", " ")
