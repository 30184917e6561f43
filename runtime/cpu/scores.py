"""The scores of a call on the cpu, tile by tile: whole, or as the bias that the kernel takes for its mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.analysis.translation import is_difference
from attnc.compiler.ir import Value
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.values import additive, extra_of, reads
from attnc.runtime.cpu.tiles import Tile
from attnc.runtime.values import Block, Operands, Values


class Scores:
    """The scores of a call, tile by tile."""

    def __init__(self, relations: Relations, operands: Operands) -> None:
        self._operands = operands
        self.node = relations.pattern.attend
        self._additive = additive(self.node.score)
        self._slides = self._additive is not None and is_difference(self._additive.bias)
        self._windows = [list(relations.windows(b)) for b in range(relations.shape.batch)]

    def of(self, tile: Tile, q: Tensor, k: Tensor) -> Tensor:
        """Scores (heads, rows, keys) of a tile whose vectors are q (heads, rows, dk) and k (heads, keys, dk).

        -inf where nothing is seen.
        """
        shape = len(tile.heads), len(tile.rows), len(tile.keys)
        parts = list(self._blocks(tile))
        if len(parts) == 1:
            block, rows, keys = parts[0]
            if len(rows) == shape[1] and len(keys) == shape[2]:
                score = Values(self._operands, block, {"q": q[:, :, None], "k": k[:, None]}).of(self.node.score)
                return score.expand(shape).masked_fill(torch.from_numpy(~tile.mask), -math.inf)
        score = torch.full(shape, -math.inf, dtype=self._operands.dtype)
        for block, rows, keys in parts:
            at = torch.from_numpy(rows)[:, None], torch.from_numpy(keys)[None]
            vectors = {"q": q[:, torch.from_numpy(rows), None], "k": k[:, None, torch.from_numpy(keys)]}
            found = Values(self._operands, block, vectors).of(self.node.score)
            found = found.expand(shape[0], len(rows), len(keys))
            score[:, at[0], at[1]] = found.masked_fill(torch.from_numpy(~block.alive[0]), -math.inf)
        return score

    def less(self, tile: Tile, q: Tensor, k: Tensor, shift: Tensor) -> Tensor:
        """Scores as `of` gives them less the shift of their rows, which a large bias loses before digits are lost."""
        factor = self.factor
        if factor is None:
            return self.of(tile, q, k) - shift[..., None]
        return factor * (q @ k.transpose(-1, -2)) + (self.bias(tile) - shift[..., None])

    @property
    def factor(self) -> float | None:
        """What `dot(q, k)` is multiplied with where the rest of the score is a bias, else None."""
        if self._additive is None:
            return None
        anywhere = np.zeros(1, dtype=np.int64)
        block = Block(0, (0,), Window(0, 0, 1, 1, 0), anywhere, anywhere, np.ones((1, 1, 1), dtype=np.bool_))
        return float(Values(self._operands, block).of(self._additive.factor))

    def bias(self, tile: Tile) -> Tensor:
        """The bias of a tile, (heads or 1, rows, keys), -inf where nothing is seen."""
        assert self._additive is not None
        bias = self._additive.bias
        hidden = torch.from_numpy(~tile.mask)
        if bias is None:
            return torch.zeros(hidden.shape, dtype=self._operands.dtype).masked_fill_(hidden, -math.inf)[None]
        shape = len(tile.rows), len(tile.keys)
        result = torch.zeros((len(tile.heads) if "head" in reads(bias) else 1, *shape), dtype=self._operands.dtype)
        for block, rows, keys in self._blocks(tile):
            if self._slides and _is_stretch(block.rows) and _is_stretch(block.keys):
                found = self._along_diagonals(bias, block)
            else:
                found = Values(self._operands, block).of(bias)
            if (len(rows), len(keys)) == shape:
                result.copy_(found.expand(result.shape))
            else:
                at = torch.from_numpy(rows)[:, None], torch.from_numpy(keys)[None]
                result[:, at[0], at[1]] = found.expand(len(result), len(rows), len(keys))
        return result.masked_fill_(hidden, -math.inf)

    def _along_diagonals(self, bias: Value, block: Block) -> Tensor:
        """A bias that is the same along diagonals: evaluated once for each."""
        rows, keys = len(block.rows), len(block.keys)
        alive = _diagonals(block.alive[0])
        last = block.rows[-1:]
        further = np.arange(block.keys[0], block.keys[-1] + rows)
        line = Values(self._operands, replace(block, rows=last, keys=further, alive=alive[None, None])).of(bias)
        return line[:, 0].expand(line.shape[0], len(further)).unfold(1, keys, 1).flip(1)

    def _blocks(self, tile: Tile) -> Iterator[tuple[Block, NDArray[np.int64], NDArray[np.int64]]]:
        """The parts of a tile by window, with the numbers of their rows and keys in it."""
        for window in self._windows[tile.batch]:
            rows = np.flatnonzero((tile.rows >= window.row) & (tile.rows < window.row + window.n_q))
            keys = np.flatnonzero((tile.keys >= window.key) & (tile.keys < window.key + window.n_k))
            alive = tile.mask[np.ix_(rows, keys)]
            if not alive.any():
                continue
            own_rows, own_keys = tile.rows[rows] - window.row, tile.keys[keys] - window.key
            yield Block(tile.batch, tile.heads, window, own_rows, own_keys, alive[None]), rows, keys

    def extra(self, batch: int, q: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The logarithm of what the extra logits add, (heads, rows), for the rows of each window.

        `q` are the vectors of the batch entry, (heads, rows, dk).
        """
        extra = extra_of(self.node)
        assert extra is not None
        for window in self._windows[batch]:
            rows = np.arange(window.n_q)
            alive = np.ones((1, len(rows), 1), dtype=np.bool_)
            block = Block(batch, tuple(range(len(q))), window, rows, np.zeros(1, dtype=np.int64), alive)
            here = slice(window.row, window.row + window.n_q)
            logit = Values(self._operands, block, {"q": q[:, here, None]}).logit(extra)
            yield here, logit.expand(len(q), len(rows))


def _is_stretch(tokens: NDArray[np.int64]) -> bool:
    return bool(len(tokens)) and int(tokens[-1] - tokens[0]) == len(tokens) - 1


def _diagonals(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which diagonals of a mask hold something, from the lower left corner on."""
    rows, keys = mask.shape
    wide = np.zeros((rows, rows + keys), dtype=np.bool_)
    wide[:, :keys] = mask[::-1]
    return np.asarray(wide.ravel()[: rows * (rows + keys - 1)].reshape(rows, rows + keys - 1).any(axis=0))
