"""The selections of one call, each computed once, when an attention or another selection first reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis.keeping import most_kept
from attnc.compiler.passes.attentions import content_masks_of_selection
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.call_shapes import input_array
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.selections.choose import Choosing
from attnc.runtime.executors.selections.prepared import PreparedSelections, prepared_for
from attnc.runtime.process.recent import Recent
from attnc.runtime.values.pair_blocks import Operands


@dataclass(frozen=True)
class CallSelections:
    """The selections of one call, by name.

    `known`: inputs and outputs of attentions, by name, as they become available; `found`: selections computed so far.
    `kept`: selections prepared for earlier calls of the same pattern.
    """

    pattern: ir.Pattern
    given: CallArguments
    vectors: tuple[Tensor, Tensor, Tensor]
    known: Mapping[str, Tensor]
    found: dict[str, Tensor] = field(default_factory=dict)
    strict: bool = False
    kept: Recent[PreparedSelections] = field(default_factory=partial(Recent, 1))
    _tables: dict[object, object] = field(default_factory=dict)

    def asking(self, read: set[ir.Tensor]) -> CallArguments:
        """Return the call, completed with the selections whose bool tensors are in `read`."""
        for item in self.pattern.selections:
            if item.given in read and item.name not in self.found:
                self.found[item.name] = self._chosen(item)
        names = {tensor.name for tensor in read} & self.found.keys()
        return replace(self.given, inputs={**self.given.inputs, **{name: self.found[name] for name in names}})

    def _chosen(self, item: ir.Selection) -> Tensor:
        call = self.asking(content_masks_of_selection(item))
        prepared = self._prepared.of(item, call)
        counts = {count.name: self.found[source.name].sum(-1) for count, source in prepared.counts.items()}
        masks = {tensor for tensor in content_masks_of_selection(prepared.item) if tensor.name in self.found}
        operands = Operands(
            *self._entries,
            {**{name: x.detach() for name, x in self.known.items()}, **counts},
            prepared.relations.sizes,
            prepared.slices,
            call.scale,
            lse_dtype(self.vectors[0].dtype),
            self.pattern.origins,
            spaced=item.items is not None,
            masks={tensor.name: input_array(self.pattern, tensor, call.inputs[tensor.name]) for tensor in masks},
            specialised=prepared.specialised,
            tables=self._tables,
        )
        selector = Choosing(prepared, operands, self.vectors[0].device)
        if self.strict:
            self._check_count(item, prepared.places)
        with torch.no_grad():
            return selector.choose()

    @cached_property
    def _prepared(self) -> PreparedSelections:
        """The part of the selections that depends on the call's sizes and inputs, kept for calls that share them."""
        return prepared_for(self.kept, self.pattern, self.given)

    @cached_property
    def _entries(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Per batch entry q, k and v, without gradients: the same tensors for every selection, which share results."""
        q, k, v = (x.detach().unbind(0) for x in self.vectors)
        return q, k, v

    def _check_count(self, item: ir.Selection, places: int) -> None:
        """Raise ArgumentError if the selection would keep every block, so that it has no effect."""
        count = most_kept(item.keep)
        if count is not None and count > places:
            unit = "tokens" if item.items is None else "blocks"
            raise ArgumentError(
                f"strict: `{item.name}` of `{self.pattern.name}` keeps {count} {unit}, but there are only {places}, so "
                f"it selects everything: use a smaller number or more tokens, or compile it without strict"
            )
