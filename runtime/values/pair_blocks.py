"""Blocks of query-key pairs, the operands of one call, and the loops around a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.rewrite import variables
from attnc.compiler.lowering.specialise import CallSizes, Slices, Window
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
PairMask = NDArray[np.bool_]


@dataclass(frozen=True)
class Operands:
    """The operands of one call: per batch entry q (Hq, Nq, dk), k (Hkv, Nk, dk), v (Hkv, Nk, dv); inputs and sizes.

    Values are computed in `dtype`. `spaced`: the keys of a row are selected entries, not tokens. `exponents`:
    exponentials keep a separate exponent, so that quotients of large exponentials stay finite. `looks_up`: inner
    products with vectors that pairs select from a real input may be computed once per vector and gathered.
    `entry_heads`: the number of query heads per batch entry, where q, k and v of a block hold several batch entries,
    beginning with the block's, folded into the heads; None where a block holds one entry. `masks`: the bool tensors
    whose shapes alone `slices` knows, by name.
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
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    specialised: dict[object, ir.Index] = field(default_factory=dict, compare=False)
    """Cache of exact expressions, specialised to a window, a batch entry and a head."""
    tables: dict[object, object] = field(default_factory=dict, compare=False)
    """Results of reductions by value of the variable that they depend on, for all blocks; see `values.tabulated`."""

    @property
    def group(self) -> int:
        """The number of query heads per kv head."""
        return max(self.q[0].shape[0] // max(self.k[0].shape[0], 1), 1)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.q[0].device


@dataclass(frozen=True)
class PairBlock:
    """Local rows and keys of a window of one batch entry, over some heads.

    `active`: the pairs whose values are used, bool (heads or 1, rows, keys). `running`: the rows are positions that a
    variable runs over. `visible`: the visible pairs, where the block holds all keys that are visible to its rows.
    """

    batch: int
    heads: tuple[int, ...]
    window: Window
    rows: Int64
    keys: Int64
    active: PairMask
    running: bool = False
    visible: PairMask | None = None

    @property
    def index_window(self) -> Window:
        """The window; its shift from rows to positions is 0 where the rows are positions already."""
        return replace(self.window, shift=0) if self.running else self.window


@dataclass(frozen=True)
class Loops:
    """Loop variables and their values: arrays (…, heads, rows, keys) with one leading dimension per loop.

    A dimension that a value does not depend on has size 1.
    """

    values: Mapping[ir.Var, Int64]
    depth: int

    def of(self, node: ir.Value | ir.Index) -> dict[ir.Var, Int64]:
        """Return the variables that a node reads, with their values."""
        if not self.values:
            return {}
        free = variables(cast("ir.Index", node))
        return {variable: value for variable, value in self.values.items() if variable in free}

    def inside(self, variable: ir.Var, values: Int64) -> Loops:
        """Return the loops with one more innermost loop, whose dimension is the first."""
        return Loops({**{v: x[None] for v, x in self.values.items()}, variable: values}, self.depth + 1)


NO_LOOPS = Loops({}, 0)
