"""What rows choose: their scores over blocks of rows, ranked; a truth tensor by batch entry, heads, row, place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.value_nodes import rank, ranking, reads
from attnc.runtime.asking import surely_all
from attnc.runtime.block_values import BlockValues
from attnc.runtime.device_constants import on_device
from attnc.runtime.folded import entries_at_once, folded, folded_heads
from attnc.runtime.masked_reductions import NEUTRAL
from attnc.runtime.pair_blocks import Operands, PairBlock, PairMask
from attnc.runtime.selections.few import are_few, few, scored, scores_candidates
from attnc.runtime.selections.head_sums import head_sums, of_one_head, summed
from attnc.runtime.selections.ranking import kept
from attnc.runtime.selections.score_limits import AT_ONCE, ON_DEVICE
from attnc.runtime.tensor_checks import TensorSizes, number


@dataclass(frozen=True)
class Choosing:
    """One selection of one call; `operands` carry no gradients."""

    selection: ir.Selection
    relations: Relations
    sizes: TensorSizes
    operands: Operands
    device: torch.device

    def choose(self) -> Tensor:
        """What is chosen: bool (batch, deciding heads if they differ, rows, places).

        Raises EvaluationError where an exact part faults.
        """
        if not _has_quotients(self.selection.score):
            return replace(self, operands=replace(self.operands, exponents=False))._choose()
        return self._choose()

    def _choose(self) -> Tensor:
        found = [self._of_entries(entries) for entries in self._cut()]
        dims = self.selection.given.dims
        if not found:
            heads = [self.sizes.heads] if "head" in dims else [self.sizes.kv_heads] if "kv_head" in dims else []
            return torch.zeros((0, *heads, self._rows, self.places), dtype=torch.bool, device=self.device)
        whole = torch.cat(found)
        return whole if self.selection.by_heads is not None else whole[:, 0]

    def _cut(self) -> Iterator[range]:
        """The batch entries that choose at once: those whose rows fit one block."""
        summed_ = any(True for _ in head_sums(self.selection.score))
        scores = self._rows * self.places * (self.sizes.heads if summed_ else len(self._heads))
        scores *= _width(self.selection.score, self.operands)
        vectors = max(self.sizes.n_q, self.sizes.n_k) * self.sizes.heads * max(self._head_dim, 1)
        return entries_at_once(self.sizes.batch, max(scores, vectors), self._most)

    @property
    def _most(self) -> int:
        """Scores that are computed at once."""
        return AT_ONCE if self.device.type == "cpu" else ON_DEVICE

    @property
    def _head_dim(self) -> int:
        return max((x[0].shape[-1] for x in (self.operands.q, self.operands.v) if len(x)), default=0)

    @property
    def _named(self) -> Mapping[str, int]:
        return self.relations.shape.sizes

    @property
    def _rows(self) -> int:
        rows = self.selection.rows
        return self.sizes.n_q if rows is None else max(number(rows, self.sizes, self._named), 0)

    @property
    def places(self) -> int:
        """How many there are."""
        items = self.selection.items
        return self.sizes.n_k if items is None else max(number(items, self.sizes, self._named), 0)

    @property
    def _heads(self) -> tuple[int, ...]:
        """One query head for each that decides."""
        match self.selection.by_heads:
            case "head":
                return tuple(range(self.sizes.heads))
            case "kv_head":
                return tuple(range(0, self.sizes.heads, self.operands.group))
            case _:
                return (0,)[: self.sizes.heads]

    def _of_entries(self, entries: range) -> Tensor:
        """Return the choice of some batch entries, bool (entries, deciding heads, rows, places)."""
        (window,) = self.relations.windows(entries.start)
        rows, places, deciding = self._rows, self.places, len(self._heads)
        if not (rows and places and deciding):
            return torch.zeros((len(entries), deciding, rows, places), dtype=torch.bool, device=self.device)
        own = replace(self, operands=folded(self.operands, entries))
        heads, all_heads = (folded_heads(x, entries, self.sizes.heads) for x in (self._heads, range(self.sizes.heads)))
        found = own._of_heads(entries.start, window, heads, all_heads)
        return torch.unflatten(found, 0, (len(entries), deciding))

    def _of_heads(self, batch: int, window: Window, heads: tuple[int, ...], all_heads: tuple[int, ...]) -> Tensor:
        """Compute the choice of some heads, bool (heads, rows, places), in blocks of rows."""
        rows, places = self._rows, self.places
        hoisted = self._hoisted(batch, window, heads)
        sums = list(head_sums(self.selection.score))
        terms = [of_one_head(node) for node, _ in sums]
        own = [self._hoisted(batch, window, all_heads, term) for _, term in terms]
        wide = len(all_heads) if sums else len(heads)
        most = self._most // _width(self.selection.score, self.operands)
        step = rows if self.selection.pairs else max(most // (places * wide), 1)
        entries = len(all_heads) // max(self.sizes.heads, 1)
        parts = []
        for start in range(0, rows, step):
            block = self._block(batch, window, heads, start, min(start + step, rows))
            known = dict(hoisted)
            for (node, over), (condition, term), constants in zip(sums, terms, own, strict=True):
                found = self._terms(replace(block, heads=all_heads), node, condition, term, constants)
                known[node] = summed(node, over, found, self.operands.group, len(heads), entries)
            parts.append(self._of_rows(block, known))
        return torch.cat(parts, 1)

    def _block(self, batch: int, window: Window, heads: tuple[int, ...], start: int, stop: int) -> PairBlock:
        """Some of the rows, with all places."""
        numbers, places = np.arange(start, stop), np.arange(self.places)
        alive = np.ones((1, len(numbers), len(places)), dtype=np.bool_)
        return PairBlock(batch, heads, window, numbers, places, alive, running=self.selection.rows is not None)

    def _of_rows(self, block: PairBlock, known: Mapping[ir.Value, Tensor]) -> Tensor:
        """What some rows choose: (heads, rows, places)."""
        selection = self.selection
        shape = (len(block.heads), len(block.rows), len(block.keys))
        whole = BlockValues(self.operands, block)
        holds = whole.holds(selection.candidates)
        candidates = np.broadcast_to(holds, (holds.shape[0], *shape[1:]))
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

    def _with_always(self, whole: BlockValues, found: Tensor) -> Tensor:
        """What is kept, and what is taken besides."""
        always = self.selection.always
        if isinstance(always, ir.Truth) and not always.value:
            return found
        return found | on_device(whole.holds(always), found.device)

    def _entries_apart(self, block: PairBlock, candidates: PairMask) -> list[PairBlock]:
        """The block, or one for each batch entry where some have few candidates and others many."""
        size, lanes = len(self._heads), len(block.heads)
        if len(candidates) < lanes or len({are_few(candidates[i : i + size]) for i in range(0, lanes, size)}) == 1:
            return [block]
        return [replace(block, heads=block.heads[i : i + size]) for i in range(0, len(block.heads), size)]

    def _of_few(self, block: PairBlock, candidates: PairMask) -> Tensor | None:
        """Return what rows keep of few candidates, scoring these alone; None where there are many candidates."""
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

    def _keeps(self, block: PairBlock, given: Mapping[str, Tensor]) -> Tensor:
        """Where `keep` holds, of ranks, masses and scores (heads, rows, places) in fp64."""
        nodes = {ranking(name): x for name, x in given.items()}  # type: ignore[arg-type]  # they are its names
        values = BlockValues(replace(self.operands, dtype=torch.float64), block, precomputed=nodes)
        return values.of(self.selection.keep) != 0

    def _terms(
        self,
        block: PairBlock,
        node: ir.ValueReduce,
        condition: ir.Index,
        term: ir.Value,
        known: Mapping[ir.Value, Tensor],
    ) -> Tensor:
        """The terms of a sum over heads, of every query head: (Hq, rows, places), of vectors as far as they differ."""
        shape = (len(block.heads), len(block.rows), len(block.keys))
        values, holds = BlockValues(self.operands, block, precomputed=known).where(condition)
        found = values.of(term)
        found = found.expand(shape[0], *found.shape[1:]) if rank(term) else found.expand(shape)
        if surely_all(holds):
            return found
        return torch.where(holds.reshape(*holds.shape, *[1] * rank(term)), found, NEUTRAL[node.op])

    def _hoisted(
        self, batch: int, window: Window, heads: tuple[int, ...], root: ir.Value | None = None
    ) -> dict[ir.Value, Tensor]:
        """What of the score, or of a part of it, depends on no row, computed for all places at once."""
        nodes = list(_free_of_rows(self.selection.score if root is None else root))
        if not nodes:
            return {}
        block = self._block(batch, window, heads, 0, 1)
        values = BlockValues(self.operands, block)
        return {node: values.of(node) for node in nodes}


def _width(root: ir.Value, operands: Operands) -> int:
    """How many numbers there are for a score: the vector's, where each row and place has one of its own."""
    vectors = (node for node in root.below if isinstance(node, ir.Vec) and {"q", "k"} <= reads(node.at))
    return max(operands.q[0].shape[-1], 1) if any(vectors) else 1


def _has_quotients(root: ir.Value) -> bool:
    """Whether exponentials are divided, or their logarithm taken."""
    over = (node for node in root.below if isinstance(node, ir.Apply) and node.op in ("div", "share", "log"))
    return any(isinstance(below, ir.Apply) and below.op == "exp" for node in over for below in node.below)


def _free_of_rows(root: ir.Value) -> Iterator[ir.Value]:
    """The outermost aggregates in a value, outside of others, that depend on no row."""
    seen = set[object]()
    pending: list[object] = [root]
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, ir.VALUES):
            continue
        seen.add(node)
        free = "q" not in reads(node) and not any(isinstance(b, ir.Ranking | ir.VisibleReduce) for b in node.below)
        if free and any(isinstance(below, ir.ValueReduce) for below in node.below):
            yield node
        elif not isinstance(node, ir.ValueReduce | ir.VisibleReduce):
            pending.extend(node.children())


__all__ = ["Choosing"]
