"""The scores of a call on the cpu, tile by tile: whole, or as the bias that the kernel takes as its mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.analysis.translation import is_difference
from attnc.compiler.ir import Value
from attnc.compiler.ir.derivatives import derivatives
from attnc.compiler.ir.value_nodes import Additive, additive, extra_of, reads
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu.plan_tiles import PlanTile
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import Operands, PairBlock

Pairs: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Tensors that autograd has recorded, with their gradients."""

Pull: TypeAlias = Callable[[Tensor], Pairs]


@dataclass(frozen=True)
class _TileWindow:
    """The rows and keys of a tile that are in one window, by their numbers in the tile."""

    block: PairBlock
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]

    def all_rows(self, tile: PlanTile) -> bool:
        return len(self.rows) == len(tile.rows)

    def all_keys(self, tile: PlanTile) -> bool:
        return len(self.keys) == len(tile.keys)

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """Indices of the part in the rows and keys of the tile."""
        return torch.from_numpy(self.rows)[:, None], torch.from_numpy(self.keys)[None]

    def of(self, change: Tensor, tile: PlanTile) -> Tensor:
        """Return the part of a tile's tensor (heads, rows, keys[, d]) at these rows and keys."""
        return change if self.all_rows(tile) and self.all_keys(tile) else change[:, self.at[0], self.at[1]]


