"""Attention to selected blocks by kernels where inputs define each head's blocks, without making the host wait."""

from __future__ import annotations

import torch
from torch.nn import functional

from attnc.compiler.kernels.selected.selected_problem import rest_text
from attnc.compiler.lowering.specialise import CallSizes as SizesByName
from attnc.compiler.lowering.specialise import Slices, specialise
from attnc.compiler.planning.documents import whole
from attnc.compiler.planning.selected_keys import SelectedKeys
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import as_tensor, blank, call_shape
from attnc.runtime.executors.cpu.autograd import Pair, differentiable
from attnc.runtime.executors.cpu.selected_by_data import OwnBlocks, SelectedByData
from attnc.runtime.executors.selections.selection_groups import head_groups_of
from attnc.runtime.executors.triton.selected_on_gpu import SelectedOnGpu
from attnc.runtime.executors.triton.sorted_places import Numbering, sorted_tables
from attnc.runtime.planning.plans import Planner


def attend(planner: Planner, choice: SelectedKeys, call: CallArguments) -> Pair:
    """Compute (out, lse), differentiable once. Raises NotInKernelsError if the device cannot compute block numbers."""
    pattern, sizes, (q, k, v) = planner.pattern, call.sizes, (call.q, call.k, call.v)
    names = {tensor.name for tensor in pattern.tensors}
    shape = call_shape(pattern, sizes, {name: blank(x) for name, x in call.inputs.items() if name in names})
    window = whole(shape.n_q, shape.n_k, pattern.align)
    named, one_head = SizesByName(shape.sizes), {"batch": 0, "head": 0, "group": 1}
    rest, numbers = rest_text(specialise(choice.rest, named, Slices({}), window, **one_head))
    inputs = {name: as_tensor(x) for name, x in call.inputs.items()}
    head_groups = []
    for head_group in head_groups_of(choice, q, k):
        reading = Numbering(inputs, sizes, shape.sizes, head_group.batch, head_group.head, window.shift, q.device)
        items = reading.of(choice.item_of, "k")
        rows = torch.arange(shape.n_q, device=q.device)
        rows = rows if choice.is_by_query else reading.of(choice.row_of, "q")
        if choice.chosen is None:
            blocks = max(reading.bound(choice.row_of), reading.bound(choice.item_of))
            selected, max_blocks = torch.eye(blocks, dtype=torch.bool, device=q.device), 1
        else:
            selected = head_group.of(inputs[choice.chosen.name], choice.chosen.dims[:-2]).to(q.device)
            blocks = max_blocks = selected.shape[-1]
        tables = sorted_tables(rows.expand(shape.n_q), items.expand(shape.n_k), blocks, rest, numbers)
        work = SelectedOnGpu(tables, call.scale, by_batch=False, by_heads=False, most=max_blocks, name=pattern.name)
        head_groups.append(
            OwnBlocks(head_group.batch, head_group.heads, head_group.kv_heads, functional.pad(selected, (0, 1)), work)
        )
    return differentiable(q, k, v, SelectedByData(head_groups), [])
