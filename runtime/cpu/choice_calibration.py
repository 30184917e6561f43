"""Rates of choosing, and of attending to what was chosen: microbenchmarks of primitives, none of a whole pattern."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import fold
from attnc.compiler.fold import truth
from attnc.compiler.lowering.specialise import CallSizes as Named
from attnc.compiler.lowering.specialise import Slices, Window
from attnc.compiler.planning.choice_rates import ChoiceRates
from attnc.compiler.planning.selected_keys import BlockKeys
from attnc.runtime.block_values import BlockValues
from attnc.runtime.cpu import cpu_executor
from attnc.runtime.cpu.selected_blocks import SelectedBlocks, by_place
from attnc.runtime.pair_blocks import Operands, PairBlock
from attnc.runtime.selections.ranking import best, ranked
from attnc.runtime.sums import gathered

HEADS, ROWS, WIDTH = 4, 4096, 64
"""Of a measured choice; with `MANY` places as many scores as a block of rows has."""
FEW, MANY = 16, 128
"""Places between which a row's own cost and a place's are told apart."""
KEPT = 4
COLD, AT_ONCE = 1 << 17, 1 << 10
"""Rows of a tensor that is larger than caches of a core, and rows of a piece."""

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
    """The rates; `time`: nanoseconds of a run."""
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


# --- choosing --------------------------------------------------------------------------------------------------------


def _node(time: Time) -> float:
    """From a choice that does next to nothing."""
    from attnc.runtime.attention import compile_attention
    from attnc.runtime.selections.counted import deciding
    from attnc.runtime.tensor_checks import check_tensors

    attend = compile_attention(SMALL)
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    (item,) = attend._pattern.selections
    nodes = deciding(item, check_tensors(q, k, v), 32, 4).nodes
    with torch.no_grad():
        return time(lambda: attend.chosen(q, k, v)) / nodes


def _ranking(time: Time) -> tuple[float, float]:
    """Of a row, and of each place of it, of which half may be chosen."""

    def ranked_ns(places: int) -> float:
        score = torch.randn(HEADS, ROWS, places)
        candidates = torch.arange(places) < torch.arange(ROWS)[:, None] * places / ROWS
        return time(lambda: best(score, candidates[None], KEPT)) / (HEADS * ROWS)

    few, many = ranked_ns(FEW), ranked_ns(MANY)
    place = max((many - few) / (MANY - FEW), 0.01)
    return max(few - FEW * place, 0.01), place


def _ordered(time: Time) -> float:
    score = torch.randn(1, ROWS, MANY)
    candidates = torch.ones(1, ROWS, MANY, dtype=torch.bool)
    return time(lambda: ranked(score, candidates, with_mass=True)) / score.numel()


def _product(time: Time) -> float:
    q, places = torch.randn(HEADS, ROWS, WIDTH), torch.randn(HEADS, MANY, WIDTH)
    return time(lambda: q @ places.mT) / (HEADS * ROWS * MANY)


def _operation(time: Time) -> float:
    """In a chain, whose results are all kept until its end, as those of a score are, on as many as a block has."""
    x, row = torch.randn(HEADS, ROWS, MANY), torch.randn(HEADS, ROWS, 1)
    shown = torch.arange(MANY) < torch.arange(ROWS)[:, None] * MANY / ROWS
    scale = torch.full((1, 1, 1), 0.125)

    def chain() -> list[Tensor]:
        found = [x * scale]
        found.append(found[-1] - row)
        found.append(found[-1].exp())
        found.append(torch.where(shown, found[-1], 0.0))
        return found

    return time(chain) / (4 * x.numel())


def _test(time: Time) -> float:
    """Of `0 <= q // 32 - k` and `q // 32 - k <= 1`, as a block of rows evaluates it."""
    apart = fold.sub(fold.floordiv(fold.place("q"), fold.const(32)), fold.place("k"))
    condition = fold.conjunction(fold.less_equal(fold.const(0), apart), fold.less_equal(apart, fold.const(1)))
    one = [torch.zeros(1, ROWS, 1)]
    operands = Operands(one, one, one, {}, Named({}), Slices({}), 1.0, torch.float32, {})
    alive = np.ones((1, ROWS, MANY), dtype=np.bool_)
    block = PairBlock(0, (0,), Window(0, 0, ROWS, MANY, 0), np.arange(ROWS), np.arange(MANY), alive)
    pairs = sum({"q", "k"} <= {getattr(below, "name", "") for below in node.below} for node in condition.below)
    return time(lambda: BlockValues(operands, block).holds(condition)) / (pairs * ROWS * MANY)


def _pooled(time: Time) -> float:
    """A number of keys, gathered and added up."""
    keys = torch.randn(HEADS, 2 * ROWS, WIDTH)
    at = torch.arange(2 * ROWS).reshape(1, 1, MANY, -1).permute(3, 0, 1, 2)
    heads = torch.arange(HEADS)[None, :, None, None]
    return time(lambda: gathered(keys, [heads, at]).sum(0)) / keys.numel()


# --- what was chosen -------------------------------------------------------------------------------------------------


def _listed(time: Time) -> float:
    taken = torch.rand(ROWS, MANY) < KEPT / MANY
    return time(lambda: by_place(taken)) / taken.numel()


def _pieces(time: Time) -> tuple[float, float]:
    """Gathered queries that do next to nothing, forward and backward, from a few and twice as many."""
    some, side, width = 8, 32, 16
    few, many = _places_taken(some, side, width), _places_taken(2 * some, side, width)
    forward, backward = ((time(b) - time(a)) / some for a, b in zip(few, many, strict=True))
    return max(forward, 1000.0), max(backward, 1000.0)


def _places_taken(count: int, side: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Attention of so many places of `side` keys, each taken by `side` queries."""
    q, k, v = (torch.randn(1, 1, count * side, width) for _ in range(3))
    taken = torch.eye(count, dtype=torch.bool).repeat_interleave(side, 0)[None, None]
    work = SelectedBlocks(BlockKeys(np.arange(count + 1) * side, None, None, None, truth(True), None), 0.1)
    out, lse = work.forward(q, k, v, [taken])
    return lambda: work.forward(q, k, v, [taken]), lambda: work.backward(out, None, [q, k, v, out, lse, taken])


