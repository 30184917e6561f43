"""Attention to chosen places where inputs tell which tokens a place has: each head has places of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.planning.chosen import ChosenKeys, Places, find_places, find_same_places
from attnc.runtime.call import call_shape
from attnc.runtime.cpu.autograd import Pair, differentiable
from attnc.runtime.cpu.chosen import Chosen
from attnc.runtime.cpu.chosen_by_data import ChosenByData, OwnPlaces
from attnc.runtime.given import Given
from attnc.runtime.plans import Planner, relations_of


@dataclass(frozen=True)
class Lane:
    """Heads of a batch entry that choose alike; `head`: the first of them, `number` of `count`."""

    batch: int
    number: int
    count: int
    heads: slice
    kv_heads: slice

    @property
    def head(self) -> int:
        """The first query head."""
        return int(self.heads.start)

    def of(self, choice: ChosenKeys, found: Tensor) -> Tensor:
        """What its rows chose, (rows, places)."""
        assert choice.chosen is not None
        for dim in choice.chosen.dims[:-2]:
            at = min(self.batch, len(found) - 1) if dim == "batch" else self.number * len(found) // self.count
            found = found[at]
        return found


def lanes_of(choice: ChosenKeys, q: Tensor, k: Tensor) -> Iterator[Lane]:
    """The lanes of a call."""
    heads, kv_heads = q.shape[1], k.shape[1]
    count = heads if choice.by_head else kv_heads if choice.by_heads else min(heads, 1)
    for batch in range(q.shape[0]):
        for i in range(count):
            kv = i * kv_heads // count
            own = slice(i * heads // count, (i + 1) * heads // count)
            yield Lane(batch, i, count, own, slice(kv, max((i + 1) * kv_heads // count, kv + 1)))


def attend(planner: Planner, choice: ChosenKeys, q: Tensor, k: Tensor, v: Tensor, given: Given) -> Pair | None:
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
        places: Places | None
        if choice.chosen is None:
            places = find_same_places(row_of, item_of, rest, shape.n_q, shape.n_k)
            chosen = torch.eye(len(places.starts) - 1, dtype=torch.bool)
        else:
            found = given.inputs[choice.chosen.name]
            chosen = lane.of(choice, found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found)))
            own_row = None if choice.is_by_query else row_of
            places = find_places(own_row, item_of, rest, shape.n_q, shape.n_k, *chosen.shape)
            if places is None:
                return None
        work = Chosen(places, given.scale, by_batch=False, by_heads=False)
        lanes.append(OwnPlaces(lane.batch, lane.heads, lane.kv_heads, chosen, work))
    return differentiable(q, k, v, ChosenByData(lanes), [])
