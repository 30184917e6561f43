"""The part of a selection that depends on sizes and inputs alone, kept for the calls that share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.lowering.specialise import Slices
from attnc.compiler.passes.attentions import choosing, content_masks_of_selection
from attnc.compiler.passes.chosen_counts import with_counts
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_shapes import blank_choices
from attnc.runtime.call.tensor_checks import TensorSizes, as_tensor, call_shape, number
from attnc.runtime.executors.selections.head_sums import HeadSum, free_of_rows, head_sums
from attnc.runtime.planning.plans import name_of, relations_of
from attnc.runtime.process.recent import Recent


@dataclass(frozen=True)
class PreparedSelection:
    """A selection of a call of some sizes, with counts of earlier selections as inputs.

    `counts`: the truth tensor that each count is taken from. `slices`: the inputs; truth tensors of earlier selections
    are open, unless the selection is `bound` to those of one call. `specialised`: the cache of operands.
    """

    item: ir.Selection
    counts: Mapping[ir.Tensor, ir.Tensor]
    relations: Relations
    slices: Slices
    sizes: TensorSizes
    specialised: dict[object, ir.Index] = field(default_factory=dict)

    @cached_property
    def rows(self) -> int:
        """The number of rows that select."""
        return self.sizes.n_q if self.item.rows is None else self._number(self.item.rows)

    @cached_property
    def places(self) -> int:
        """The number of blocks (or tokens) among which rows select."""
        return self.sizes.n_k if self.item.items is None else self._number(self.item.items)

    @cached_property
    def sums(self) -> tuple[HeadSum, ...]:
        """The outermost sums over heads in the score."""
        return tuple(head_sums(self.item.score))

    @cached_property
    def free_of_rows(self) -> tuple[ir.Value, ...]:
        """The outermost aggregates of the score that depend on no row."""
        return tuple(free_of_rows(self.item.score))

    @cached_property
    def has_quotients(self) -> bool:
        """Whether the score divides by, or takes the logarithm of, an exponential."""
        below = self.item.score.below
        quotients = (node for node in below if isinstance(node, ir.Apply) and node.op in ("div", "share", "log"))
        operands = (operand for quotient in quotients for operand in quotient.below)
        return any(isinstance(operand, ir.Apply) and operand.op == "exp" for operand in operands)

    @cached_property
    def reads_vectors_by_pair(self) -> bool:
        """Whether the score reads a vector that differs for every row and block."""
        vectors = (node for node in self.item.score.below if isinstance(node, ir.Vec))
        return any({"q", "k"} <= reads(node.at) for node in vectors)

    def _number(self, node: ir.Index) -> int:
        return max(number(node, self.sizes, self.relations.shape.sizes), 0)


def prepare(pattern: ir.Pattern, item: ir.Selection, call: CallArguments) -> PreparedSelection:
    """Prepare a selection for the sizes and inputs of a call, which holds the selections that it reads."""
    own_pattern, is_open = choosing(pattern, item), is_reusable(item)
    inputs = blank_choices(pattern, call.inputs) if is_open else call.inputs
    shape = replace(call_shape(own_pattern, call.sizes, inputs), n_k=call.sizes.n_k, shift=None)
    relations = relations_of(own_pattern, shape)
    counted, counts = with_counts(item, pattern.selections)
    names = frozenset(other.given.name for other in pattern.selections) if is_open else frozenset[str]()
    slices = Slices(relations.slices.tensors, shape.n_k, names)
    return PreparedSelection(counted, counts, relations, slices, call.sizes)


def is_reusable(item: ir.Selection) -> bool:
    """Check whether what is prepared for a selection does not depend on the results of earlier selections.

    Conditions on units, and numbers rounded from real ones, are tabulated from all that they read.
    """
    roots: tuple[ir.Value | ir.Index, ...] = (item.score, item.candidates, item.keep, item.always)
    tabulated = any(isinstance(node, ir.UnitCondition | ir.RoundToInt) for root in roots for node in root.below)
    return not (tabulated and content_masks_of_selection(item))


class PreparedSelections:
    """The prepared selections of calls with the same sizes and inputs, which take `nbytes` bytes."""

    def __init__(self, pattern: ir.Pattern, nbytes: int) -> None:
        self._pattern = pattern
        self.nbytes = nbytes
        self._by_name: dict[str, PreparedSelection] = {}

    def of(self, item: ir.Selection, call: CallArguments) -> PreparedSelection:
        """Return what is prepared for a selection; `call` holds the selections that it reads."""
        if not is_reusable(item):
            return prepare(self._pattern, item, call)
        prepared = self._by_name.get(item.name)
        return self._by_name.setdefault(item.name, prepare(self._pattern, item, call)) if prepared is None else prepared


def prepared_for(kept: Recent[PreparedSelections], pattern: ir.Pattern, given: CallArguments) -> PreparedSelections:
    """Return what is kept for calls like this one; nothing is kept where the host reads inputs of another device."""
    read = {tensor.name for tensor in pattern.tensors if not tensor.is_floating}
    read |= {tensor.made.of for tensor in pattern.tensors if tensor.made is not None}
    inputs = {name: as_tensor(x) for name, x in given.inputs.items() if x is not None}
    on_host = [x for name, x in inputs.items() if name in read]
    new = PreparedSelections(pattern, sum(x.nbytes for x in on_host))
    if any(x.device.type != "cpu" for x in on_host):
        return new
    names = ((name, name_of(x, name in read)) for name, x in sorted(inputs.items()))
    return kept.get((given.sizes, *names), lambda: new)


__all__ = ["PreparedSelection", "PreparedSelections", "is_reusable", "prepare", "prepared_for"]