def _stretches() -> list[Tensor]:
    """Rows of a tensor that no second-level cache holds, as pieces take them: out of order, each once."""
    return list(torch.randperm(COLD).view(-1, AT_ONCE).sort(1).values)


def _taken(time: Time) -> float:
    rows, x = _stretches(), torch.randn(COLD, 1, WIDTH)
    return time(lambda: [x.index_select(0, some) for some in rows]) / x.numel()


def _merged(time: Time) -> float:
    rows, total, log = _stretches(), torch.randn(COLD, 1, WIDTH), torch.randn(COLD, 1)
    o, part = torch.randn(COLD, 1, WIDTH), torch.randn(COLD, 1)

    def merge() -> None:
        for i, some in enumerate(rows):
            of = slice(i * AT_ONCE, (i + 1) * AT_ONCE)
            before, known = total.index_select(0, some), log.index_select(0, some)
            cpu_executor.merge(o[of], part[of], before, known)
            total.index_copy_(0, some, before)
            log.index_copy_(0, some, known)

    return time(merge) / total.numel()


def _added(time: Time) -> float:
    rows, x, grads = _stretches(), torch.randn(COLD, 1, WIDTH), torch.randn(COLD, 1, WIDTH)

    def add() -> None:
        for i, some in enumerate(rows):
            x.index_add_(0, some, grads[i * AT_ONCE : (i + 1) * AT_ONCE])

    return time(add) / x.numel()


__all__ = ["measured_choices"]
