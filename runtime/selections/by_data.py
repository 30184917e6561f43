"""Attention to chosen places where inputs tell which tokens a place has: each head has places of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.planning.selected_keys import BlockKeys, SelectedKeys, find_places, find_same_places
from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.cpu.autograd import Guarded, Pair, differentiable
from attnc.runtime.cpu.selected_blocks import SelectedBlocks
from attnc.runtime.cpu.selected_by_data import OwnBlocks, SelectedByData
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.selections.selection_groups import lanes_of
from attnc.runtime.tensor_checks import as_tensor, call_shape


def attend(planner: Planner, choice: SelectedKeys, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> Pair | None:
    """(out, lse) on a CPU, differentiable once; None where a token is in none of the places.

    Places are found anew in every call.
    """
    shape = call_shape(planner.pattern, given.sizes, given.inputs)
    relations = relations_of(planner.pattern, shape)
    (window,) = relations.windows(0)
    group = q.shape[1] // max(k.shape[1], 1)
    lanes = []
    for lane in lanes_of(choice, q, k):
        row_of, item_of, rest = (
            specialise(x, relations.sizes, relations.slices, window, batch=lane.batch, head=lane.head, group=group)
            for x in (choice.row_of, choice.item_of, choice.rest)
        )
        places: BlockKeys | None
        if choice.chosen is None:
            places = find_same_places(row_of, item_of, rest, shape.n_q, shape.n_k)
            chosen = torch.eye(len(places.starts) - 1, dtype=torch.bool)
        else:
            chosen = lane.of(as_tensor(given.inputs[choice.chosen.name]), choice.chosen.dims[:-2])
            own_row = None if choice.is_by_query else row_of
            places = find_places(own_row, item_of, rest, shape.n_q, shape.n_k, *chosen.shape)
            if places is None:
                return None
        work = SelectedBlocks(places, given.scale, by_batch=False, by_heads=False)
        lanes.append(OwnBlocks(lane.batch, lane.heads, lane.kv_heads, chosen, work))
    return differentiable(q, k, v, Guarded(SelectedByData(lanes)), [])
