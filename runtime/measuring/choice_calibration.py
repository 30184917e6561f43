"""Rates of selections, and of attention to selected blocks: microbenchmarks of primitives, not of whole patterns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import fold
from attnc.compiler.ir.fold import truth
from attnc.compiler.lowering.specialise import CallSizes as Named
from attnc.compiler.lowering.specialise import Slices, Window
from attnc.compiler.planning.rates import ChoiceRates
from attnc.compiler.planning.selected_keys import BlockKeys
from attnc.runtime.executors.cpu import work_items
from attnc.runtime.executors.cpu.selected_blocks import SelectedBlocks, by_place
from attnc.runtime.executors.selections.ranking import best, ranked
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import Operands, PairBlock
from attnc.runtime.values.sums import gathered

HEADS, ROWS, WIDTH = 4, 4096, 64
"""Sizes of a measured selection; with `MANY` blocks it has as many scores as one block of rows."""
FEW, MANY = 16, 128
"""Numbers of blocks that separate the cost of a row from the cost of a block."""
KEPT = 4
COLD, AT_ONCE = 1 << 17, 1 << 10
"""Number of rows of a tensor larger than a core's caches, and number of rows of a piece."""

SMALL = """pattern small(block: int = 8)
    align end
    select chosen
        over   b = k // block
        score  dot(q, mean(b.k))
        from   b.end <= q
        keep   rank < 2
        always q in b
    visible k in chosen
"""

Time = Callable[[Callable[[], object]], float]


def measured_choices(time: Time) -> ChoiceRates:
    """Measure the rates; `time` returns the nanoseconds of a run."""
    row, place = _ranking(time)
    forward, backward = _pieces(time)
    return ChoiceRates(
        node=_node(time),
        row=row,
        place=place,
        ordered=_ordered(time),
        product=_product(time),
        operation=_operation(time),
        test=_test(time),
        pooled=_pooled(time),
        listed=_listed(time),
        piece=forward,
        piece_backward=backward,
        taken=_taken(time),
        merged=_merged(time),
        added=_added(time),
    )


# --- selections ------------------------------------------------------------------------------------------------------


def _node(time: Time) -> float:
    """Measure nanoseconds per node of a nearly empty selection."""
    from attnc.runtime.api.compile_attention import compile_attention  # only to measure
    from attnc.runtime.call.tensor_checks import check_tensors  # only to measure
    from attnc.runtime.executors.selections.counted import deciding  # only to measure

    attend = compile_attention(SMALL)
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    (item,) = attend._pattern.selections
    nodes = deciding(item, check_tensors(q, k, v), 32, 4).nodes
    with torch.no_grad():
        return time(lambda: attend.chosen(q, k, v)) / nodes


def _ranking(time: Time) -> tuple[float, float]:
    """Measure nanoseconds per row, and per block of it, where half of the blocks are candidates."""

    def ranked_ns(blocks: int) -> float:
        score = torch.randn(HEADS, ROWS, blocks)
        candidates = torch.arange(blocks) < torch.arange(ROWS)[:, None] * blocks / ROWS
        return time(lambda: best(score, candidates[None], KEPT)) / (HEADS * ROWS)

    few, many = ranked_ns(FEW), ranked_ns(MANY)
    place = max((many - few) / (MANY - FEW), 0.01)
    return max(few - FEW * place, 0.01), place


def _ordered(time: Time) -> float:
    score = torch.randn(1, ROWS, MANY)
    candidates = torch.ones(1, ROWS, MANY, dtype=torch.bool)
    return time(lambda: ranked(score, candidates, with_mass=True)) / score.numel()


def _product(time: Time) -> float:
    q, block_keys = torch.randn(HEADS, ROWS, WIDTH), torch.randn(HEADS, MANY, WIDTH)
    return time(lambda: q @ block_keys.mT) / (HEADS * ROWS * MANY)


def _operation(time: Time) -> float:
    """Measure nanoseconds per operation in a chain that keeps all results to its end, as scores do, on a full block."""
    x, row = torch.randn(HEADS, ROWS, MANY), torch.randn(HEADS, ROWS, 1)
    mask = torch.arange(MANY) < torch.arange(ROWS)[:, None] * MANY / ROWS
    scale = torch.full((1, 1, 1), 0.125)

    def chain() -> list[Tensor]:
        values = [x * scale]
        values.append(values[-1] - row)
        values.append(values[-1].exp())
        values.append(torch.where(mask, values[-1], 0.0))
        return values

    return time(chain) / (4 * x.numel())


