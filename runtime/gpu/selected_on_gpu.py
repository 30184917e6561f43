"""Attention to chosen places by kernels: for each place the queries that chose it are gathered, and meet its keys.

What is chosen stays on the device, and no host waits for it: lists of pairs are sorted there, grids are as large as
they can become, and spare programs find nothing to do. A query's parts are merged by log-sum-exp in the order of its
places, and the gradients of a place's keys are sums of one program: nothing is atomic, the same input gives the same
bits, and what other queries choose changes no bit of a query's output.
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
from attnc.runtime.cpu.autograd import Pair, Triple
from attnc.runtime.cpu.cpu_executor import empty_like
from attnc.runtime.fallbacks import COPY, note
from attnc.runtime.gpu.device_targets import target_of
from attnc.runtime.gpu.gpu_executor import fitting, on, scaled_queries
from attnc.runtime.gpu.launch import launch
from attnc.runtime.gpu.selected_lists import SelectedLists, Tables, listed, tables_of

AT_ONCE = 1 << 28
"""Numbers that queries get from their places before these are put together: at most so many, unless one head does."""

MOST_PAIRS = 1 << 31
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class SelectedOnGpu:
    """The work of one call; the input of `forward` and `backward` is what was chosen, ([batch,] [heads,] rows, places).

    `by_batch`, `by_heads`: whether it has batch entries and heads. `most`: places that a row chooses at most, None for
    all of them; of a row that chooses more the first so many count. `places`: also as tables, on the device already.
    `name`: the pattern's.
    """

    places: BlockKeys | Tables
    scale: float
    by_batch: bool = True
    by_heads: bool = True
    most: int | None = None
    name: str = ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """(out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv).

        Raises NotInKernelsError where there are no kernels for it.
        """
        call = self._called(q, k, v, inputs)
        out = empty_like(q, (*q.shape[:3], v.shape[-1]), q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if call.is_empty:
            return out.zero_(), lse.fill_(-math.inf)
        own, factor = scaled_queries(q, self.scale)
        written, width = call.fitting("out", out), v.shape[-1]
        tensors = {"q": call.stacked("q", own), **call.keys(k, v), "out": written, "lse": lse}
        with on(q):
            for share in call.shares(width):
                lists = call.lists("forward", share)
                call.gathered(("forward", "merge"), share, {**tensors, **lists._asdict()}, width, factor)
        return (out if written is out else out.copy_(written)), lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """(dq, dk, dv). Rows that see nothing give exactly 0. Raises NotInKernelsError as `forward` does."""
        q, k, v, out, lse, *inputs = kept
        call = self._called(q, k, v, inputs)
        dq, dk, dv = (empty_like(x, x.shape, x.dtype) for x in (q, k, v))
        if call.is_empty:
            return dq.zero_(), dk.zero_(), dv.zero_()
        own, factor = scaled_queries(q, self.scale)
        written, width = [call.fitting("dq", dq), call.room("dk", dk), call.room("dv", dv)], q.shape[-1]
        tensors = {"q": call.stacked("q", own), **call.keys(k, v), "dout": call.stacked("dout", grad_out)}
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
        (chosen,) = inputs
        for x in (q, k, v):
            if x.dtype not in DTYPES or x.dtype != q.dtype:
                raise NotInKernelsError(f"chosen places with {str(x.dtype).removeprefix('torch.')}")
        heads, kv_heads = q.shape[1], k.shape[1]
        places = self.places
        tables = places if isinstance(places, Tables) else tables_of(places, q.shape[2], q.device)
        own = chosen if self.by_batch else chosen[None]
        own = own if self.by_heads else own[:, None]
        own = own.expand(q.shape[0], *own.shape[1:])
        stacked = own.shape[1] > kv_heads
        count = own.shape[-1] if self.most is None else min(self.most, own.shape[-1])
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
        return _SelectedCall(problem, tables, own, count, tuple(q.shape[:3]), kv_heads, self.name)


class _Share(NamedTuple):
    """Lanes that are done together, and how many of the heads that share their pairs."""

    first: int
    lanes: int
    turns: int


@dataclass(frozen=True, eq=False)
class _SelectedCall:
    """One call. `chosen` (batch, heads that choose, rows, places); `slots`: places of a row at most.

    A lane is a batch entry and heads that choose alike, or, where these are fewer, heads that share keys: then it has
    the rows of all of them.
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
        """Whether nothing is seen."""
        return not (min(*self.shape, self.problem.dk, self.problem.dv, self.slots) and self.tables.sides)

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.shape[1]

    @property
    def lanes_of_batch(self) -> int:
        """Lanes of a batch entry."""
        return min(self.chosen.shape[1], self.kv_heads)

    @property
    def members(self) -> int:
        """Heads of a lane that choose for themselves."""
        return self.chosen.shape[1] // self.lanes_of_batch

    @property
    def turns(self) -> int:
        """Heads of a lane that share its pairs."""
        return self.heads // self.chosen.shape[1]

    @property
    def pairs(self) -> int:
        """Pairs of a lane."""
        return self.members * self.shape[2] * self.slots

    # --- shares

    def shares(self, width: int) -> Iterator[_Share]:
        """All lanes, as many together as there is room for what rows of a width get from their places."""
        each, lanes = self.pairs * part_width(width), self.shape[0] * self.lanes_of_batch
        chosen = self.members * self.chosen.shape[2] * self.chosen.shape[3]
        step = max(min(AT_ONCE // (each * self.turns), AT_ONCE // chosen, lanes), 1)
        if step * max(self.pairs, 2 * self.tables.places + 1) >= MOST_PAIRS:
            raise NotInKernelsError("more than 2^31 pairs of rows and places")
        turns = min(max(AT_ONCE // each, 1), self.turns)
        for first in range(0, lanes, step):
            yield _Share(first, min(step, lanes - first), turns)

    def lists(self, stage: ChosenStage, share: _Share) -> SelectedLists:
        """The pairs of a share, in tiles as a kernel takes them."""
        own = self.chosen.reshape(-1, self.members, *self.chosen.shape[2:])[share.first : share.first + share.lanes]
        return listed(own, self.tables, self.slots, emit_chosen(self.problem, stage).tiles.q_tile)

    # --- tensors

    def fitting(self, name: str, x: Tensor) -> Tensor:
        """The tensor, copied where kernels cannot address it."""
        return fitting(self.name, name, x)

    def stacked(self, name: str, x: Tensor) -> Tensor:
        """Queries, or what is like them, as kernels take them: rows of heads that choose for themselves as one."""
        own = self.fitting(name, x)
        if self.members == 1 or own.stride(1) == own.shape[2] * own.stride(2):
            return own
        note(self.name, COPY, f"{name}: the rows of heads that choose for themselves do not lie one after another")
        # One row of each head is contiguous whatever its stride, which rows of stacked heads are found by.
        return self.fitting(name, x.clone(memory_format=torch.contiguous_format))

    def keys(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Keys and values, those of a place side by side, and the tables of places."""
        order = self.tables.order
        own = (k, v) if order is None else (x.index_select(2, order) for x in (k, v))
        k, v = own
        return {"k": self.fitting("k", k), "v": self.fitting("v", v), **self.tables.named()}

    def room(self, name: str, grad: Tensor) -> Tensor:
        """Memory for gradients of keys or values, those of a place side by side."""
        return self.fitting(name, grad if self.tables.order is None else torch.empty_like(grad))

    def as_given(self, grad: Tensor, written: Tensor) -> Tensor:
        """Gradients of keys or values at their own positions."""
        order = self.tables.order
        if order is not None:
            return grad.index_copy_(2, order, written)
        return grad if written is grad else grad.copy_(written)

    def before(self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
        """What every row contributes to the backward, and its LSE to base 2."""
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
        """What rows of a width get from their places, and that put together."""
        gathering, joining = stages
        tiles = -(-self.shape[2] // emit_chosen(self.problem, joining).tiles.q_tile)
        for head in range(0, self.turns, share.turns):
            turns = min(share.turns, self.turns - head)
            count = share.lanes * turns * self.pairs
            each = {"part": part_width(width), **({"part_lse": 1} if joining == "merge" else {})}
            parts = {name: tensors["q"].new_empty(count * n, dtype=torch.float32) for name, n in each.items()}
            own = {**tensors, **parts}
            numbers = {"turns": turns, "first_head": head, "shared": turns * self.members}
            self._run(gathering, len(own["tiles_of"]) * turns, share, own, numbers, factor)
            self._run(joining, tiles * share.lanes * turns * self.members, share, own, numbers, factor)

    def of_keys(self, share: _Share, tensors: Mapping[str, Tensor], factor: float) -> None:
        """The gradients of keys and values."""
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
        known = {
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
        launch(emit_chosen(self.problem, stage), programs, tensors, {**known, **numbers})
