"""The scores of a call on the cpu, tile by tile: whole, or as the bias that the kernel takes for its mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.analysis.translation import is_difference
from attnc.compiler.derivatives import derivatives
from attnc.compiler.ir import Value
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.value_nodes import additive, extra_of, reads
from attnc.runtime.block_values import BlockValues
from attnc.runtime.cpu.plan_tiles import PlanTile
from attnc.runtime.pair_blocks import Operands, PairBlock

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
        """Indices of it in the rows and keys of the tile."""
        return torch.from_numpy(self.rows)[:, None], torch.from_numpy(self.keys)[None]

    def of(self, change: Tensor, tile: PlanTile) -> Tensor:
        """Return the part of a tile's tensor (heads, rows, keys[, d]) at these rows and keys."""
        return change if self.all_rows(tile) and self.all_keys(tile) else change[:, self.at[0], self.at[1]]


class Scores:
    """The scores of a call, tile by tile."""

    def __init__(self, relations: Relations, operands: Operands) -> None:
        self._operands = operands
        self.node = relations.pattern.attend
        self._additive = additive(self.node.score)
        self._slides = self._additive is not None and is_difference(self._additive.bias)
        self._windows = [list(relations.windows(b)) for b in range(relations.shape.batch)]

    def of(self, tile: PlanTile, q: Tensor, k: Tensor) -> Tensor:
        """Scores (heads, rows, keys) of a tile whose vectors are q (heads, rows, dk) and k (heads, keys, dk).

        Or both are by pair, (heads, rows, keys, dk). -inf where nothing is seen.
        """
        shape = len(tile.heads), len(tile.rows), len(tile.keys)
        parts = [(values.of(self.node.score), part) for values, part in self._values(tile, q, k)]
        return _assembled(parts, shape).masked_fill_(torch.from_numpy(~tile.mask), -math.inf)

    def _values(self, tile: PlanTile, q: Tensor, k: Tensor) -> Iterator[tuple[BlockValues, _TileWindow]]:
        """The parts of a tile, with what evaluates scores there."""
        for part in self._parts(tile):
            rows, keys = (torch.from_numpy(at) for at in (part.rows, part.keys))
            if q.ndim == 4:
                yield BlockValues(self._operands, part.block, {"q": part.of(q, tile), "k": part.of(k, tile)}), part
                continue
            own = {"q": q if part.all_rows(tile) else q[:, rows], "k": k if part.all_keys(tile) else k[:, keys]}
            yield BlockValues(self._operands, part.block, {"q": own["q"][:, :, None], "k": own["k"][:, None]}), part

    def recorded(self, tile: PlanTile, q: Tensor, k: Tensor, shift: Tensor) -> tuple[Tensor, Pull]:
        """Scores as `of` gives them less the shift of their rows, which a large bias loses before digits are lost.

        And what pulls a change of them, 0 where nothing is seen, back to what autograd has recorded of q, k and inputs.
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
            return [pair for (_, part), one in zip(parts, pulls, strict=True) for pair in one(part.of(change, tile))]

        return score, pull

    def _product(self, tile: PlanTile, q: Tensor, k: Tensor, shift: Tensor) -> tuple[Tensor, Pull]:
        factor = self.factor
        assert factor is not None
        with torch.enable_grad():
            product = q @ k.transpose(-1, -2) if q.ndim == 3 else (q * k).sum(-1)
        bias, pulls = self._bias(tile)
        score = factor * product.detach() + (bias - shift[..., None])

        def pull(change: Tensor) -> Pairs:
            return [(product, factor * change), *(pair for one in pulls for pair in one(change))]

        return score, pull

    @cached_property
    def factor(self) -> float | None:
        """What `dot(q, k)` is multiplied with where the rest of the score is a bias, else None."""
        if self._additive is None:
            return None
        anywhere = np.zeros(1, dtype=np.int64)
        block = PairBlock(0, (0,), Window(0, 0, 1, 1, 0), anywhere, anywhere, np.ones((1, 1, 1), dtype=np.bool_))
        return float(BlockValues(self._operands, block).of(self._additive.factor))

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the multiple of `dot(q, k)`."""
        return self._additive is not None and self._additive.bias is not None

    def bias(self, tile: PlanTile) -> Tensor:
        """The bias of a tile, (heads or 1, rows, keys), -inf where nothing is seen."""
        return self._bias(tile, record=False)[0]

    def _bias(self, tile: PlanTile, *, record: bool = True) -> tuple[Tensor, list[Pull]]:
        """The bias, and what pulls a change of it (heads, rows, keys) back to the inputs."""
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
            found = values.of(bias).detach()
            parts.append((found if spread is None else spread(found), part))
        return _assembled(parts, (heads, *shape)).masked_fill_(hidden, -math.inf), pulls

    def _parts(self, tile: PlanTile) -> Iterator[_TileWindow]:
        """The parts of a tile by window."""
        for window in self._windows[tile.batch]:
            rows = np.flatnonzero((tile.rows >= window.row) & (tile.rows < window.row + window.n_q))
            keys = np.flatnonzero((tile.keys >= window.key) & (tile.keys < window.key + window.n_k))
            alive = tile.mask[np.ix_(rows, keys)]
            if not alive.any():
                continue
            own_rows, own_keys = tile.rows[rows] - window.row, tile.keys[keys] - window.key
            yield _TileWindow(PairBlock(tile.batch, tile.heads, window, own_rows, own_keys, alive[None]), rows, keys)

    def extra(self, batch: int, q: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The logarithm of what the extra logits add, (heads, rows), for the rows of each window.

        `q` are the vectors of the batch entry, (heads, rows, dk).
        """
        extra = extra_of(self.node)
        assert extra is not None
        for window in self._windows[batch]:
            rows = np.arange(window.n_q)
            alive = np.ones((1, len(rows), 1), dtype=np.bool_)
            block = PairBlock(batch, tuple(range(len(q))), window, rows, np.zeros(1, dtype=np.int64), alive)
            here = slice(window.row, window.row + window.n_q)
            logit = BlockValues(self._operands, block, {"q": q[:, here, None]}).logit(extra)
            yield here, logit.expand(len(q), len(rows))


def _recorded(values: BlockValues, node: Value) -> Pull:
    """What pulls a change of a number (heads, rows, keys) back, by its derivatives; autograd has its atoms alone."""
    found = derivatives(node)
    places = [values.where(derivative.where) for derivative in found]
    with torch.enable_grad():
        atoms = [own.of(derivative.atom) for derivative, (own, _) in zip(found, places, strict=True)]

    def pull(change: Tensor) -> Pairs:
        pairs = []
        for derivative, (own, here), atom in zip(found, places, atoms, strict=True):
            if atom.requires_grad:
                by = own.of(derivative.by).detach()
                asked = here & (change != 0)  # elsewhere it may be no number
                pairs.append((atom, torch.where(asked, change * by, 0).sum_to_size(atom.shape)))
        return pairs

    return pull


def _pull_of_part(
    pull: Pull,
    part: _TileWindow,
    tile: PlanTile,
    spread: Callable[[Tensor], Tensor] | None,
    lanes: tuple[int, PairBlock],
) -> Pull:
    """The same from a change of the tile, of which a bias has perhaps one head, and perhaps was spread."""
    heads, block = lanes

    def whole(change: Tensor) -> Pairs:
        own = part.of(change, tile)
        own = own if heads == len(own) else own.sum(0, keepdim=True)
        if spread is None:
            return pull(own)
        with torch.enable_grad():  # what spreads is linear: its transpose adds up
            line = torch.zeros((heads, len(block.rows), len(block.keys)), dtype=own.dtype, requires_grad=True)
            (added,) = torch.autograd.grad(spread(line), line, own)
        return pull(added)

    return whole


def _assembled(parts: list[tuple[Tensor, _TileWindow]], shape: tuple[int, int, int]) -> Tensor:
    """Numbers (heads, rows, keys) of a tile from those of its parts, 0 elsewhere."""
    if len(parts) == 1:
        value, part = parts[0]
        if (len(part.rows), len(part.keys)) == shape[1:]:
            return value.detach().expand(shape).clone(memory_format=torch.contiguous_format)
    result = torch.zeros(shape, dtype=parts[0][0].dtype)
    for value, part in parts:
        result[:, part.at[0], part.at[1]] = value.detach().expand(shape[0], len(part.rows), len(part.keys))
    return result


def _diagonal(block: PairBlock) -> PairBlock:
    """The last row of a block and further keys, one for every diagonal."""
    further = np.arange(block.keys[0], block.keys[-1] + len(block.rows))
    return replace(block, rows=block.rows[-1:], keys=further, active=_diagonals(block.active[0])[None, None])


def _spread(block: PairBlock, line: Tensor) -> Tensor:
    """Numbers (heads or 1, 1, diagonals) over the block: the same along each diagonal."""
    diagonals = len(block.rows) + len(block.keys) - 1
    return line[:, 0].expand(line.shape[0], diagonals).unfold(1, len(block.keys), 1).flip(1)


def _is_stretch(tokens: NDArray[np.int64]) -> bool:
    return bool(len(tokens)) and int(tokens[-1] - tokens[0]) == len(tokens) - 1


def _diagonals(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which diagonals of a mask hold something, from the lower left corner on."""
    rows, keys = mask.shape
    wide = np.zeros((rows, rows + keys), dtype=np.bool_)
    wide[:, :keys] = mask[::-1]
    return np.asarray(wide.ravel()[: rows * (rows + keys - 1)].reshape(rows, rows + keys - 1).any(axis=0))
