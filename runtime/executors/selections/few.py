"""Scores of a short list of candidates per row, where an earlier selection leaves each row few blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import renamed
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.passes.attentions import content_masks
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import (
    NO_LOOPS,
    Int64,
    Operands,
    PairBlock,
    PairMask,
)

_PLACE = ir.intern(ir.Var("a place", 0))


class Few(NamedTuple):
    """The candidates of each row by block number, (heads or 1, rows, candidates); `there` masks padding."""

    places: Int64
    there: PairMask


def scores_candidates(item: ir.Selection) -> bool:
    """Check whether an earlier selection limits the candidates and each score depends on its own candidate alone."""
    reductions = [node for node in item.score.below if isinstance(node, ir.VisibleReduce)]
    keeps = [node for node in item.keep.below if isinstance(node, ir.VisibleReduce) or "k" in reads(node)]
    reads_selection = any(tensor.kind == "bool" for tensor in content_masks([item.candidates]))
    return (
        reads_selection
        and not item.pairs
        and not reductions
        and not [x for x in keeps if not isinstance(x, ir.Ranking)]
    )


def are_few(candidates: PairMask) -> bool:
    """Check whether at most half of the blocks of every row are candidates (heads or 1, rows, blocks)."""
    return bool(2 * int(candidates.sum(-1).max(initial=0)) <= candidates.shape[-1])


def few(candidates: PairMask) -> Few | None:
    """List the candidates (heads or 1, rows, blocks); None if they are more than half of the blocks of some row."""
    if not are_few(candidates):
        return None
    row_max, block_count = int(candidates.sum(-1).max(initial=0)), candidates.shape[-1]
    listed = np.full((*candidates.shape[:-1], row_max), block_count)
    number = np.cumsum(candidates, -1) - 1
    heads, rows, place = np.nonzero(candidates)
    listed[heads, rows, number[candidates]] = place
    return Few(listed, listed < block_count)


def scored(operands: Operands, block: PairBlock, score: ir.Value, candidates: Few) -> Tensor:
    """Compute the scores of listed candidates, (heads, rows, candidates); scores of padding are arbitrary."""
    front = np.moveaxis(np.where(candidates.there, candidates.places, 0), -1, 0)[..., None]
    active = np.moveaxis(candidates.there, -1, 0)[..., None]
    listed_block = PairBlock(
        block.batch, block.heads, block.window, block.rows, np.zeros(1, np.int64), active, block.running
    )
    values = BlockValues(operands, listed_block, loops=NO_LOOPS.inside(_PLACE, front))
    scores = values.of(renamed(score, fold.place("k"), _PLACE))
    shape = (front.shape[0], len(block.heads), len(block.rows), 1)
    return scores.expand(shape)[..., 0].movedim(0, -1)


__all__ = ["Few", "are_few", "few", "scored", "scores_candidates"]
