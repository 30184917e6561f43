"""Attention whose relation is among chosen tokens: which ones, and the executor that gathers them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.selected_tokens import GatheredRelation, Int64, OneSide
from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.cpu.autograd import Guarded, Pair, differentiable
from attnc.runtime.cpu.gathered_tokens import AmongSelected, GatheredHeads
from attnc.runtime.plans import Planner, planning, relations_of
from attnc.runtime.selections.gather_choices import tokens_of
from attnc.runtime.selections.selection_groups import SelectionGroup, lanes_of
from attnc.runtime.tensor_checks import as_tensor, call_shape


def attend(planner: Planner, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> Pair | None:
    """(out, lse) of such an attention on a CPU, differentiable once; None for any other."""
    choice = tokens_of(planner.pattern.attend)
    if choice is None or planner.pattern.documents is not None:
        return None
    relations = relations_of(planner.pattern, call_shape(planner.pattern, given.sizes, given.inputs))
    (window,) = relations.windows(0)
    lanes = []
    for lane in lanes_of(choice, q, k):
        queries, keys = (
            np.arange(n) if side is None else _chosen(side, relations, window, given, lane)
            for side, n in ((choice.queries, window.n_q), (choice.keys, window.n_k))
        )
        if queries is None or keys is None:
            return None
        if len(queries) and len(keys):
            lanes.append(GatheredHeads(lane.batch, lane.heads, lane.kv_heads, queries, keys))

    def rest() -> GatheredRelation:
        with planning():
            own = specialise(choice.rest, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
            return GatheredRelation.of(own, window.n_q, window.n_k)

    found = planner.remembered(("rest", given.shape), rest)
    return differentiable(q, k, v, Guarded(AmongSelected(lanes, found, given.scale)), [])


def _chosen(
    side: OneSide, relations: Relations, window: Window, given: CallInputs, lane: SelectionGroup
) -> Int64 | None:
    """The tokens of a lane, ascending: rows, or keys; None where some token asks for what there is not."""
    found = lane.of(as_tensor(given.inputs[side.chosen.name]), side.chosen.dims[:-2])
    row, item = (
        specialise(x, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
        for x in (side.row, side.item)
    )
    spans = ((0, window.n_q), (0, 1)) if side.place == "q" else ((0, 1), (0, window.n_k))
    if not (spans[0][1] and spans[1][1]):
        return np.zeros(0, dtype=np.int64)
    rows, items = (torch.from_numpy(exact_evaluation.integers(x, *spans).reshape(-1)) for x in (row, item))
    if side.chosen.dims[-2] == "query":  # rows are positions, of which some may have no query
        rows = rows - window.shift
    inside = (rows >= 0) & (rows < found.shape[0]) & (items >= 0) & (items < found.shape[1])
    return found[rows, items].numpy().nonzero()[0] if bool(inside.all()) else None
