"""Attention whose relation is a choice among places: where they lie, and the executor that gathers queries for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis import exact
from attnc.compiler.keeping import most_kept
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.planning.chosen import ChosenKeys, Places, chosen_keys, find_places, find_same_places
from attnc.compiler.pooled import pooled_keys
from attnc.compiler.values import is_plain
from attnc.runtime.call import call_shape
from attnc.runtime.cpu.autograd import Pair, Work, differentiable
from attnc.runtime.cpu.chosen import Chosen
from attnc.runtime.cpu.chosen_by_data import ChosenByData, OwnPlaces
from attnc.runtime.errors import UnsupportedError
from attnc.runtime.given import Given
from attnc.runtime.plans import Planner, planning, relations_of


def choice_of(node: ir.Attend) -> ChosenKeys | None:
    """The choice that an attention's relation is, if gathered queries serve it."""
    fits = is_plain(node) or pooled_keys(node) is not None
    return chosen_keys(node.visible) if fits and node.family is None else None


def attend(planner: Planner, q: Tensor, k: Tensor, v: Tensor, given: Given, *, by_kernels: bool = False) -> Pair | None:
    """(out, lse) of such an attention, differentiable once; None for any other, and for what there are no kernels for.

    Raises UnsupportedError for the latter under `strict`.
    """
    choice = choice_of(planner.pattern.attend)
    if choice is None or planner.pattern.documents is not None:
        return None
    if choice.by_data:
        return _by_data(planner, choice, q, k, v, given, by_kernels=by_kernels)
    assert choice.chosen is not None
    places = _places(planner, choice, given)
    found = given.inputs[choice.chosen.name]
    if places is None or not isinstance(found, Tensor):
        return None
    if choice.by_batch and found.shape[0] != q.shape[0]:
        found = found.expand(q.shape[0], *found.shape[1:])
    if by_kernels:
        return _by_kernels(planner, choice, places, found, q, k, v, given)
    work = Chosen(places, given.scale, by_batch=choice.by_batch, by_heads=choice.by_heads)
    return differentiable(q, k, v, work, [found])


def _by_data(
    planner: Planner, choice: ChosenKeys, q: Tensor, k: Tensor, v: Tensor, given: Given, *, by_kernels: bool
) -> Pair | None:
    """The same where inputs tell the places of each head, which are found anew in every call."""
    pattern, scale = planner.pattern, given.scale
    shape = call_shape(pattern, given.sizes, given.inputs)
    relations = relations_of(pattern, shape)
    (window,) = relations.windows(0)
    count = q.shape[1] if choice.by_head else k.shape[1] if choice.by_heads else 1
    found = None if choice.chosen is None else given.inputs[choice.chosen.name]
    assert found is None or isinstance(found, Tensor)
    lanes = []
    for batch in range(q.shape[0]):
        for i in range(count):
            head, group = i * q.shape[1] // count, q.shape[1] // max(k.shape[1], 1)
            row_of, item_of, rest = (
                specialise(x, relations.sizes, relations.slices, window, batch=batch, head=head, group=group)
                for x in (choice.row_of, choice.item_of, choice.rest)
            )
            chosen = None if found is None else _of_lane(choice, found, batch, i, count)
            if chosen is None:
                places = find_same_places(row_of, item_of, rest, shape.n_q, shape.n_k)
                own = torch.eye(len(places.starts) - 1, dtype=torch.bool, device=q.device)
            else:
                rows, items = chosen.shape
                placed = find_places(row_of, item_of, rest, shape.n_q, shape.n_k, rows, items)
                if placed is None:
                    return None
                places, own = placed, chosen
            kv = i * k.shape[1] // count
            heads = slice(head, (i + 1) * q.shape[1] // count)
            kv_heads = slice(kv, max((i + 1) * k.shape[1] // count, kv + 1))
            lanes.append(OwnPlaces(batch, heads, kv_heads, places, own, _work(places, scale, by_kernels=by_kernels)))
    return differentiable(q, k, v, ChosenByData(lanes), [])


def _of_lane(choice: ChosenKeys, found: Tensor, batch: int, lane: int, count: int) -> Tensor:
    """What the rows of some heads chose, (rows, places)."""
    assert choice.chosen is not None
    dims = choice.chosen.dims[:-2]
    for dim in dims:
        found = found[min(batch, len(found) - 1)] if dim == "batch" else found[lane * len(found) // count]
    return found


def _work(places: Places, scale: float, *, by_kernels: bool) -> Work:
    if not by_kernels:
        return Chosen(places, scale, by_batch=False, by_heads=False)
    from attnc.runtime.gpu.chosen import ChosenOnGpu

    return ChosenOnGpu(places, scale, False, False, None)


def _by_kernels(
    planner: Planner,
    choice: ChosenKeys,
    places: Places,
    found: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Given,
) -> Pair | None:
    from attnc.runtime.gpu.chosen import ChosenOnGpu
    from attnc.runtime.gpu.work import without_kernels

    most = _most(planner, choice, given)
    work = ChosenOnGpu(places, given.scale, choice.by_batch, choice.by_heads, most)
    try:
        return differentiable(q, k, v, work, [found.to(q.device)])
    except NotInKernelsError as error:
        if planner.strict:
            raise UnsupportedError(without_kernels(planner.pattern.name, error)) from error
        return None


def _most(planner: Planner, choice: ChosenKeys, given: Given) -> int | None:
    """How many places a row chooses at most, by its selection; None where that is not known before."""
    item = next((item for item in planner.pattern.selections if item.given is choice.chosen), None)
    count = None if item is None else most_kept(item.keep)
    if item is None or count is None or item.pairs:
        return None
    always = item.always
    if isinstance(always, ir.Truth):
        return None if always.value else count
    if any(isinstance(node, ir.Lookup | ir.HeadIndex) for node in always.below):
        return None
    found = given.inputs[item.name]
    assert isinstance(found, Tensor)
    rows, items = found.shape[-2:]

    def most() -> int:
        relations = relations_of(planner.pattern, call_shape(planner.pattern, given.sizes, given.inputs))
        (window,) = relations.windows(0)
        place = window if item.rows is None else replace(window, shift=0)
        own = specialise(always, relations.sizes, relations.slices, place, batch=0, head=0, group=1)
        return count + int(exact.mask(own, (0, rows), (0, items)).sum(1).max(initial=0))

    return planner.remembered(("most", given.sizes, rows, items), most)


def _places(planner: Planner, choice: ChosenKeys, given: Given) -> Places | None:
    """Where the places of a call lie, found once for its sizes."""
    assert choice.chosen is not None
    found, sizes = given.inputs[choice.chosen.name], given.sizes
    rows, items = getattr(found, "shape", (0, 0))[-2:]

    def find() -> Places | None:
        pattern = planner.pattern
        shape = call_shape(pattern, sizes, given.inputs)
        relations = relations_of(pattern, shape)
        (window,) = relations.windows(0)
        row_of, item_of, rest = (
            specialise(x, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
            for x in (choice.row_of, choice.item_of, choice.rest)
        )
        return find_places(None if choice.is_by_query else row_of, item_of, rest, shape.n_q, shape.n_k, rows, items)

    def made() -> Places | None:
        with planning():
            return find()

    return planner.remembered(("places", sizes, rows, items), made)