class Scores:
    """The scores of a call, tile by tile."""

    def __init__(self, relations: Relations, operands: Operands) -> None:
        self._operands = operands
        self.node = relations.pattern.attend
        self._additive, self._slides = _form(self.node.score)
        self._windows = [list(relations.windows(b)) for b in range(relations.shape.batch)]

    def of(self, tile: PlanTile, q: Tensor, k: Tensor) -> Tensor:
        """Compute scores (heads, rows, keys) of a tile with vectors q (heads, rows, dk) and k (heads, keys, dk).

        Alternatively both are by pair, (heads, rows, keys, dk). Hidden pairs give -inf.
        """
        shape = len(tile.heads), len(tile.rows), len(tile.keys)
        parts = [(values.of(self.node.score), part) for values, part in self._values(tile, q, k)]
        return _assembled(parts, shape).masked_fill_(torch.from_numpy(~tile.mask), -math.inf)

    def _values(self, tile: PlanTile, q: Tensor, k: Tensor) -> Iterator[tuple[BlockValues, _TileWindow]]:
        """Yield the parts of a tile, with an evaluator of their scores."""
        for part in self._parts(tile):
            rows, keys = (torch.from_numpy(at) for at in (part.rows, part.keys))
            if q.ndim == 4:
                yield BlockValues(self._operands, part.block, {"q": part.of(q, tile), "k": part.of(k, tile)}), part
                continue
            part_vectors = {
                "q": q if part.all_rows(tile) else q[:, rows],
                "k": k if part.all_keys(tile) else k[:, keys],
            }
            yield (
                BlockValues(
                    self._operands, part.block, {"q": part_vectors["q"][:, :, None], "k": part_vectors["k"][:, None]}
                ),
                part,
            )

    def recorded(self, tile: PlanTile, q: Tensor, k: Tensor, shift: Tensor) -> tuple[Tensor, Pull]:
        """Return the scores of `of` minus the shift of their rows, and a function that propagates a change of them.

        A large bias is reduced by the shift first, so that no digits are lost. The function takes changes that are 0 in
        hidden pairs to the tensors that autograd has recorded of q, k and inputs.
        """
        return self._whole(tile, q, k, shift) if self._additive is None else self._product(tile, q, k, shift)

    def _whole(self, tile: PlanTile, q: Tensor, k: Tensor, shift: Tensor) -> tuple[Tensor, Pull]:
        shape = len(tile.heads), len(tile.rows), len(tile.keys)
        with torch.enable_grad():
            parts = list(self._values(tile, q, k))
        pulls = [_recorded(values, self.node.score) for values, _ in parts]
        score = _assembled([(values.of(self.node.score), part) for values, part in parts], shape)
        score = score.masked_fill_(torch.from_numpy(~tile.mask), -math.inf) - shift[..., None]

        def pull(change: Tensor) -> Pairs:
            return [
                pair
                for (_, part), part_pull in zip(parts, pulls, strict=True)
                for pair in part_pull(part.of(change, tile))
            ]

        return score, pull

    def _product(self, tile: PlanTile, q: Tensor, k: Tensor, shift: Tensor) -> tuple[Tensor, Pull]:
        factor = self.factor
        assert factor is not None
        with torch.enable_grad():
            product = q @ k.transpose(-1, -2) if q.ndim == 3 else (q * k).sum(-1)
        bias, pulls = self._bias(tile)
        score = factor * product.detach() + (bias - shift[..., None])

        def pull(change: Tensor) -> Pairs:
            return [(product, factor * change), *(pair for bias_pull in pulls for pair in bias_pull(change))]

        return score, pull

    @cached_property
    def factor(self) -> float | None:
        """The factor of `dot(q, k)` if the rest of the score is a bias, else None."""
        if self._additive is None:
            return None
        anywhere = np.zeros(1, dtype=np.int64)
        block = PairBlock(0, (0,), Window(0, 0, 1, 1, 0), anywhere, anywhere, np.ones((1, 1, 1), dtype=np.bool_))
        return float(BlockValues(self._operands, block).of(self._additive.factor))

    @property
    def has_bias(self) -> bool:
        """Whether the score adds a bias to the multiple of `dot(q, k)`."""
        return self._additive is not None and self._additive.bias is not None

    def bias(self, tile: PlanTile) -> Tensor:
        """Return the bias of a tile, (heads or 1, rows, keys), -inf in hidden pairs."""
        return self._bias(tile, record=False)[0]

    def _bias(self, tile: PlanTile, *, record: bool = True) -> tuple[Tensor, list[Pull]]:
        """Return the bias, and functions that propagate a change of it (heads, rows, keys) to the inputs."""
        assert self._additive is not None
        bias = self._additive.bias
        hidden, shape = torch.from_numpy(~tile.mask), (len(tile.rows), len(tile.keys))
        if bias is None:
            return torch.zeros(shape, dtype=self._operands.dtype).masked_fill_(hidden, -math.inf)[None], []
        heads, parts, pulls = len(tile.heads) if "head" in reads(bias) else 1, [], []
        for part in self._parts(tile):
            slides = self._slides and _is_stretch(part.block.rows) and _is_stretch(part.block.keys)
            block = _diagonal(part.block) if slides else part.block
            values, spread = BlockValues(self._operands, block), partial(_spread, part.block) if slides else None
            if record:
                pulls.append(_pull_of_part(_recorded(values, bias), part, tile, spread, (heads, block)))
            part_bias = values.of(bias).detach()
            parts.append((part_bias if spread is None else spread(part_bias), part))
        return _assembled(parts, (heads, *shape)).masked_fill_(hidden, -math.inf), pulls

    def _parts(self, tile: PlanTile) -> Iterator[_TileWindow]:
        """Yield the parts of a tile by window."""
        for window in self._windows[tile.batch]:
            rows = np.flatnonzero((tile.rows >= window.row) & (tile.rows < window.row + window.n_q))
            keys = np.flatnonzero((tile.keys >= window.key) & (tile.keys < window.key + window.n_k))
            active = tile.mask[np.ix_(rows, keys)]
            if not active.any():
                continue
            window_rows, window_keys = tile.rows[rows] - window.row, tile.keys[keys] - window.key
            yield _TileWindow(
                PairBlock(tile.batch, tile.heads, window, window_rows, window_keys, active[None]), rows, keys
            )

    def extra(self, batch: int, q: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logarithm of the extra logits' sum, (heads, rows), for the rows of each window.

        `q`: the vectors of the batch entry, (heads, rows, dk).
        """
        extra = extra_of(self.node)
        assert extra is not None
        for window in self._windows[batch]:
            rows = np.arange(window.n_q)
            active = np.ones((1, len(rows), 1), dtype=np.bool_)
            block = PairBlock(batch, tuple(range(len(q))), window, rows, np.zeros(1, dtype=np.int64), active)
            row_slice = slice(window.row, window.row + window.n_q)
            logit = BlockValues(self._operands, block, {"q": q[:, row_slice, None]}).logit(extra)
            yield row_slice, logit.expand(len(q), len(rows))


@lru_cache(64)
def _form(score: Value) -> tuple[Additive | None, bool]:
    """Return a score as a multiple of `dot(q, k)` and a bias, and whether the bias depends on `q - k` alone."""
    parts = additive(score)
    return parts, parts is not None and is_difference(parts.bias)


def _recorded(values: BlockValues, node: Value) -> Pull:
    """Return a function that propagates a change of a value (heads, rows, keys) to its recorded atoms."""
    partials = derivatives(node)
    conditions = [values.where(derivative.where) for derivative in partials]
    with torch.enable_grad():
        atoms = [evaluator.of(derivative.atom) for derivative, (evaluator, _) in zip(partials, conditions, strict=True)]

    def pull(change: Tensor) -> Pairs:
        pairs = []
        for derivative, (evaluator, condition), atom in zip(partials, conditions, atoms, strict=True):
            if atom.requires_grad:
                by = evaluator.of(derivative.by).detach()
                active = condition & (change != 0)  # elsewhere `by` may be NaN
                pairs.append((atom, torch.where(active, change * by, 0).sum_to_size(atom.shape)))
        return pairs

    return pull


def _pull_of_part(
    pull: Pull,
    part: _TileWindow,
    tile: PlanTile,
    spread: Callable[[Tensor], Tensor] | None,
    heads_and_block: tuple[int, PairBlock],
) -> Pull:
    """Return a function that propagates a change of the tile to a bias that may have one head or be spread."""
    heads, block = heads_and_block

    def whole(change: Tensor) -> Pairs:
        part_change = part.of(change, tile)
        part_change = part_change if heads == len(part_change) else part_change.sum(0, keepdim=True)
        if spread is None:
            return pull(part_change)
        with torch.enable_grad():  # `spread` is linear: its transpose sums
            line = torch.zeros((heads, len(block.rows), len(block.keys)), dtype=part_change.dtype, requires_grad=True)
            (added,) = torch.autograd.grad(spread(line), line, part_change)
        return pull(added)

    return whole


def _assembled(parts: list[tuple[Tensor, _TileWindow]], shape: tuple[int, int, int]) -> Tensor:
    """Assemble values (heads, rows, keys) of a tile from its parts, 0 elsewhere."""
    if len(parts) == 1:
        value, part = parts[0]
        if (len(part.rows), len(part.keys)) == shape[1:]:
            return value.detach().expand(shape).clone(memory_format=torch.contiguous_format)
    result = torch.zeros(shape, dtype=parts[0][0].dtype)
    for value, part in parts:
        result[:, part.at[0], part.at[1]] = value.detach().expand(shape[0], len(part.rows), len(part.keys))
    return result


def _diagonal(block: PairBlock) -> PairBlock:
    """Return the last row of a block with additional keys, one for every diagonal."""
    further = np.arange(block.keys[0], block.keys[-1] + len(block.rows))
    return replace(block, rows=block.rows[-1:], keys=further, active=_diagonals(block.active[0])[None, None])


def _spread(block: PairBlock, line: Tensor) -> Tensor:
    """Spread values (heads or 1, 1, diagonals) over the block: constant along each diagonal."""
    diagonals = len(block.rows) + len(block.keys) - 1
    return line[:, 0].expand(line.shape[0], diagonals).unfold(1, len(block.keys), 1).flip(1)


def _is_stretch(tokens: NDArray[np.int64]) -> bool:
    return bool(len(tokens)) and int(tokens[-1] - tokens[0]) == len(tokens) - 1


def _diagonals(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which diagonals of a mask hold a true entry, from the lower left corner on."""
    rows, keys = mask.shape
    wide = np.zeros((rows, rows + keys), dtype=np.bool_)
    wide[:, :keys] = mask[::-1]
    return np.asarray(wide.ravel()[: rows * (rows + keys - 1)].reshape(rows, rows + keys - 1).any(axis=0))
