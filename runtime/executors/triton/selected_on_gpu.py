"""Attention to selected blocks by kernels: every block gathers the queries that select it and attends for them.

Selections stay on the device, and the host never waits for them: pairs are sorted on the device, grids have their
maximum size, and spare programs exit. The partial results of a query are merged by log-sum-exp in the order of its
blocks, and the gradients of a block's keys are sums of one program. Nothing is atomic: equal inputs give equal bits,
and selections of other queries change no bit of a query's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.compiler.kernels.delta import ROWS
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.selected.selected_kernels import ChosenStage, emit_chosen, emit_delta_of
from attnc.compiler.kernels.selected.selected_problem import SelectedProblem, columns_for, part_width
from attnc.compiler.kernels.value_text import LOG2_E
from attnc.compiler.planning.selected_keys import BlockKeys
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.executors.cpu.autograd import Pair, Triple
from attnc.runtime.executors.cpu.cpu_executor import empty_like
from attnc.runtime.executors.triton.gpu_executor import fitting, on, scaled_queries
from attnc.runtime.executors.triton.launch import launch
from attnc.runtime.executors.triton.selected_lists import SelectedLists, Tables, listed, tables_of
from attnc.runtime.fallbacks import COPY, note

AT_ONCE = 1 << 28
"""Maximum number of fp32 elements of partial results before merging; a single head may exceed it."""

MOST_PAIRS = 1 << 31
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class SelectedOnGpu:
    """The work of one call; `forward` and `backward` take the selection, ([batch,] [heads,] rows, blocks), as input.

    `by_batch`, `by_heads`: whether the selection has batch entries and heads. `most`: maximum number of blocks per row,
    None for all; of a row that selects more only the first `most` count. `places`: blocks, or their tables on the
    device. `name`: the pattern's name.
    """

    places: BlockKeys | Tables
    scale: float
    by_batch: bool = True
    by_heads: bool = True
    most: int | None = None
    name: str = ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv).

        Raises NotInKernelsError if no kernels support the call.
        """
        call = self._called(q, k, v, inputs)
        out = empty_like(q, (*q.shape[:3], v.shape[-1]), q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if call.is_empty:
            return out.zero_(), lse.fill_(-math.inf)
        scaled_q, factor = scaled_queries(q, self.scale)
        written, width = call.fitting("out", out), v.shape[-1]
        tensors = {"q": call.stacked("q", scaled_q), **call.keys(k, v), "out": written, "lse": lse}
        with on(q):
            for share in call.shares(width):
                lists = call.lists("forward", share)
                call.gathered(("forward", "merge"), share, {**tensors, **lists._asdict()}, width, factor)
        return (out if written is out else out.copy_(written)), lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv). Rows that see no key give exactly 0. Raises NotInKernelsError as `forward` does."""
        q, k, v, out, lse, *inputs = kept
        call = self._called(q, k, v, inputs)
        dq, dk, dv = (empty_like(x, x.shape, x.dtype) for x in (q, k, v))
        if call.is_empty:
            return dq.zero_(), dk.zero_(), dv.zero_()
        scaled_q, factor = scaled_queries(q, self.scale)
        written, width = [call.fitting("dq", dq), call.room("dk", dk), call.room("dv", dv)], q.shape[-1]
        tensors = {"q": call.stacked("q", scaled_q), **call.keys(k, v), "dout": call.stacked("dout", grad_out)}
        tensors |= dict(zip(("dq", "dk", "dv"), written, strict=True))
        with on(q):
            tensors |= call.before(tensors["dout"], grad_lse, out, lse)
            for share in call.shares(width):
                named = {**tensors, **call.lists("dq", share)._asdict()}
                call.gathered(("dq", "sum"), share, named, width, factor)
                call.of_keys(share, named, factor)
        if written[0] is not dq:
            dq.copy_(written[0])
        if self.scale <= 0:
            dq.mul_(-1 if self.scale else 0)
        return dq, call.as_given(dk, written[1]), call.as_given(dv, written[2])

    def _called(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> _SelectedCall:
        (selection,) = inputs
        for x in (q, k, v):
            if x.dtype not in DTYPES or x.dtype != q.dtype:
                raise NotInKernelsError(f"selected blocks with {str(x.dtype).removeprefix('torch.')}")
        heads, kv_heads = q.shape[1], k.shape[1]
        blocks = self.places
        tables = blocks if isinstance(blocks, Tables) else tables_of(blocks, q.shape[2], q.device)
        selected = selection if self.by_batch else selection[None]
        selected = selected if self.by_heads else selected[:, None]
        selected = selected.expand(q.shape[0], *selected.shape[1:])
        stacked = selected.shape[1] > kv_heads
        count = selected.shape[-1] if self.most is None else min(self.most, selected.shape[-1])
        problem = SelectedProblem(
            dk=q.shape[3],
            dv=v.shape[3],
            dtype=str(q.dtype).removeprefix("torch."),
            target=target_of(q.device),
            tf32=q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
            rest=tables.rest,
            ordered=tables.order is not None,
            stacked=stacked,
            grouped=heads > kv_heads and not stacked,
            columns=columns_for(tables.largest),
        )
        return _SelectedCall(problem, tables, selected, count, tuple(q.shape[:3]), kv_heads, self.name)


class _Share(NamedTuple):
    """Head groups that are computed together, and how many of the heads that share their pairs."""

    first: int
    lanes: int
    turns: int


@dataclass(frozen=True, eq=False)
class _SelectedCall:
    """One call. `chosen` (batch, selecting heads, rows, blocks); `slots`: maximum number of blocks per row.

    A head group is a batch entry and the heads that share a selection, or, if these are fewer, the heads that share
    keys; in that case its rows are the rows of all its heads.
    """

    problem: SelectedProblem
    tables: Tables
    chosen: Tensor
    slots: int
    shape: tuple[int, ...]
    kv_heads: int
    name: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is visible."""
        return not (min(*self.shape, self.problem.dk, self.problem.dv, self.slots) and self.tables.sides)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.shape[1]

    @property
    def lanes_of_batch(self) -> int:
        """Number of head groups of a batch entry."""
        return min(self.chosen.shape[1], self.kv_heads)

    @property
    def members(self) -> int:
        """Number of heads of a head group that select separately."""
        return self.chosen.shape[1] // self.lanes_of_batch

    @property
    def turns(self) -> int:
        """Number of heads of a head group that share its pairs."""
        return self.heads // self.chosen.shape[1]

    @property
    def pairs(self) -> int:
        """Number of pairs of a head group."""
        return self.members * self.shape[2] * self.slots

    # --- shares

    def shares(self, width: int) -> Iterator[_Share]:
        """Yield all head groups, as many at once as fit the limit on partial results of this width."""
        group_elements, groups = self.pairs * part_width(width), self.shape[0] * self.lanes_of_batch
        group_entries = self.members * self.chosen.shape[2] * self.chosen.shape[3]
        step = max(min(AT_ONCE // (group_elements * self.turns), AT_ONCE // group_entries, groups), 1)
        if step * max(self.pairs, 2 * self.tables.places + 1) >= MOST_PAIRS:
            raise NotInKernelsError("more than 2^31 pairs of rows and blocks")
        turns = min(max(AT_ONCE // group_elements, 1), self.turns)
        for first in range(0, groups, step):
            yield _Share(first, min(step, groups - first), turns)

    def lists(self, stage: ChosenStage, share: _Share) -> SelectedLists:
        """Return the pairs of a share, in tiles of a kernel's size."""
        selected = self.chosen.reshape(-1, self.members, *self.chosen.shape[2:])[
            share.first : share.first + share.lanes
        ]
        return listed(selected, self.tables, self.slots, emit_chosen(self.problem, stage).tiles.q_tile)

    # --- tensors

    def fitting(self, name: str, x: Tensor) -> Tensor:
        """Return the tensor, copied if kernels cannot address it."""
        return fitting(self.name, name, x)

    def stacked(self, name: str, x: Tensor) -> Tensor:
        """Return queries, or similar tensors, with the rows of separately selecting heads concatenated."""
        fitted = self.fitting(name, x)
        if self.members == 1 or fitted.stride(1) == fitted.shape[2] * fitted.stride(2):
            return fitted
        note(self.name, COPY, f"{name}: the rows of separately selecting heads are not contiguous")
        # A single row per head counts as contiguous whatever its stride, but kernels find stacked rows by the stride.
        return self.fitting(name, x.clone(memory_format=torch.contiguous_format))

    def keys(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Return keys and values, contiguous within a block, and the tables of blocks."""
        order = self.tables.order
        ordered = (k, v) if order is None else (x.index_select(2, order) for x in (k, v))
        k, v = ordered
        return {"k": self.fitting("k", k), "v": self.fitting("v", v), **self.tables.named()}

    def room(self, name: str, grad: Tensor) -> Tensor:
        """Allocate gradients of keys or values, contiguous within a block."""
        return self.fitting(name, grad if self.tables.order is None else torch.empty_like(grad))

    def as_given(self, grad: Tensor, written: Tensor) -> Tensor:
        """Return gradients of keys or values in the original order of positions."""
        order = self.tables.order
        if order is not None:
            return grad.index_copy_(2, order, written)
        return grad if written is grad else grad.copy_(written)

    def before(self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
        """Compute the delta of every row for the backward, and its LSE to base 2."""
        lse2, delta = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(2))
        tensors = {
            "out": self.fitting("out", out),
            "dout": grad_out,
            "lse": lse.contiguous(),
            "lse2": lse2,
            "delta": delta,
        }
        if grad_lse is not None:
            tensors["dlse"] = grad_lse.float().contiguous()
        batch, heads, queries = self.shape
        numbers = {"lanes": batch * heads, "heads": heads, "queries": queries}
        launch(emit_delta_of(self.problem, grad_lse is not None), -(-queries // ROWS) * batch * heads, tensors, numbers)
        return {"lse": lse2, "delta": delta}

    # --- kernels

    def gathered(
        self,
        stages: tuple[ChosenStage, ChosenStage],
        share: _Share,
        tensors: Mapping[str, Tensor],
        width: int,
        factor: float,
    ) -> None:
        """Compute the partial results of rows, `width` elements each, and merge them."""
        gathering, joining = stages
        tiles = -(-self.shape[2] // emit_chosen(self.problem, joining).tiles.q_tile)
        for head in range(0, self.turns, share.turns):
            turns = min(share.turns, self.turns - head)
            count = share.lanes * turns * self.pairs
            widths = {"part": part_width(width), **({"part_lse": 1} if joining == "merge" else {})}
            parts = {name: tensors["q"].new_empty(count * n, dtype=torch.float32) for name, n in widths.items()}
            kernel_tensors = {**tensors, **parts}
            numbers = {"turns": turns, "first_head": head, "shared": turns * self.members}
            self._run(gathering, len(kernel_tensors["tiles_of"]) * turns, share, kernel_tensors, numbers, factor)
            self._run(joining, tiles * share.lanes * turns * self.members, share, kernel_tensors, numbers, factor)

    def of_keys(self, share: _Share, tensors: Mapping[str, Tensor], factor: float) -> None:
        """Compute the gradients of keys and values."""
        turns = self.kv_heads // self.lanes_of_batch
        tiles = self.tables.key_tiles(emit_chosen(self.problem, "dkdv").tiles.k_tile)
        numbers = {"kv_lanes": share.lanes * turns, "kv_turns": turns}
        self._run("dkdv", len(tiles) * share.lanes * turns, share, {**tensors, "key_tiles": tiles}, numbers, factor)

    def _run(
        self,
        stage: ChosenStage,
        programs: int,
        share: _Share,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, int],
        factor: float,
    ) -> None:
        call_numbers = {
            "heads": self.heads,
            "queries": self.shape[2],
            "group": self.heads // self.kv_heads,
            "span": self.heads // self.lanes_of_batch,
            "lanes_of_batch": self.lanes_of_batch,
            "first_lane": share.first,
            "lane_pairs": self.pairs,
            "slots": self.slots,
            "none": 2 * self.tables.places,
            "sides": 2 * self.tables.places + 1,
            "scale": factor * LOG2_E,
            **{f"n{i}": x for i, x in enumerate(self.tables.numbers)},
        }
        launch(emit_chosen(self.problem, stage), programs, tensors, {**call_numbers, **numbers})
