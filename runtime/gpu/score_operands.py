"""What a score's kernels are given: vectors and terms, computed in torch for all queries, keys and distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import fold, ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.heads import heads_read
from attnc.compiler.ir import Index, Value
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.ranges import TokenRange, find_ranges
from attnc.compiler.kernels.score_formula import MOST_SUM, ScoreFormula, Term, is_count
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.rewrite import replace_values
from attnc.compiler.value_nodes import apply, element, rank, reads, reads_kv_heads
from attnc.runtime.block_values import BlockValues
from attnc.runtime.cpu.planned_call import operands_of
from attnc.runtime.device_constants import on_device
from attnc.runtime.pair_blocks import Int64, Operands, PairBlock
from attnc.spec.errors import EvaluationError

_NONE = np.zeros(1, dtype=np.int64)

KEYS_SEEN = ir.intern(ir.Tensor("keys seen", "real", ("batch", "head", "query")))
"""How many keys each query sees."""


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

        They have a head for each query head where keys or values differ within a group.

        Raises NotInKernelsError where kernels read numbers of kv heads, and vectors of keys differ by query head.
        """
        q, k, v = self._tensors.values()
        own = [
            self._joined(score.query, self._of_queries).to(q.dtype) if score.query else q,
            self._joined(score.key, self._of_kv_heads).to(k.dtype) if score.key else k,
            v if score.value is None else self._whole(score.value, self._of_kv_heads).to(v.dtype),
        ]
        batch, heads = q.shape[:2]
        own[0] = own[0].expand(batch, heads, *own[0].shape[2:])
        counts = {x.shape[1] for x in own[1:]} - {1} or {k.shape[1]}
        kv_heads = k.shape[1] if counts == {k.shape[1]} else heads
        # Kernels number kv heads by the vectors that they are given.
        pattern = self._relations.pattern
        by_kv_head = any("kv_head" in tensor.dims for tensor in pattern.tensors)
        if kv_heads != k.shape[1] and (by_kv_head or reads_kv_heads(pattern.attend.visible, score.formula)):
            raise NotInKernelsError("keys or values that differ by query head, where kv heads are read")
        for i in (1, 2):
            own[i] = _by_head(own[i], kv_heads).expand(batch, kv_heads, *own[i].shape[2:])
        return own[0], own[1], own[2]

    def _joined(self, values: Sequence[Value], of: Callable[[Operands, int, Value], Tensor]) -> Tensor:
        """Vectors one behind the other."""
        parts = [self._whole(value, of) for value in values]
        batch, heads = (max(part.shape[i] for part in parts) for i in (0, 1))
        parts = [_by_head(part, heads) for part in parts]
        return torch.cat([part.expand(batch, heads, *part.shape[2:]) for part in parts], -1)

    def terms(self, score: ScoreFormula) -> dict[str, Tensor]:
        """The terms by name, fp32 (B or 1, Hq or 1, tokens or distances).

        Raises NotInKernelsError for prefix sums of which 32 bits twice are too few: the host waits for these.
        """
        terms = [*score.terms, *([] if score.extra is None else [score.extra])]
        sums: dict[tuple[Value, str], Tensor] = {}
        found = {}
        for term in terms:
            key = term.value, term.side
            if key not in sums:
                sums[key] = self._whole(term.value, self._places(term), precise=term.half > 0)
            found[term.tensor.name] = _half(sums[key], term)
        upto = [sums[term.value, term.side].detach() for term in terms if term.half == 1]
        if upto and not all(bool((x.abs() <= MOST_SUM).all()) for x in upto):
            raise NotInKernelsError("sums over tokens that grow beyond 2²⁸, or to infinity, by strong gates")
        return found

    def _places(self, term: Term) -> Callable[[Operands, int, Value], Tensor]:
        return {"query": self._of_queries, "key": self._of_keys, "distance": self._of_distances}[term.side]

    def _whole(self, value: Value, of: Callable[[Operands, int, Value], Tensor], precise: bool = False) -> Tensor:
        """A value of every batch entry, or of one where all are alike; `precise`: computed in 64 bits."""
        operands = _in_64_bits(self._operands) if precise else self._operands
        counts: dict[Value, Value] = {
            below: _counted(below) for below in value.below if isinstance(below, ir.VisibleReduce) and is_count(below)
        }
        if counts:
            value = replace_values(value, counts)
            operands = replace(operands, inputs={**operands.inputs, KEYS_SEEN.name: self._keys_seen})
        batches = len(operands.q) if "batch" in reads(value) or self._windows_differ else 1
        return torch.stack([of(operands, batch, value) for batch in range(batches)])

    @cached_property
    def _keys_seen(self) -> Tensor:
        """`KEYS_SEEN`. Raises NotInKernelsError where rows see no ranges of keys."""
        return on_device(self._counts, self._tensors["q"].device)

    @cached_property
    def _counts(self) -> NDArray[np.float32]:
        """How many keys each query sees, (B, Hq, Nq). Raises NotInKernelsError where rows see no ranges of keys."""
        n_q = self._tensors["q"].shape[2]
        found = np.zeros((self._tensors["q"].shape[0], len(self._heads), n_q), dtype=np.float32)
        for batches, heads, window, ranges in self._ranges("counts of keys"):
            rows = np.arange(window.row, window.row + window.n_q)
            found[np.ix_(np.asarray(batches), np.asarray(heads), rows)] = _covered(ranges, window)
        return found

    def _ranges(self, asker: str) -> Iterator[tuple[Sequence[int], Sequence[int], Window, Sequence[TokenRange]]]:
        """(batch entries, heads, window, the keys that its rows see): for all. Raises NotInKernelsError."""
        for batches, heads, locals_ in self._relations.groups():
            for local in locals_:
                ranges = find_ranges(local.relation, "k")
                if ranges is None:
                    raise NotInKernelsError(f"{asker}, where rows see no ranges of keys")
                yield from ((batches, heads, window, ranges) for window in local.windows)

    @property
    def _windows_differ(self) -> bool:
        return self._relations.pattern.documents is not None

    def _of_queries(self, operands: Operands, batch: int, value: Value) -> Tensor:
        parts = [
            self._values(
                operands, batch, window, np.arange(window.n_q), _NONE, value, self._seeing(operands, batch, window)
            )[:, :, 0].expand(-1, window.n_q, *[-1] * (rank(value)))
            for window in self._relations.windows(batch)
        ]
        return torch.cat(_one_count(parts), 1)

    def _seeing(self, operands: Operands, batch: int, window: Window) -> NDArray[np.bool_] | None:
        """The rows (heads, rows, 1) that see a key, where keys are counted; None for all rows.

        A quotient by the count has no value in the other rows, and NaN for its gradient if it is computed there.
        """
        if KEYS_SEEN.name not in operands.inputs:
            return None
        seen: NDArray[np.bool_] = self._counts[batch, :, window.row : window.row + window.n_q, None] > 0
        return seen

    def _of_kv_heads(self, operands: Operands, batch: int, value: Value) -> Tensor:
        """A value of keys (kv heads, tokens, …), by query head where it differs within a group."""
        if heads_read([value]) == "head":
            return self._of_keys(operands, batch, value)
        heads, kv_heads = (self._tensors[name].shape[1] for name in "qk")
        return self._of_keys(operands, batch, value, self._heads[:: heads // max(kv_heads, 1) or 1])

    def _of_keys(self, operands: Operands, batch: int, value: Value, heads: tuple[int, ...] | None = None) -> Tensor:
        """A value of keys (heads, tokens, …); `heads`: query heads, None: all.

        Keys of documents without queries are not computed: nothing reads them.
        """
        parts, at = [], 0
        width = rank(value)
        for window in self._relations.windows(batch):
            found = self._values(operands, batch, window, _NONE, np.arange(window.n_k), value, heads=heads)[:, 0]
            found = found.expand(-1, window.n_k, *[-1] * width)
            if window.key > at:
                parts.append(found.new_zeros((len(found), window.key - at, *found.shape[2:])))
            parts.append(found)
            at = window.key + window.n_k
        n_k = self._tensors["k"].shape[2]
        if at < n_k:
            parts.append(parts[-1].new_zeros((len(parts[-1]), n_k - at, *parts[-1].shape[2:])))
        return torch.cat(_one_count(parts), 1)

    def _of_distances(self, operands: Operands, batch: int, value: Value) -> Tensor:
        """From the first query back over all keys, and from the first key on to all queries.

        Raises EvaluationError where a distance that occurs has no value, NotInKernelsError where it is not known which
        occur.
        """
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        every = np.ones(n_q + n_k - 1, dtype=np.bool_)
        try:
            return self._along_distances(operands, batch, value, every)
        except EvaluationError:
            return self._along_distances(operands, batch, value, self._occurring())

    def _along_distances(self, operands: Operands, batch: int, value: Value, asked: NDArray[np.bool_]) -> Tensor:
        """A value of those distances that are asked for."""
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        window = Window(0, 0, n_q, n_k, self._shift)
        back, on = asked[:n_k][::-1][None, None], asked[n_k - 1 :][None, :, None]
        first = self._values(operands, batch, window, _NONE, np.arange(n_k), value, back)[:, 0].flip(1)
        then = self._values(operands, batch, window, np.arange(n_q), _NONE, value, on)[:, :, 0]
        parts = [first.expand(-1, n_k), then.expand(-1, n_q)[:, 1:]]
        return torch.cat(_one_count(parts), 1)

    @property
    def _shift(self) -> int:
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        return n_k - n_q if self._relations.pattern.align == "end" else 0

    def _occurring(self) -> NDArray[np.bool_]:
        """The distances that some query has from a key that it sees."""
        n_q, n_k = self._tensors["q"].shape[2], self._tensors["k"].shape[2]
        steps = np.zeros(n_q + n_k, dtype=np.int64)  # by how much the number of those that have it changes
        for _, _, window, ranges in self._ranges("terms that not every distance has"):
            for one in ranges:
                first, last = _range(one, window)
                some = first <= last
                place = np.flatnonzero(some) + window.shift + n_k - 1 - self._shift
                np.add.at(steps, place - last[some], 1)
                np.add.at(steps, place - first[some] + 1, -1)
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
        alive: NDArray[np.bool_] | None = None,
        heads: tuple[int, ...] | None = None,
    ) -> Tensor:
        """(heads or 1, rows or 1, keys or 1[, width]); `heads`: query heads, None: all."""
        if alive is None:
            alive = np.ones((1, len(rows), len(keys)), dtype=np.bool_)
        block = PairBlock(batch, self._heads if heads is None else heads, window, rows, keys, alive)
        return BlockValues(operands, block).of(value)


def _range(one: TokenRange, window: Window) -> tuple[Int64, Int64]:
    """The first and the last key of a range, for every row."""
    first = np.maximum(_ends(one.low, window.n_q, 0), 0)
    return first, np.minimum(_ends(one.high, window.n_q, window.n_k - 1), window.n_k - 1)


def _covered(ranges: Sequence[TokenRange], window: Window) -> Int64:
    """How many keys are in some range, for every row."""
    if not ranges:
        return np.zeros(window.n_q, dtype=np.int64)
    ends = np.stack([np.stack(_range(one, window)) for one in ranges])
    order = np.argsort(ends[:, 0], axis=0, kind="stable")
    firsts, lasts = (np.take_along_axis(ends[:, i], order, 0) for i in (0, 1))
    before = np.concatenate([np.full((1, window.n_q), -1), np.maximum.accumulate(lasts, 0)[:-1]])
    covered: Int64 = np.maximum(lasts - np.maximum(firsts - 1, before), 0).sum(0)
    return covered


def _counted(node: ir.VisibleReduce) -> Value:
    """A sum over the keys of a row that is their number, times another."""
    places = (fold.head_index("batch"), fold.head_index("head"), fold.place("q"))
    return apply("mul", node.body, element(KEYS_SEEN, places))


def _ends(end: Index | None, rows: int, otherwise: int) -> Int64:
    """An end of the range of every row."""
    if end is None:
        return np.full(rows, otherwise, dtype=np.int64)
    return np.broadcast_to(exact_evaluation.integers(end, (0, rows), (0, 1))[:, 0], rows)


def _in_64_bits(operands: Operands) -> Operands:
    return replace(operands, dtype=torch.float64)


def _one_count(parts: list[Tensor]) -> list[Tensor]:
    """Parts with as many heads each."""
    most = max(len(part) for part in parts)
    return [part.expand(most, *part.shape[1:]) for part in parts]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """A tensor of kv heads as one of so many heads."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def _half(x: Tensor, term: Term) -> Tensor:
    """A term in 32 bits: itself, or the larger or smaller part of what 64 bits hold. Tokens lie side by side."""
    first = x.float()
    found = first if term.half < 2 else (x.detach() - first.detach().double()).float()
    return found if found.stride(-1) == 1 else found.contiguous()
