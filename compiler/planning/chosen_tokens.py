"""Attention among chosen tokens: queries that were chosen, or keys that were, by a choice that all rows share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.exact import mask_at
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import Bool, HeadIndex, Index, Lookup, Tensor
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.values import reads

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class OneSide:
    """The tokens on one side that row `row` of a truth tensor chose: those whose number `item_of` it holds."""

    chosen: Tensor
    row: Index
    item_of: Index


@dataclass(frozen=True)
class ChosenTokens:
    """A relation that is `rest` among chosen queries and keys; None: all of them."""

    queries: OneSide | None
    keys: OneSide | None
    rest: Index

    @property
    def sides(self) -> tuple[OneSide, ...]:
        """Those that choose."""
        return tuple(side for side in (self.queries, self.keys) if side is not None)

    @property
    def by_head(self) -> bool:
        """Whether each query head chooses by itself."""
        return any("head" in side.chosen.dims for side in self.sides)

    @property
    def by_kv_head(self) -> bool:
        """Whether the heads of each kv head do."""
        return any("kv_head" in side.chosen.dims for side in self.sides)


def chosen_tokens(visible: Index) -> ChosenTokens | None:
    """The relation as one among chosen tokens, where it is one and all else in it depends on positions alone."""
    parts = visible.operands if isinstance(visible, Bool) and visible.op == "and" else (visible,)
    sides: dict[str, OneSide] = {}
    rest = []
    for part in parts:
        side = _side(part)
        if side is None:
            rest.append(part)
            continue
        (place,) = reads(side.item_of)
        if place in sides:
            return None
        sides[place] = side
    others = fold.conjunction(*rest)
    if not sides or any(isinstance(node, Lookup | HeadIndex) for node in others.below):
        return None
    return ChosenTokens(sides.get("q"), sides.get("k"), others)


def _side(part: Index) -> OneSide | None:
    if not (isinstance(part, Lookup) and part.tensor.kind == "bool" and len(part.indices) >= 2):
        return None
    *heads, row, item_of = part.indices
    own = fold.head_index("head")
    of = {"batch": fold.head_index("batch"), "head": own, "kv_head": fold.floordiv(own, fold.extent("group"))}
    if any(of.get(str(dim)) is not index for dim, index in zip(part.tensor.dims, heads, strict=False)):
        return None
    plain = not any(isinstance(node, Lookup | HeadIndex) for index in (row, item_of) for node in index.below)
    return OneSide(part.tensor, row, item_of) if plain and not reads(row) and len(reads(item_of)) == 1 else None


@dataclass(frozen=True, eq=False)
class Rest:
    """The relation among tokens that were chosen, specialised; `diagonal`: the c of `k <= q + c`, if it is that."""

    relation: Index
    diagonal: int | None

    @classmethod
    def of(cls, relation: Index) -> Rest:
        """With its diagonal."""
        return cls(relation, diagonal_shift(relation))

    def seen(self, queries: Int64, keys: Int64) -> NDArray[np.bool_] | None:
        """Who sees whom among some rows and keys, both ascending; None where all see all."""
        if not (len(queries) and len(keys)):
            return np.zeros((len(queries), len(keys)), dtype=np.bool_)
        if self.diagonal is not None:
            if keys[-1] <= queries[0] + self.diagonal:
                return None
            return np.asarray(keys[None] <= queries[:, None] + self.diagonal)
        wide = not fits_word(self.relation, (0, int(queries[-1]) + 1), (0, int(keys[-1]) + 1))
        alive = np.ones((len(queries), len(keys)), dtype=np.bool_)
        found = mask_at(self.relation, queries, keys, alive, {}, wide=wide)
        return None if found.all() else found
