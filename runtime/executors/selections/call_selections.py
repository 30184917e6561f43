"""The selections of one call, each computed once, when an attention or another selection first reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis.keeping import most_kept
from attnc.compiler.passes.attentions import choosing, content_masks_of_selection
from attnc.compiler.passes.chosen_counts import with_counts
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.call_shapes import blank_choices
from attnc.runtime.call.tensor_checks import call_shape
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.selections.choose import Choosing
from attnc.runtime.planning.plans import relations_of
from attnc.runtime.values.pair_blocks import Operands


@dataclass(frozen=True)
class CallSelections:
    """The selections of one call, by name.

    `known`: inputs and outputs of attentions, by name, as they become available; `found`: selections computed so far.
    """

    pattern: ir.Pattern
    given: CallInputs
    vectors: tuple[Tensor, Tensor, Tensor]
    known: Mapping[str, Tensor]
    found: dict[str, Tensor] = field(default_factory=dict)
    strict: bool = False

    def asking(self, read: set[ir.Tensor]) -> CallInputs:
        """Return the call, completed with the selections whose bool tensors are in `read`."""
        for item in self.pattern.selections:
            if item.given in read and item.name not in self.found:
                self.found[item.name] = self._chosen(item)
        names = {tensor.name for tensor in read} & self.found.keys()
        return replace(self.given, inputs={**self.given.inputs, **{name: self.found[name] for name in names}})

    def _chosen(self, item: ir.Selection) -> Tensor:
        call = self.asking(content_masks_of_selection(item))
        pattern = choosing(self.pattern, item)
        item, counts = with_counts(item, self.pattern.selections)
        count_tensors = {count.name: self.found[source.name].sum(-1) for count, source in counts.items()}
        inputs = call.inputs if content_masks_of_selection(item) else blank_choices(self.pattern, call.inputs)
        shape = replace(call_shape(pattern, call.sizes, inputs), n_k=call.sizes.n_k, shift=None)
        relations = relations_of(pattern, shape)
        q, k, v = (x.detach() for x in self.vectors)
        operands = Operands(
            q.unbind(0),
            k.unbind(0),
            v.unbind(0),
            {**{name: x.detach() for name, x in self.known.items()}, **count_tensors},
            relations.sizes,
            relations.slices,
            call.scale,
            lse_dtype(q.dtype),
            self.pattern.origins,
            spaced=item.items is not None,
        )
        selector = Choosing(item, relations, call.sizes, operands, q.device)
        if self.strict:
            self._check_count(item, selector.places)
        with torch.no_grad():
            return selector.choose()

    def _check_count(self, item: ir.Selection, places: int) -> None:
        """Raise ArgumentError if the selection would keep every block, so that it has no effect."""
        count = most_kept(item.keep)
        if count is not None and count > places:
            unit = "tokens" if item.items is None else "blocks"
            raise ArgumentError(
                f"strict: `{item.name}` of `{self.pattern.name}` keeps {count} {unit}, but there are only {places}, so "
                f"it selects everything: use a smaller number or more tokens, or compile it without strict"
            )
