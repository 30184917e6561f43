"""The scores of a call on the cpu, block by block: whole, or as the bias that the kernel takes as its mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
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
from attnc.runtime.executors.cpu.block_work import BlockResults
from attnc.runtime.executors.cpu.row_blocks import RowBlock
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import Operands, PairBlock

Pairs: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Tensors that autograd has recorded, with their gradients."""

Pull: TypeAlias = Callable[[Tensor], Pairs]

LARGE = 16.0
"""Limit beyond which scores are shifted."""


class Scores:
    """The scores of a call, block by block."""

    def __init__(self, relations: Relations, operands: Operands) -> None:
        self._operands = operands
        self.node = relations.pattern.attend
        self.extra_logit = extra_of(self.node)
        self._additive, self._slides = _form(self.node.score)

    def of(self, block: RowBlock, q: Tensor, k: Tensor) -> Tensor:
        """Compute scores (heads, rows, keys) with vectors q (heads, rows, dk) and k (heads, keys, dk).

        Hidden pairs give -inf.
        """
        return _whole(self._values(block, q, k).of(self.node.score), block)

    def _values(self, block: RowBlock, q: Tensor, k: Tensor) -> BlockValues:
        """Return an evaluator of the scores of a block."""
        return BlockValues(self._operands, block.pairs(block.window.key), {"q": q[:, :, None], "k": k[:, None]})

    def recorded(self, block: RowBlock, q: Tensor, k: Tensor, shift: Tensor) -> tuple[Tensor, Pull]:
        """Return the scores of `of` minus the shift of their rows, and a function that propagates a change of them.

        A large bias is reduced by the shift first, so that no digits are lost. The function takes changes that are 0 in
        hidden pairs to the tensors that autograd has recorded of q, k and inputs.
        """
        factor = self.factor
        if factor is None:
            with torch.enable_grad():
                values = self._values(block, q, k)
            pull = _recorded(values, self.node.score)
            return _whole(values.of(self.node.score), block) - shift[..., None], pull
        with torch.enable_grad():
            product = q @ k.transpose(-1, -2)
        bias, pulls = self._bias(block)
        score = factor * product.detach() + (bias - shift[..., None])
        return score, lambda change: [(product, factor * change), *(pair for pull in pulls for pair in pull(change))]

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

    def bias(self, block: RowBlock) -> Tensor:
        """Return the bias of a block, (heads or 1, rows, keys), -inf in hidden pairs."""
        return self._bias(block, record=False)[0]

    def _bias(self, block: RowBlock, *, record: bool = True) -> tuple[Tensor, list[Pull]]:
        """Return the bias, and functions that propagate a change of it (heads, rows, keys) to the inputs."""
        assert self._additive is not None
        bias = self._additive.bias
        if bias is None:
            hidden = torch.from_numpy(~block.mask)
            return torch.zeros(hidden.shape, dtype=self._operands.dtype).masked_fill_(hidden, -math.inf)[None], []
        heads = len(block.heads) if "head" in reads(bias) else 1
        pairs = block.pairs(block.window.key)
        slides = self._slides and _is_stretch(pairs.rows) and _is_stretch(pairs.keys)
        values = BlockValues(self._operands, _diagonal(pairs) if slides else pairs)
        diagonal = values.block if slides else None
        pulls = [_pull_of_bias(_recorded(values, bias), block, diagonal, heads)] if record else []
        result = values.of(bias).detach()
        return _whole(_spread(block, result) if slides else result, block, heads), pulls

    def extra(self, block: RowBlock, q: Tensor) -> Tensor:
        """Return the logarithm of the extra logits' sum, (heads, rows), for rows with vectors q (heads, rows, dk)."""
        assert self.extra_logit is not None
        active = np.ones((1, len(block.rows), 1), dtype=np.bool_)
        rows = block.rows - block.window.row
        pairs = PairBlock(block.batch, block.heads, block.window, rows, np.zeros(1, dtype=np.int64), active)
        logit = BlockValues(self._operands, pairs, {"q": q[:, :, None]}).logit(self.extra_logit)
        return logit.expand(q.shape[:2])


@lru_cache(64)
def _form(score: Value) -> tuple[Additive | None, bool]:
    """Return a score as a multiple of `dot(q, k)` and a bias, and whether the bias depends on `q - k` alone."""
    parts = additive(score)
    return parts, parts is not None and is_difference(parts.bias)


def with_extra(scores: Scores, block: RowBlock, q: Tensor, results: BlockResults) -> BlockResults:
    """Return results with the extra logits of every row that sees a key, even if all scores are -inf."""
    out, lse, shift = results
    assert lse is not None
    logit = scores.extra(block, q.to(lse.dtype))
    if shift is not None:
        nearer = torch.where(logit.isfinite() & (logit - (lse + shift) > LARGE), logit.detach(), shift)
        lse, logit, shift = lse + (shift - nearer), logit - nearer, nearer
    total_lse = torch.logaddexp(lse, logit)
    blind = torch.from_numpy(~block.mask.any(axis=1)) | (total_lse == -math.inf)
    total_lse = torch.where(blind, -math.inf, total_lse)
    weight = torch.exp(torch.where(blind, 0, lse - total_lse))
    return BlockResults((out * weight[..., None]).to(out.dtype), total_lse, shift)


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


def _pull_of_bias(pull: Pull, block: RowBlock, diagonal: PairBlock | None, heads: int) -> Pull:
    """Return a function that propagates a change of the block to a bias that may have one head or be spread."""

    def whole(change: Tensor) -> Pairs:
        change = change if heads == len(change) else change.sum(0, keepdim=True)
        if diagonal is None:
            return pull(change)
        with torch.enable_grad():  # `spread` is linear: its transpose sums
            line = torch.zeros((heads, 1, len(diagonal.keys)), dtype=change.dtype, requires_grad=True)
            (added,) = torch.autograd.grad(_spread(block, line), line, change)
        return pull(added)

    return whole


def _whole(value: Tensor, block: RowBlock, heads: int | None = None) -> Tensor:
    """Return a value of a block as a new tensor (heads, rows, keys), -inf in hidden pairs."""
    shape = len(block.heads) if heads is None else heads, *block.mask.shape
    whole = value.detach().expand(shape).clone(memory_format=torch.contiguous_format)
    return whole.masked_fill_(torch.from_numpy(~block.mask), -math.inf)


def _diagonal(block: PairBlock) -> PairBlock:
    """Return the last row of a block with additional keys, one for every diagonal."""
    further = np.arange(block.keys[0], block.keys[-1] + len(block.rows))
    return replace(block, rows=block.rows[-1:], keys=further, active=_diagonals(block.active[0])[None, None])


def _spread(block: RowBlock, line: Tensor) -> Tensor:
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
