"""Attention whose relation is a choice among places: where they lie, and the executor that gathers queries for them."""

from __future__ import annotations

from torch import Tensor
from torch.profiler import record_function

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.planning.chosen import ChosenKeys, Places, chosen_keys, find_places
from attnc.compiler.values import is_plain
from attnc.runtime.call import call_shape
from attnc.runtime.cpu.autograd import Pair, differentiable
from attnc.runtime.cpu.chosen import Chosen
from attnc.runtime.given import Given
from attnc.runtime.plans import PLANNING, Planner, relations_of


def choice_of(node: ir.Attend) -> ChosenKeys | None:
    """The choice that an attention's relation is, if gathered queries serve it."""
    return chosen_keys(node.visible) if is_plain(node) and node.family is None and node.keys is None else None


def attend(planner: Planner, q: Tensor, k: Tensor, v: Tensor, given: Given) -> Pair | None:
    """(out, lse) of such an attention on the CPU, differentiable once; None for any other."""
    choice = choice_of(planner.pattern.attend)
    if choice is None or planner.pattern.documents is not None:
        return None
    places = _places(planner, choice, given)
    if places is None:
        return None
    found = given.inputs[choice.chosen.name]
    if not isinstance(found, Tensor):
        return None
    if choice.by_batch and found.shape[0] != q.shape[0]:
        found = found.expand(q.shape[0], *found.shape[1:])
    work = Chosen(places, given.scale, by_batch=choice.by_batch, by_heads=choice.by_heads)
    return differentiable(q, k, v, work, [found])


def _places(planner: Planner, choice: ChosenKeys, given: Given) -> Places | None:
    """Where the places of a call lie, found once for its sizes."""
    found, sizes = given.inputs[choice.chosen.name], given.sizes
    rows, items = getattr(found, "shape", (0, 0))[-2:]

    def find() -> Places | None:
        pattern = planner.pattern
        relations = relations_of(pattern, call_shape(pattern, sizes, given.inputs))
        (window,) = relations.windows(0)
        row_of, item_of, rest = (
            specialise(x, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
            for x in (choice.row_of, choice.item_of, choice.rest)
        )
        return find_places(None if choice.is_by_query else row_of, item_of, rest, sizes.n_q, sizes.n_k, rows, items)

    def made() -> Places | None:
        with record_function(PLANNING):
            return find()

    return planner.remembered(("places", sizes, rows, items), made)