def _test(time: Time) -> float:
    """Measure nanoseconds per test of `0 <= q // 32 - k` and `q // 32 - k <= 1`, as a block of rows evaluates it."""
    apart = fold.sub(fold.floordiv(fold.place("q"), fold.const(32)), fold.place("k"))
    condition = fold.conjunction(fold.less_equal(fold.const(0), apart), fold.less_equal(apart, fold.const(1)))
    placeholder = [torch.zeros(1, ROWS, 1)]
    operands = Operands(placeholder, placeholder, placeholder, {}, Named({}), Slices({}), 1.0, torch.float32, {})
    active = np.ones((1, ROWS, MANY), dtype=np.bool_)
    block = PairBlock(0, (0,), Window(0, 0, ROWS, MANY, 0), np.arange(ROWS), np.arange(MANY), active)
    pairs = sum({"q", "k"} <= {getattr(operand, "name", "") for operand in node.below} for node in condition.below)
    return time(lambda: BlockValues(operands, block).holds(condition)) / (pairs * ROWS * MANY)


def _pooled(time: Time) -> float:
    """Measure nanoseconds per element of keys that is gathered and summed."""
    keys = torch.randn(HEADS, 2 * ROWS, WIDTH)
    at = torch.arange(2 * ROWS).reshape(1, 1, MANY, -1).permute(3, 0, 1, 2)
    heads = torch.arange(HEADS)[None, :, None, None]
    return time(lambda: gathered(keys, [heads, at]).sum(0)) / keys.numel()


# --- attention to selected blocks -------------------------------------------------------------------------------------


def _listed(time: Time) -> float:
    taken = torch.rand(ROWS, MANY) < KEPT / MANY
    return time(lambda: by_place(taken)) / taken.numel()


def _pieces(time: Time) -> tuple[float, float]:
    """Measure nanoseconds per nearly empty block of gathered queries, forward and backward.

    The rates are differences between a few blocks and twice as many.
    """
    count, side, width = 8, 32, 16
    few, many = _places_taken(count, side, width), _places_taken(2 * count, side, width)
    forward, backward = ((time(b) - time(a)) / count for a, b in zip(few, many, strict=True))
    return max(forward, 1000.0), max(backward, 1000.0)


def _places_taken(count: int, side: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return forward and backward of attention to `count` blocks of `side` keys, each selected by `side` queries."""
    q, k, v = (torch.randn(1, 1, count * side, width) for _ in range(3))
    taken = torch.eye(count, dtype=torch.bool).repeat_interleave(side, 0)[None, None]
    work = SelectedBlocks(BlockKeys(np.arange(count + 1) * side, None, None, None, truth(True), None), 0.1)
    out, lse = work.forward(q, k, v, [taken])
    return lambda: work.forward(q, k, v, [taken]), lambda: work.backward(out, None, [q, k, v, out, lse, taken])


def _stretches() -> list[Tensor]:
    """Return row indices of a tensor beyond the second-level cache, in pieces, unordered, each row once."""
    return list(torch.randperm(COLD).view(-1, AT_ONCE).sort(1).values)


def _taken(time: Time) -> float:
    rows, x = _stretches(), torch.randn(COLD, 1, WIDTH)
    return time(lambda: [x.index_select(0, piece_index) for piece_index in rows]) / x.numel()


def _merged(time: Time) -> float:
    rows, total, log = _stretches(), torch.randn(COLD, 1, WIDTH), torch.randn(COLD, 1)
    o, part = torch.randn(COLD, 1, WIDTH), torch.randn(COLD, 1)

    def merge() -> None:
        for i, piece_index in enumerate(rows):
            piece_rows = slice(i * AT_ONCE, (i + 1) * AT_ONCE)
            old_out, old_lse = total.index_select(0, piece_index), log.index_select(0, piece_index)
            work_items.merge(o[piece_rows], part[piece_rows], old_out, old_lse)
            total.index_copy_(0, piece_index, old_out)
            log.index_copy_(0, piece_index, old_lse)

    return time(merge) / total.numel()


def _added(time: Time) -> float:
    rows, x, grads = _stretches(), torch.randn(COLD, 1, WIDTH), torch.randn(COLD, 1, WIDTH)

    def add() -> None:
        for i, piece_index in enumerate(rows):
            x.index_add_(0, piece_index, grads[i * AT_ONCE : (i + 1) * AT_ONCE])

    return time(add) / x.numel()
