"""The operands of a score's kernels: vectors and terms, computed in torch for all queries, keys and distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.heads import heads_read
from attnc.compiler.analysis.token_ranges import TokenRange, find_ranges
from attnc.compiler.ir import Index, Value, fold
from attnc.compiler.ir.rewrite import replace_values
from attnc.compiler.ir.value_nodes import apply, element, rank, reads, reads_kv_heads
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.score_formula import MOST_SUM, ScoreFormula, Term, is_count
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu.planned_call import operands_of
from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import Int64, Operands, PairBlock
from attnc.spec.errors import EvaluationError

_NONE = np.zeros(1, dtype=np.int64)

KEYS_SEEN = ir.intern(ir.Tensor("keys seen", "real", ("batch", "head", "query")))
"""The number of keys that each query sees."""


class ScoreOperands:
    """The vectors and terms of a call, differentiable in its tensors."""

    def __init__(
        self, relations: Relations, scale: float, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]
    ) -> None:
        self._relations = relations
        self._tensors = {"q": q, "k": k, "v": v}
        self._operands = operands_of(relations, scale, (q.unbind(0), k.unbind(0), v.unbind(0)), inputs)
        self._heads = tuple(range(q.shape[1]))

    def vectors(self, score: ScoreFormula) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors that kernels read in place of q, k and v, in their dtype.

        They have a head for each query head if keys or values differ within a group.

        Raises NotInKernelsError if kernels read kv head indices while key vectors differ by query head.
        """
        q, k, v = self._tensors.values()
        vectors = [
            self._joined(score.query, self._query_values).to(q.dtype) if score.query else q,
            self._joined(score.key, self._kv_head_values).to(k.dtype) if score.key else k,
            v if score.value is None else self._whole(score.value, self._kv_head_values).to(v.dtype),
        ]
        batch, heads = q.shape[:2]
        vectors[0] = vectors[0].expand(batch, heads, *vectors[0].shape[2:])
        counts = {x.shape[1] for x in vectors[1:]} - {1} or {k.shape[1]}
        kv_heads = k.shape[1] if counts == {k.shape[1]} else heads
        # Kernels number kv heads by the vectors that they read.
        pattern = self._relations.pattern
        by_kv_head = any("kv_head" in tensor.dims for tensor in pattern.tensors)
        if kv_heads != k.shape[1] and (by_kv_head or reads_kv_heads(pattern.attend.visible, score.formula)):
            raise NotInKernelsError("keys or values that differ by query head, where kv heads are read")
        for i in (1, 2):
            vectors[i] = _by_head(vectors[i], kv_heads).expand(batch, kv_heads, *vectors[i].shape[2:])
        return vectors[0], vectors[1], vectors[2]

    def _joined(self, values: Sequence[Value], of: Callable[[Operands, int, Value], Tensor]) -> Tensor:
        """Compute vectors and concatenate them along the last dimension."""
        parts = [self._whole(value, of) for value in values]
        batch, heads = (max(part.shape[i] for part in parts) for i in (0, 1))
        parts = [_by_head(part, heads) for part in parts]
        return torch.cat([part.expand(batch, heads, *part.shape[2:]) for part in parts], -1)

    def terms(self, score: ScoreFormula) -> dict[str, Tensor]:
        """Compute the terms by name, fp32 (B or 1, Hq or 1, tokens or distances).

        Raises NotInKernelsError for prefix sums that two fp32 numbers cannot hold; the host waits to check them.
        """
        terms = [*score.terms, *([] if score.extra is None else [score.extra])]
        sums: dict[tuple[Value, str], Tensor] = {}
        terms_by_name = {}
        for term in terms:
            key = term.value, term.side
            if key not in sums:
                sums[key] = self._whole(term.value, self._places(term), precise=term.half > 0)
            terms_by_name[term.tensor.name] = _half(sums[key], term)
        sums_to_check = [sums[term.value, term.side].detach() for term in terms if term.half == 1]
        if sums_to_check and not all(bool((x.abs() <= MOST_SUM).all()) for x in sums_to_check):
            raise NotInKernelsError("sums over tokens that grow beyond 2²⁸, or to infinity, by strong gates")
        return terms_by_name

    def _places(self, term: Term) -> Callable[[Operands, int, Value], Tensor]:
        return {"query": self._query_values, "key": self._key_values, "distance": self._distance_values}[term.side]

    def _whole(self, value: Value, of: Callable[[Operands, int, Value], Tensor], precise: bool = False) -> Tensor:
        """Compute a value for every batch entry, or once if it is the same for all; `precise`: in fp64."""
        operands = _in_64_bits(self._operands) if precise else self._operands
        counts: dict[Value, Value] = {
            reduction: _counted(reduction)
            for reduction in value.below
            if isinstance(reduction, ir.VisibleReduce) and is_count(reduction)
        }
        if counts:
            value = replace_values(value, counts)
            operands = replace(operands, inputs={**operands.inputs, KEYS_SEEN.name: self._keys_seen})
        batches = len(operands.q) if "batch" in reads(value) or self._windows_differ else 1
        return torch.stack([of(operands, batch, value) for batch in range(batches)])

    @cached_property
    def _keys_seen(self) -> Tensor:
        """`KEYS_SEEN` on the device. Raises NotInKernelsError if rows do not see ranges of keys."""
        return on_device(self._counts, self._tensors["q"].device)

    @cached_property
    def _counts(self) -> NDArray[np.float32]:
        """The number of keys that each query sees, (B, Hq, Nq). Raises NotInKernelsError unless rows see key ranges."""
        n_q = self._tensors["q"].shape[2]
        counts = np.zeros((self._tensors["q"].shape[0], len(self._heads), n_q), dtype=np.float32)
        for batches, heads, window, ranges in self._ranges("counts of keys"):
            rows = np.arange(window.row, window.row + window.n_q)
            counts[np.ix_(np.asarray(batches), np.asarray(heads), rows)] = _covered(ranges, window)
        return counts

    def _ranges(self, asker: str) -> Iterator[tuple[Sequence[int], Sequence[int], Window, Sequence[TokenRange]]]:
        """Yield (batch entries, heads, window, the key ranges that its rows see). Raises NotInKernelsError."""
        for batches, heads, locals_ in self._relations.groups():
            for local in locals_:
                ranges = find_ranges(local.relation, "k")
                if ranges is None:
                    raise NotInKernelsError(f"{asker}, where the visible keys of a row are not a few ranges")
                yield from ((batches, heads, window, ranges) for window in local.windows)

    @property
    def _windows_differ(self) -> bool:
        return self._relations.pattern.documents is not None

    def _query_values(self, operands: Operands, batch: int, value: Value) -> Tensor:
        parts = [
            self._values(
                operands, batch, window, np.arange(window.n_q), _NONE, value, self._seeing(operands, batch, window)
            )[:, :, 0].expand(-1, window.n_q, *[-1] * (rank(value)))
            for window in self._relations.windows(batch)
        ]
        return torch.cat(_one_count(parts), 1)

    def _seeing(self, operands: Operands, batch: int, window: Window) -> NDArray[np.bool_] | None:
        """Return the rows (heads, rows, 1) that see a key, if keys are counted; None for all rows.

        A quotient by the count is undefined in the other rows, and computing it there makes its gradient NaN.
        """
        if KEYS_SEEN.name not in operands.inputs:
            return None
        seen: NDArray[np.bool_] = self._counts[batch, :, window.row : window.row + window.n_q, None] > 0
        return seen

    def _kv_head_values(self, operands: Operands, batch: int, value: Value) -> Tensor:
        """Compute a value of keys (kv heads, tokens, …), by query head if it differs within a group."""
        if heads_read([value]) == "head":
            return self._key_values(operands, batch, value)
        heads, kv_heads = (self._tensors[name].shape[1] for name in "qk")
        return self._key_values(operands, batch, value, self._heads[:: heads // max(kv_heads, 1) or 1])

    def _key_values(self, operands: Operands, batch: int, value: Value, heads: tuple[int, ...] | None = None) -> Tensor:
        """Compute a value of keys (heads, tokens, …); `heads`: query heads, None: all.

        Keys of documents without queries are not computed, because nothing reads them.
        """
        parts, end = [], 0
        width = rank(value)
        for window in self._relations.windows(batch):
            values = self._values(operands, batch, window, _NONE, np.arange(window.n_k), value, heads=heads)[:, 0]
            values = values.expand(-1, window.n_k, *[-1] * width)
            if window.key > end:
                parts.append(values.new_zeros((len(values), window.key - end, *values.shape[2:])))
            parts.append(values)
            end = window.key + window.n_k
        n_k = self._tensors["k"].shape[2]
        if end < n_k:
            parts.append(parts[-1].new_zeros((len(parts[-1]), n_k - end, *parts[-1].shape[2:])))
        return torch.cat(_one_count(parts), 1)

    def _distance_values(self, operands: Operands, batch: int, value: Value) -> Tensor:
        """Compute a value for all distances: of the first query from all keys, then of all queries from the first key.

        Raises EvaluationError if a distance that occurs has no value, NotInKernelsError if it is unknown which
        distances occur.
        """
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        every = np.ones(n_q + n_k - 1, dtype=np.bool_)
        try:
            return self._along_distances(operands, batch, value, every)
        except EvaluationError:
            return self._along_distances(operands, batch, value, self._occurring())

    def _along_distances(self, operands: Operands, batch: int, value: Value, requested: NDArray[np.bool_]) -> Tensor:
        """Compute a value at the requested distances."""
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        window = Window(0, 0, n_q, n_k, self._shift)
        backward_mask, forth = requested[:n_k][::-1][None, None], requested[n_k - 1 :][None, :, None]
        first = self._values(operands, batch, window, _NONE, np.arange(n_k), value, backward_mask)[:, 0].flip(1)
        after = self._values(operands, batch, window, np.arange(n_q), _NONE, value, forth)[:, :, 0]
        parts = [first.expand(-1, n_k), after.expand(-1, n_q)[:, 1:]]
        return torch.cat(_one_count(parts), 1)

    @property
    def _shift(self) -> int:
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        return n_k - n_q if self._relations.pattern.align == "end" else 0

    def _occurring(self) -> NDArray[np.bool_]:
        """Return which distances occur between a query and a key that it sees."""
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        steps = np.zeros(n_q + n_k, dtype=np.int64)  # differences of the number of rows in which a distance occurs
        for _, _, window, ranges in self._ranges("terms that not every distance has"):
            for token_range in ranges:
                first, last = _range(token_range, window)
                nonempty = first <= last
                diagonal = np.flatnonzero(nonempty) + window.shift + n_k - 1 - self._shift
                np.add.at(steps, diagonal - last[nonempty], 1)
                np.add.at(steps, diagonal - first[nonempty] + 1, -1)
        occurring: NDArray[np.bool_] = np.cumsum(steps)[:-1] > 0
        return occurring

    def _values(
        self,
        operands: Operands,
        batch: int,
        window: Window,
        rows: Int64,
        keys: Int64,
        value: Value,
        active: NDArray[np.bool_] | None = None,
        heads: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Compute (heads or 1, rows or 1, keys or 1[, width]); `heads`: query heads, None: all."""
        if active is None:
            active = np.ones((1, len(rows), len(keys)), dtype=np.bool_)
        block = PairBlock(batch, self._heads if heads is None else heads, window, rows, keys, active)
        return BlockValues(operands, block).of(value)


def _range(token_range: TokenRange, window: Window) -> tuple[Int64, Int64]:
    """Return the first and the last key of a range, for every row."""
    first = np.maximum(_ends(token_range.low, window.n_q, 0), 0)
    return first, np.minimum(_ends(token_range.high, window.n_q, window.n_k - 1), window.n_k - 1)


def _covered(ranges: Sequence[TokenRange], window: Window) -> Int64:
    """Count the keys in the union of ranges, for every row."""
    if not ranges:
        return np.zeros(window.n_q, dtype=np.int64)
    ends = np.stack([np.stack(_range(token_range, window)) for token_range in ranges])
    order = np.argsort(ends[:, 0], axis=0, kind="stable")
    firsts, lasts = (np.take_along_axis(ends[:, i], order, 0) for i in (0, 1))
    before = np.concatenate([np.full((1, window.n_q), -1), np.maximum.accumulate(lasts, 0)[:-1]])
    covered: Int64 = np.maximum(lasts - np.maximum(firsts - 1, before), 0).sum(0)
    return covered


def _counted(node: ir.VisibleReduce) -> Value:
    """Rewrite a sum of a constant over a row's visible keys as the number of keys times the constant."""
    positions = (fold.head_index("batch"), fold.head_index("head"), fold.place("q"))
    return apply("mul", node.body, element(KEYS_SEEN, positions))


def _ends(end: Index | None, rows: int, otherwise: int) -> Int64:
    """Return one end of a range, for every row."""
    if end is None:
        return np.full(rows, otherwise, dtype=np.int64)
    return np.broadcast_to(exact_evaluation.integers(end, (0, rows), (0, 1))[:, 0], rows)


def _in_64_bits(operands: Operands) -> Operands:
    return replace(operands, dtype=torch.float64)


def _one_count(parts: list[Tensor]) -> list[Tensor]:
    """Expand parts to the same number of heads."""
    heads = max(len(part) for part in parts)
    return [part.expand(heads, *part.shape[1:]) for part in parts]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Repeat a tensor of kv heads to `heads` heads."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def _half(x: Tensor, term: Term) -> Tensor:
    """Return a term in fp32: itself, or the larger or smaller half of its fp64 value; contiguous in tokens."""
    first = x.float()
    half = first if term.half < 2 else (x.detach() - first.detach().double()).float()
    return half if half.stride(-1) == 1 else half.contiguous()
