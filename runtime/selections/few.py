"""Scores of candidates alone, where a row has few of them: what an earlier choice left of a row's places, listed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from attnc.compiler import fold, ir
from attnc.compiler.attentions import asked
from attnc.compiler.rewrite import substitute_value
from attnc.compiler.value_nodes import reads
from attnc.runtime.block_values import BlockValues
from attnc.runtime.pair_blocks import NO_LOOPS, Int64, Operands, PairBlock, PairMask

_PLACE = ir.intern(ir.Var("a place", 0))


class Few(NamedTuple):
    """The candidates of each row by number, (heads or 1, rows, most), and which of these there are."""

    places: Int64
    there: PairMask


def scores_candidates(item: ir.Selection) -> bool:
    """Whether an earlier choice tells a selection's candidates, and each one's score depends on nothing but it."""
    own = [node for node in item.score.below if isinstance(node, ir.VisibleReduce)]
    keeps = [node for node in item.keep.below if isinstance(node, ir.VisibleReduce) or "k" in reads(node)]
    chosen = any(tensor.kind == "bool" for tensor in asked([item.candidates]))
    return chosen and not item.pairs and not own and not [x for x in keeps if not isinstance(x, ir.Ranking)]


def are_few(candidates: PairMask) -> bool:
    """Whether at most half of the places of every row are candidates (heads or 1, rows, places)."""
    return bool(2 * int(candidates.sum(-1).max(initial=0)) <= candidates.shape[-1])


def few(candidates: PairMask) -> Few | None:
    """The candidates (heads or 1, rows, places) listed; None where more than half of a row's places are."""
    if not are_few(candidates):
        return None
    most, places = int(candidates.sum(-1).max(initial=0)), candidates.shape[-1]
    listed = np.full((*candidates.shape[:-1], most), places)
    number = np.cumsum(candidates, -1) - 1
    heads, rows, place = np.nonzero(candidates)
    listed[heads, rows, number[candidates]] = place
    return Few(listed, listed < places)


def scored(operands: Operands, block: PairBlock, score: ir.Value, found: Few) -> Tensor:
    """The scores of candidates, (heads, rows, most); of those that are not there any number."""
    front = np.moveaxis(np.where(found.there, found.places, 0), -1, 0)[..., None]
    alive = np.moveaxis(found.there, -1, 0)[..., None]
    here = PairBlock(block.batch, block.heads, block.window, block.rows, np.zeros(1, np.int64), alive, block.running)
    values = BlockValues(operands, here, loops=NO_LOOPS.inside(_PLACE, front))
    own = values.of(substitute_value(score, {fold.place("k"): _PLACE}))
    shape = (front.shape[0], len(block.heads), len(block.rows), 1)
    return own.expand(shape)[..., 0].movedim(0, -1)


__all__ = ["Few", "are_few", "few", "scored", "scores_candidates"]
