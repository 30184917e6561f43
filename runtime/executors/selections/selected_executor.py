"""Attention among selected tokens: the tokens of each head group, and the executor that gathers them."""

from __future__ import annotations

import numpy as np
import torch

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.selected_tokens import GatheredRelation, Int64, OneSide
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import as_tensor, call_shape
from attnc.runtime.executors.cpu.autograd import Pair, differentiable
from attnc.runtime.executors.cpu.gathered_tokens import AmongSelected, GatheredHeads
from attnc.runtime.executors.selections.selection_groups import SelectionGroup, head_groups_of
from attnc.runtime.planning.gather_choices import tokens_of
from attnc.runtime.planning.plans import Planner, planning, relations_of


def attend(planner: Planner, call: CallArguments) -> Pair | None:
    """Compute (out, lse) of attention among selected tokens on a CPU, differentiable once; None for other relations."""
    choice = tokens_of(planner.pattern.attend)
    if choice is None or planner.pattern.documents is not None:
        return None
    relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
    (window,) = relations.windows(0)
    head_groups = []
    for head_group in head_groups_of(choice, call.q, call.k):
        queries, keys = (
            np.arange(n) if side is None else _chosen(side, relations, window, call, head_group)
            for side, n in ((choice.queries, window.n_q), (choice.keys, window.n_k))
        )
        if queries is None or keys is None:
            return None
        if len(queries) and len(keys):
            head_groups.append(GatheredHeads(head_group.batch, head_group.heads, head_group.kv_heads, queries, keys))

    def rest() -> GatheredRelation:
        with planning():
            rest_condition = specialise(
                choice.rest, relations.sizes, relations.slices, window, batch=0, head=0, group=1
            )
            return GatheredRelation.of(rest_condition, window.n_q, window.n_k)

    relation = planner.remembered(("rest", call.shape), rest)
    return differentiable(call.q, call.k, call.v, AmongSelected(head_groups, relation, call.scale), [])


def _chosen(
    side: OneSide, relations: Relations, window: Window, call: CallArguments, head_group: SelectionGroup
) -> Int64 | None:
    """Return the selected tokens of a head group, ascending; None if a token reads an entry that is out of range."""
    selected = head_group.of(as_tensor(call.inputs[side.chosen.name]), side.chosen.dims[:-2])
    row, item = (
        specialise(x, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
        for x in (side.row, side.item)
    )
    spans = ((0, window.n_q), (0, 1)) if side.place == "q" else ((0, 1), (0, window.n_k))
    if not (spans[0][1] and spans[1][1]):
        return np.zeros(0, dtype=np.int64)
    rows, items = (torch.from_numpy(exact_evaluation.integers(x, *spans).reshape(-1)) for x in (row, item))
    if side.chosen.dims[-2] == "query":  # rows are positions, and a position may have no query
        rows = rows - window.shift
    inside = (rows >= 0) & (rows < selected.shape[0]) & (items >= 0) & (items < selected.shape[1])
    return selected[rows, items].numpy().nonzero()[0] if bool(inside.all()) else None
