"""Blocks of pairs, and what values over them are computed from: the operands of one call, loops around the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import CallSizes, Slices, Window
from attnc.compiler.rewrite import variables
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Alive = NDArray[np.bool_]


@dataclass(frozen=True)
class Operands:
    """One call: of each batch entry q (Hq, Nq, dk), k (Hkv, Nk, dk), v (Hkv, Nk, dv); real inputs, sizes, int inputs.

    Values are computed in `dtype`. `spaced`: the keys of a row are no tokens. `exponents`: exponentials keep theirs, so
    that quotients of large ones have a value. `looks_up`: inner products with vectors that pairs choose from a real
    input may be computed for all of its vectors, and looked up. `entry_heads`: q, k and v of a block hold several batch
    entries, from the block's own on, as heads one after another, each entry with so many query heads; None for one.
    """

    q: Sequence[Tensor]
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    inputs: Mapping[str, Tensor]
    sizes: CallSizes
    slices: Slices
    scale: float
    dtype: torch.dtype
    origins: Mapping[ir.Index, Span]
    spaced: bool = False
    exponents: bool = True
    looks_up: bool = False
    entry_heads: int | None = None
    specialised: dict[object, ir.Index] = field(default_factory=dict, compare=False)
    """Exact parts as they are for a window of a batch entry, and a head."""

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return max(self.q[0].shape[0] // max(self.k[0].shape[0], 1), 1)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.q[0].device


@dataclass(frozen=True)
class PairBlock:
    """Local rows and keys of a window of one batch entry, over some heads; `alive`: which pairs are asked for.

    `alive` is bool (heads or 1, rows, keys). `running`: rows are positions that a variable runs over. `seen`: the pairs
    that are visible, where the block has all keys that its rows see.
    """

    batch: int
    heads: tuple[int, ...]
    window: Window
    rows: Int64
    keys: Int64
    alive: Alive
    running: bool = False
    seen: Alive | None = None

    @property
    def place(self) -> Window:
        """The window, without the shift that makes positions of rows where they are that already."""
        return replace(self.window, shift=0) if self.running else self.window


@dataclass(frozen=True)
class Loops:
    """Variables with their values: arrays with as many dimensions in front as there are loops, (…, heads, rows, keys).

    Where a value does not depend on a dimension, that has size 1.
    """

    values: Mapping[ir.Var, Int64]
    depth: int

    def of(self, node: ir.Value | ir.Index) -> dict[ir.Var, Int64]:
        """The variables that a node reads."""
        if not self.values:
            return {}
        free = variables(cast("ir.Index", node))
        return {variable: value for variable, value in self.values.items() if variable in free}

    def inside(self, variable: ir.Var, values: Int64) -> Loops:
        """With one more, in front."""
        return Loops({**{v: x[None] for v, x in self.values.items()}, variable: values}, self.depth + 1)


NO_LOOPS = Loops({}, 0)
