"""Attention to selected blocks where inputs say which tokens a block holds; every head group has its own blocks."""

from __future__ import annotations

import torch

from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.planning.selected_keys import BlockKeys, SelectedKeys, find_places, find_same_places
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import as_tensor, call_shape
from attnc.runtime.executors.cpu.autograd import Pair, differentiable
from attnc.runtime.executors.cpu.selected_blocks import SelectedBlocks
from attnc.runtime.executors.cpu.selected_by_data import OwnBlocks, SelectedByData
from attnc.runtime.executors.selections.selection_groups import head_groups_of
from attnc.runtime.planning.plans import Planner, relations_of


def attend(planner: Planner, choice: SelectedKeys, call: CallArguments) -> Pair | None:
    """Compute (out, lse) on a CPU, differentiable once; return None if some token is in no block.

    The blocks are computed anew in every call.
    """
    shape = call_shape(planner.pattern, call.sizes, call.inputs)
    relations = relations_of(planner.pattern, shape)
    (window,) = relations.windows(0)
    q, k, v = call.q, call.k, call.v
    group_size = q.shape[1] // max(k.shape[1], 1)
    head_groups = []
    for head_group in head_groups_of(choice, q, k):
        row_of, item_of, rest = (
            specialise(
                x,
                relations.sizes,
                relations.slices,
                window,
                batch=head_group.batch,
                head=head_group.head,
                group=group_size,
            )
            for x in (choice.row_of, choice.item_of, choice.rest)
        )
        blocks: BlockKeys | None
        if choice.chosen is None:
            blocks = find_same_places(row_of, item_of, rest, shape.n_q, shape.n_k)
            selected = torch.eye(len(blocks.starts) - 1, dtype=torch.bool)
        else:
            selected = head_group.of(as_tensor(call.inputs[choice.chosen.name]), choice.chosen.dims[:-2])
            row_index = None if choice.is_by_query else row_of
            blocks = find_places(row_index, item_of, rest, shape.n_q, shape.n_k, *selected.shape)
            if blocks is None:
                return None
        work = SelectedBlocks(blocks, call.scale, by_batch=False, by_heads=False)
        head_groups.append(OwnBlocks(head_group.batch, head_group.heads, head_group.kv_heads, selected, work))
    return differentiable(q, k, v, SelectedByData(head_groups), [])
