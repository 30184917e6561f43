"""Attention to selected blocks: the keys of each block, and the executor that gathers the block's queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.keeping import most_kept
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.planning.selected_keys import BlockKeys, SelectedKeys, find_places
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.tensor_checks import call_shape
from attnc.runtime.executors.cpu.autograd import Pair, differentiable
from attnc.runtime.executors.cpu.selected_blocks import SelectedBlocks
from attnc.runtime.executors.selections import by_data
from attnc.runtime.fallbacks import LISTED_PLACES, note
from attnc.runtime.planning.gather_choices import choice_of
from attnc.runtime.planning.plans import Planner, planning, relations_of

NOWHERE = "some token is in no block"


def attend(planner: Planner, call: CallArguments, *, by_kernels: bool = False) -> Pair | None:
    """Compute (out, lse), differentiable once; return None for other relations and where no kernels support the call.

    Raises UnsupportedError if no kernels support the call under `strict`.
    """
    choice = choice_of(planner.pattern.attend)
    if choice is None or planner.pattern.documents is not None:
        return None
    if choice.by_data:
        if by_kernels:
            return _by_data_by_kernels(planner, choice, call)
        result = by_data.attend(planner, choice, call)
        if result is None:
            note(planner.pattern.name, LISTED_PLACES, NOWHERE)
        return result
    assert choice.chosen is not None
    blocks = _places(planner, choice, call)
    selected = call.inputs[choice.chosen.name]
    if blocks is None or not isinstance(selected, Tensor):
        not_a_tensor = "it is given as a list or an array, and not as a tensor"
        note(planner.pattern.name, LISTED_PLACES, NOWHERE if blocks is None else not_a_tensor)
        return None
    if choice.by_batch and selected.shape[0] != call.q.shape[0]:
        selected = selected.expand(call.q.shape[0], *selected.shape[1:])
    if by_kernels:
        return _by_kernels(planner, choice, blocks, selected, call)
    work = SelectedBlocks(blocks, call.scale, by_batch=choice.by_batch, by_heads=choice.by_heads)
    return differentiable(call.q, call.k, call.v, work, [selected])


def _by_data_by_kernels(planner: Planner, choice: SelectedKeys, call: CallArguments) -> Pair | None:
    """Run kernels where inputs say which tokens the blocks of each head hold."""
    from attnc.runtime.executors.triton.sorted_places import attend as run_kernels  # only where kernels run

    return _unless_missing(planner, lambda: run_kernels(planner, choice, call))


def _unless_missing(planner: Planner, run: Callable[[], Pair]) -> Pair | None:
    """Return the result of `run`; None, or UnsupportedError under `strict`, if kernels do not support the call."""
    from attnc.runtime.executors.triton.gpu_work import without_kernels  # only where kernels run

    try:
        return run()
    except NotInKernelsError as error:
        if planner.strict:
            raise UnsupportedError(without_kernels(planner.pattern.name, error)) from error
        note(planner.pattern.name, LISTED_PLACES, f"there are no kernels for {error}")
        return None


def _by_kernels(
    planner: Planner,
    choice: SelectedKeys,
    blocks: BlockKeys,
    selected: Tensor,
    call: CallArguments,
) -> Pair | None:
    from attnc.runtime.executors.triton.selected_on_gpu import SelectedOnGpu  # only where kernels run

    max_blocks, (q, k, v) = _most(planner, choice, call), (call.q, call.k, call.v)
    work = SelectedOnGpu(blocks, call.scale, choice.by_batch, choice.by_heads, max_blocks, planner.pattern.name)
    return _unless_missing(planner, lambda: differentiable(q, k, v, work, [selected.to(q.device)]))


def _most(planner: Planner, choice: SelectedKeys, call: CallArguments) -> int | None:
    """Return how many blocks a row selects at most; None if its selection does not bound the number before the call."""
    item = next((item for item in planner.pattern.selections if item.given is choice.chosen), None)
    count = None if item is None else most_kept(item.keep)
    if item is None or count is None or item.pairs:
        return None
    always = item.always
    if isinstance(always, ir.Truth):
        return None if always.value else count
    if any(isinstance(node, ir.Lookup | ir.HeadIndex) for node in always.below):
        return None
    selection = call.inputs[item.name]
    assert isinstance(selection, Tensor)
    rows, items = selection.shape[-2:]

    def most() -> int:
        relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
        (window,) = relations.windows(0)
        place = window if item.rows is None else replace(window, shift=0)
        always_condition = specialise(always, relations.sizes, relations.slices, place, batch=0, head=0, group=1)
        return count + int(exact_evaluation.mask(always_condition, (0, rows), (0, items)).sum(1).max(initial=0))

    return planner.remembered(("most", call.shape, rows, items), most)


def _places(planner: Planner, choice: SelectedKeys, call: CallArguments) -> BlockKeys | None:
    """Return the keys of each block, computed once for the sizes of a call."""
    assert choice.chosen is not None
    selection, sizes = call.inputs[choice.chosen.name], call.sizes
    rows, items = getattr(selection, "shape", (0, 0))[-2:]

    def find() -> BlockKeys | None:
        pattern = planner.pattern
        shape = call_shape(pattern, sizes, call.inputs)
        relations = relations_of(pattern, shape)
        (window,) = relations.windows(0)
        row_of, item_of, rest = (
            specialise(x, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
            for x in (choice.row_of, choice.item_of, choice.rest)
        )
        return find_places(None if choice.is_by_query else row_of, item_of, rest, shape.n_q, shape.n_k, rows, items)

    def made() -> BlockKeys | None:
        with planning():
            return find()

    return planner.remembered(("places", call.shape, rows, items), made)
