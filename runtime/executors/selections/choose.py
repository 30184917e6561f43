"""Selection of blocks: score rows against blocks, rank the scores, and keep the best, as a bool tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import rank, ranking
from attnc.compiler.lowering.specialise import Window
from attnc.runtime.call.asking import surely_all
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.executors.selections.few import (
    are_few,
    few,
    scored,
    scores_candidates,
)
from attnc.runtime.executors.selections.head_sums import HeadSum, summed
from attnc.runtime.executors.selections.prepared import PreparedSelection
from attnc.runtime.executors.selections.ranking import kept
from attnc.runtime.executors.selections.score_limits import AT_ONCE, ON_DEVICE
from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.folded import entries_at_once, folded, folded_heads
from attnc.runtime.values.masked_reductions import NEUTRAL
from attnc.runtime.values.pair_blocks import Operands, PairBlock, PairMask


@dataclass(frozen=True)
class Choosing:
    """One selection of one call; `operands` carry no gradients."""

    prepared: PreparedSelection
    operands: Operands
    device: torch.device

    def choose(self) -> Tensor:
        """Return the selection, bool (batch, deciding heads if they differ, rows, blocks).

        Raises EvaluationError if an exact part is undefined.
        """
        if not self.prepared.has_quotients:
            return replace(self, operands=replace(self.operands, exponents=False))._choose()
        return self._choose()

    def _choose(self) -> Tensor:
        selections = [self._of_entries(entries) for entries in self._cut()]
        dims = self.selection.given.dims
        if not selections:
            heads = [self.sizes.heads] if "head" in dims else [self.sizes.kv_heads] if "kv_head" in dims else []
            return torch.zeros((0, *heads, self._rows, self.places), dtype=torch.bool, device=self.device)
        selection = torch.cat(selections)
        return selection if self.selection.by_heads is not None else selection[:, 0]

    def _cut(self) -> Iterator[range]:
        """Yield the batch entries to compute at once: as many as fit one block of rows."""
        scores = self._rows * self.places * (self.sizes.heads if self.prepared.sums else len(self._heads))
        scores *= self._width
        vectors = max(self.sizes.n_q, self.sizes.n_k) * self.sizes.heads * max(self._head_dim, 1)
        return entries_at_once(self.sizes.batch, max(scores, vectors), self._most)

    @property
    def _most(self) -> int:
        """Maximum number of scores to compute at once."""
        return AT_ONCE if self.device.type == "cpu" else ON_DEVICE

    @property
    def _head_dim(self) -> int:
        return max((x[0].shape[-1] for x in (self.operands.q, self.operands.v) if len(x)), default=0)

    @property
    def selection(self) -> ir.Selection:
        """The selection, with counts of earlier selections as inputs."""
        return self.prepared.item

    @property
    def sizes(self) -> TensorSizes:
        """The sizes of the call."""
        return self.prepared.sizes

    @property
    def _rows(self) -> int:
        return self.prepared.rows

    @property
    def places(self) -> int:
        """Number of blocks (or tokens) among which rows select."""
        return self.prepared.places

    @property
    def _heads(self) -> tuple[int, ...]:
        """The query heads that represent the deciding heads, one for each."""
        match self.selection.by_heads:
            case "head":
                return tuple(range(self.sizes.heads))
            case "kv_head":
                return tuple(range(0, self.sizes.heads, self.operands.group))
            case _:
                return (0,)[: self.sizes.heads]

    def _of_entries(self, entries: range) -> Tensor:
        """Return the selection of some batch entries, bool (entries, deciding heads, rows, blocks)."""
        (window,) = self.prepared.relations.windows(entries.start)
        rows, places, deciding = self._rows, self.places, len(self._heads)
        if not (rows and places and deciding):
            return torch.zeros((len(entries), deciding, rows, places), dtype=torch.bool, device=self.device)
        folded_choice = replace(self, operands=folded(self.operands, entries))
        heads, all_heads = (folded_heads(x, entries, self.sizes.heads) for x in (self._heads, range(self.sizes.heads)))
        selected = folded_choice._of_heads(entries.start, window, heads, all_heads)
        return torch.unflatten(selected, 0, (len(entries), deciding))

    def _of_heads(self, batch: int, window: Window, heads: tuple[int, ...], all_heads: tuple[int, ...]) -> Tensor:
        """Compute the selection of some heads, bool (heads, rows, blocks), in blocks of rows."""
        rows, places = self._rows, self.places
        hoisted = self._hoisted(batch, window, heads, all_heads)
        sums = [head_sum for head_sum in self.prepared.sums if not self._is_of_columns(head_sum)]
        constants = [self._of_columns(batch, window, all_heads, x.free_of_rows) for x in sums]
        wide = len(all_heads) if sums else len(heads)
        max_scores = self._most // self._width
        step = rows if self.selection.pairs else max(max_scores // (places * wide), 1)
        parts = []
        for start in range(0, rows, step):
            block = self._block(batch, window, heads, start, min(start + step, rows))
            parts.append(self._of_rows(block, {**hoisted, **self._summed(block, all_heads, sums, constants)}))
        return torch.cat(parts, 1)

    def _is_of_columns(self, head_sum: HeadSum) -> bool:
        """Check whether a sum over heads is part of a value that depends on no row."""
        of_columns: set[object] = {below for node in self.prepared.free_of_rows for below in node.below}
        return head_sum.node in of_columns

    def _summed(
        self,
        block: PairBlock,
        all_heads: tuple[int, ...],
        sums: Sequence[HeadSum],
        constants: Sequence[Mapping[ir.Value, Tensor]],
    ) -> dict[ir.Value, Tensor]:
        """Compute sums over heads for every row and block; `constants`: parts of their terms computed already."""
        entries, results = len(all_heads) // max(self.sizes.heads, 1), dict[ir.Value, Tensor]()
        for head_sum, known in zip(sums, constants, strict=True):
            terms = self._terms(replace(block, heads=all_heads), head_sum, known)
            results[head_sum.node] = summed(head_sum, terms, self.operands.group, len(block.heads), entries)
        return results

    def _block(self, batch: int, window: Window, heads: tuple[int, ...], start: int, stop: int) -> PairBlock:
        """Return the pair block of rows `start` to `stop` with every selectable block."""
        numbers, blocks = np.arange(start, stop), np.arange(self.places)
        active = np.ones((1, len(numbers), len(blocks)), dtype=np.bool_)
        return PairBlock(batch, heads, window, numbers, blocks, active, running=self.selection.rows is not None)

    def _of_rows(self, block: PairBlock, known: Mapping[ir.Value, Tensor]) -> Tensor:
        """Return the selection of the rows of a pair block, bool (heads, rows, blocks)."""
        selection = self.selection
        shape = (len(block.heads), len(block.rows), len(block.keys))
        whole = BlockValues(self.operands, block)
        holds = whole.holds(selection.candidates)
        candidates = np.broadcast_to(holds, (holds.shape[0], *shape[1:]))
        if not candidates.any():
            return self._with_always(whole, torch.zeros(shape, dtype=torch.bool, device=self.device))
        if not known and self.device.type == "cpu" and scores_candidates(selection):
            apart = self._entries_apart(block, candidates)
            if len(apart) > 1:
                return torch.cat([self._of_rows(part, known) for part in apart])
            found = self._of_few(block, candidates)
            if found is not None:
                return self._with_always(whole, found)
        block = replace(block, active=candidates, visible=candidates)
        values = BlockValues(self.operands, block, precomputed=known)
        score = values.of(selection.score).expand(shape)
        among = on_device(np.array(candidates), score.device)
        found = kept(score, among, selection.keep, lambda given: self._keeps(block, given), pairs=selection.pairs)
        return self._with_always(whole, found)

    def _with_always(self, whole: BlockValues, kept_blocks: Tensor) -> Tensor:
        """Return the kept blocks together with the blocks that are always selected."""
        always = self.selection.always
        if isinstance(always, ir.Truth) and not always.value:
            return kept_blocks
        return kept_blocks | on_device(whole.holds(always), kept_blocks.device)

    def _entries_apart(self, block: PairBlock, candidates: PairMask) -> list[PairBlock]:
        """Return the block, or one per batch entry if some entries have few candidates and others many."""
        size, lanes = len(self._heads), len(block.heads)
        if len(candidates) < lanes or len({are_few(candidates[i : i + size]) for i in range(0, lanes, size)}) == 1:
            return [block]
        return [replace(block, heads=block.heads[i : i + size]) for i in range(0, len(block.heads), size)]

    def _of_few(self, block: PairBlock, candidates: PairMask) -> Tensor | None:
        """Score few candidates alone and return the blocks that rows keep; None if there are many candidates."""
        listed = few(candidates)
        if listed is None:
            return None
        shape = (len(block.heads), len(block.rows), listed.places.shape[-1])
        keep, there = self.selection.keep, np.broadcast_to(listed.there, shape)
        score = scored(self.operands, block, self.selection.score, listed)
        block = replace(block, keys=np.arange(shape[-1]), active=there, visible=there)
        stays = kept(score, torch.tensor(there), keep, lambda given: self._keeps(block, given), pairs=False)
        found = torch.zeros((*shape[:2], self.places + 1), dtype=torch.bool)
        return found.scatter_(-1, torch.tensor(np.broadcast_to(listed.places, shape)), stays)[..., :-1]

    def _keeps(self, block: PairBlock, values_by_name: Mapping[str, Tensor]) -> Tensor:
        """Evaluate `keep` on ranks, masses and scores (heads, rows, blocks), in fp64."""
        nodes = {ranking(name): x for name, x in values_by_name.items()}  # type: ignore[arg-type]  # the names of ir.Ranking
        values = BlockValues(replace(self.operands, dtype=torch.float64), block, precomputed=nodes)
        return values.of(self.selection.keep) != 0

    def _terms(self, block: PairBlock, head_sum: HeadSum, precomputed: Mapping[ir.Value, Tensor]) -> Tensor:
        """Compute the terms of a sum over heads for every query head: (Hq, rows, blocks[, width])."""
        shape, extra = (len(block.heads), len(block.rows), len(block.keys)), rank(head_sum.term)
        values, holds = BlockValues(self.operands, block, precomputed=precomputed).where(head_sum.condition)
        term_values = values.of(head_sum.term)
        term_values = term_values.expand(shape[0], *term_values.shape[1:]) if extra else term_values.expand(shape)
        if surely_all(holds):
            return term_values
        return torch.where(holds.reshape(*holds.shape, *[1] * extra), term_values, NEUTRAL[head_sum.node.op])

    def _hoisted(
        self, batch: int, window: Window, heads: tuple[int, ...], all_heads: tuple[int, ...]
    ) -> dict[ir.Value, Tensor]:
        """Compute the parts of the score that depend on no row, once for all blocks; sums over heads for all heads."""
        sums = [head_sum for head_sum in self.prepared.sums if self._is_of_columns(head_sum)]
        known = self._summed(self._block(batch, window, heads, 0, 1), all_heads, sums, [{}] * len(sums))
        return self._of_columns(batch, window, heads, self.prepared.free_of_rows, known)

    def _of_columns(
        self,
        batch: int,
        window: Window,
        heads: tuple[int, ...],
        nodes: Sequence[ir.Value],
        known: Mapping[ir.Value, Tensor] | None = None,
    ) -> dict[ir.Value, Tensor]:
        """Compute values that depend on no row for every block; `known`: values computed already."""
        if not nodes:
            return {}
        values = BlockValues(self.operands, self._block(batch, window, heads, 0, 1), precomputed=known)
        return {node: values.of(node) for node in nodes}

    @property
    def _width(self) -> int:
        """Elements per score: the head dimension if a vector differs for every row and block, else 1."""
        return max(self.operands.q[0].shape[-1], 1) if self.prepared.reads_vectors_by_pair else 1


__all__ = ["Choosing"]
