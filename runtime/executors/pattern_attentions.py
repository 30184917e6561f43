"""The attentions of a pattern, each planned as a pattern of its own, and their combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import output, output_lse, passes, rank, values_of
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.parts import in_parts
from attnc.compiler.passes.attentions import alone, content_masks, open_choices, rows_of, stateful_alone
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.cpu_plan import Plan, joined
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.call_shapes import check_alignment
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape
from attnc.runtime.choices.tuned import Tuned
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.executor_protocol import Pair, PartRunner
from attnc.runtime.executors.selections.call_selections import CallSelections
from attnc.runtime.executors.selections.planned import blank_choices_of, plan_of_choices
from attnc.runtime.executors.selections.prepared import PreparedSelections
from attnc.runtime.executors.selections.sequences import alone as alone_in_call
from attnc.runtime.executors.selections.sequences import by_sequence
from attnc.runtime.planning.branch_relations import BranchRelations
from attnc.runtime.planning.gather_choices import choice_of
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.folded import AT_ONCE, entries_at_once, folded
from attnc.runtime.values.pair_blocks import Operands, PairBlock

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence


class PatternAttentions(BranchRelations):
    """The attentions of a pattern in their order; an executor runs each as a pattern of its own."""

    def __init__(self, text: str, pattern: ir.Pattern, strict: bool, tuned: Tuned | None = None) -> None:
        super().__init__(pattern)
        self._text = text
        self._strict = strict
        self._tuned = tuned
        self._planners: Recent[Planner] = Recent(SETTINGS.plans)
        self._prepared: Recent[PreparedSelections] = Recent(
            SETTINGS.plans, SETTINGS.plan_bytes, lambda prepared: prepared.nbytes
        )
        self.stateful = _stateful(pattern, strict) if pattern.stateful else []
        """The recurrences of the pattern's branches with a state, each separately."""
        if strict:
            self._check_passes()

    def _check_passes(self) -> None:
        for node in self._pattern.nodes:
            count = passes(node)
            if count > 1:
                raise UnsupportedError(
                    f"strict: the weights of `{node.name}` need {count} passes over a row's keys, because a sum needs "
                    f"the result of another; compile without strict to allow this"
                )

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax, which has a log-sum-exp."""
        pattern = self._pattern
        if pattern.combine is not None:
            return pattern.lse is not None
        (node,) = pattern.nodes
        return isinstance(node.weights, ir.Softmax) and node.stack is None

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, call: CallArguments, runner: PartRunner) -> tuple[Tensor, Tensor | None]:
        """Return (out, lse) of a call, its attentions and states run by `runner`; lse is None where there is none."""
        if runner.splits_sums and self._in_parts is not self:
            return self._in_parts.run(call, runner)
        pattern = self._pattern
        if pattern.chooses and pattern.documents is not None:
            return by_sequence(pattern, lambda sequence: self._alone.run(sequence, runner), call)
        choices = self._run_nodes(call, runner)
        known = choices.known
        if pattern.combine is None:
            name = pattern.nodes[0].name
            return known[name].to(call.q.dtype), known[f"{name}.lse"] if self.has_lse else None
        call = choices.asking(content_masks([root for root in (pattern.combine, pattern.lse) if root is not None]))
        out = self._combined(pattern.combine, call, known)
        lse = None if pattern.lse is None else self._combined(pattern.lse, call, known)
        return out.to(call.q.dtype), lse

    @cached_property
    def _in_parts(self) -> PatternAttentions:
        """The attentions for kernels, in which weights that are sums are split into attentions."""
        parts = in_parts(self._pattern)
        return (
            self
            if parts is self._pattern
            else PatternAttentions(f"{self._text}#parts", parts, self._strict, self._tuned)
        )

    @cached_property
    def open(self) -> PatternAttentions:
        """The attentions of the pattern in which everything that may be selected is visible."""
        return PatternAttentions(f"{self._text}#open", open_choices(self._pattern), False)

    @cached_property
    def _alone(self) -> PatternAttentions:
        """The attentions of the pattern for one sequence."""
        return PatternAttentions(f"{self._text}#alone", alone_in_call(self._pattern), self._strict)

    @property
    def needs_keys(self) -> bool:
        """Whether a call against a cache reads whole keys: to select, or to combine attentions."""
        joining = [root for root in (self._pattern.combine, self._pattern.lse) if root is not None]
        joins = any(isinstance(below, ir.Vec) and below.tensor != "q" for root in joining for below in root.below)
        return joins or bool(self._pattern.selections)

    def chosen(self, call: CallArguments, runner: PartRunner) -> dict[str, Tensor]:
        """Return the result of each selection by name: bool (batch[, heads or kv heads], rows, items)."""
        pattern = self._pattern
        roots = [root for item in pattern.selections for root in (item.score, item.candidates)]
        read = {below.tensor.name for root in roots for below in root.below if isinstance(below, ir.Element)}
        last = max(
            (i for i, node in enumerate(pattern.nodes) if {output(node).name, output_lse(node).name} & read), default=-1
        )
        check_alignment(pattern, call.sizes)
        choices = CallSelections(pattern, call, (call.q, call.k, call.v), call.tensors, kept=self._prepared)
        if last >= 0:
            choices = self._run_nodes(call, runner, pattern.nodes[: last + 1])
        choices.asking({item.given for item in pattern.selections})
        return choices.found

    def _run_nodes(
        self, call: CallArguments, runner: PartRunner, nodes: Sequence[ir.Attend] | None = None
    ) -> CallSelections:
        """Run every attention, or `nodes` alone; return the selections, with all tensors by name computed so far."""
        check_alignment(self._pattern, call.sizes)
        known = dict(call.tensors)
        if call.states is None:
            known |= self.by_branch([runner.recurrence(recurrence, call)[0] for recurrence in self.stateful])
        else:
            known |= call.states
        vectors = call.q, call.k, call.v
        choices = CallSelections(self._pattern, call, vectors, known, strict=self._strict, kept=self._prepared)
        for node in self._pattern.nodes if nodes is None else nodes:
            asking = choices.asking(self._masks_read[node.name]) if self._pattern.selections else call
            known[node.name], known[f"{node.name}.lse"] = self._node(node, asking, runner, known)
        return choices

    @cached_property
    def _masks_read(self) -> Mapping[str, set[ir.Tensor]]:
        """The truth tensors that each attention reads, by its name."""
        return {node.name: content_masks([node.visible, *values_of(node)]) for node in self._pattern.nodes}

    def by_branch(self, outs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the outputs of `stateful` by branch name, with the members of a family stacked."""
        outs_by_name = dict[str, list[Tensor]]()
        for recurrence, out in zip(self.stateful, outs, strict=True):
            outs_by_name.setdefault(recurrence.recur.name, []).append(out)
        families = {recur.name for recur in self._pattern.stateful if recur.member is not None}
        return {name: torch.stack(parts, 3) if name in families else parts[0] for name, parts in outs_by_name.items()}

    def _node(self, node: ir.Attend, call: CallArguments, runner: PartRunner, known: Mapping[str, Tensor]) -> Pair:
        if node.family is None:
            return runner.attention(self._planner(node, None), call, known)
        pairs = []
        for i in self._members(node, call.sizes, call.inputs):
            planner = self._planner(node, i)
            inputs = self._own_inputs(planner.pattern, call.inputs)  # members may read different inputs
            pairs.append(runner.attention(planner, replace(call, inputs=inputs), known))
        outs, lses = ([pair[i] for pair in pairs] for i in (0, 1))
        if not pairs:
            width = call.v.shape[-1]
            empty = call.q.new_zeros((*call.q.shape[:3], 0, width), dtype=lse_dtype(call.q.dtype))
            return empty, empty[..., 0]
        return torch.stack(outs, 3), torch.stack(lses, 3)

    # --- planning ----------------------------------------------------------------------------------------------------

    def planners(
        self, sizes: TensorSizes, inputs: Mapping[str, object], *, splits_sums: bool = False
    ) -> list[tuple[str, Planner]]:
        """Return the planner of every attention, by name; `splits_sums`: of the attentions that kernels run."""
        if splits_sums and self._in_parts is not self:
            return self._in_parts.planners(sizes, inputs)
        planners = []
        for node in self._pattern.nodes:
            if node.family is None:
                planners.append((node.name, self._planner(node, None)))
                continue
            for i in self._members(node, sizes, inputs):
                planners.append((f"{node.name}[{i}]", self._planner(node, i)))
        return planners

    def plan(self, sizes: TensorSizes, inputs: Mapping[str, object], runner: PartRunner) -> Plan:
        """Return the plans of all attentions joined, each made by `runner`."""
        if self._pattern.chooses:
            return plan_of_choices(
                self.open.plan(sizes, inputs, runner), self._pattern, self._lists(sizes, inputs, runner)
            )
        if runner.splits_sums and self._in_parts is not self:
            return self._in_parts.plan(sizes, inputs, runner)
        plans = [(name, runner.attention_plan(part, sizes, inputs)) for name, part in self.planners(sizes, inputs)]
        if len(plans) == 1 and self._pattern.combine is None:
            return plans[0][1]
        whole, dtype = joined(plans), getattr(torch, sizes.dtype)
        hows = [runner.recurrence_plan(recurrence, dtype) for recurrence in self.stateful]
        return replace(whole, reasons=(*whole.reasons, *dict.fromkeys(f"before them {how}" for how in hows)))

    def _lists(self, sizes: TensorSizes, inputs: Mapping[str, object], runner: PartRunner) -> dict[str, str] | None:
        """Return the source of the tile list, by attention that reads selections other than by place."""
        lists: dict[str, str] = {}
        for node in self._pattern.nodes if runner.lists_tiles else ():
            planner = self._planner(node, None if node.family is None else 0)
            if planner.pattern.selections and choice_of(planner.pattern.attend) is None:
                chosen = blank_choices_of(planner.pattern, sizes, inputs)
                lists[node.name] = runner.listing(planner, sizes, {**inputs, **chosen})
        return lists if runner.lists_tiles else None

    def mask(self, sizes: TensorSizes, inputs: Mapping[str, object], batch: int, head: int) -> Tensor:
        """Return `visible` as a tensor."""
        return torch.from_numpy(self.visible(sizes, inputs, batch, head))

    def _shape_of(self, pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        return call_shape(pattern, sizes, inputs)

    def _pattern_of(self, node: ir.Attend, member: int | None) -> ir.Pattern:
        return self._planner(node, member).pattern

    def _planner(self, node: ir.Attend, member: int | None) -> Planner:
        name, number = node.name, str(self._pattern.nodes.index(node))  # a cache key has no names of the text
        if member is not None:
            name, number = f"{name}[{member}]", f"{number}[{member}]"

        def make() -> Planner:
            pattern = alone(self._pattern, node, member)
            return Planner(f"{self._text}#{name}", pattern, self._strict, self._tuned, number)

        return self._planners.get(name, make)

    # --- combining ---------------------------------------------------------------------------------------------------

    def _combined(self, value: ir.Value, call: CallArguments, known: Mapping[str, Tensor]) -> Tensor:
        """Compute a value of every row: (B, Hq, Nq[, width])."""
        q, k, v = call.q, call.k, call.v
        chosen = tuple(item.given for item in self._pattern.selections if item.name in call.inputs)
        pattern = replace(rows_of(replace(self._pattern, nodes=())), requirements=())
        pattern = checked(replace(pattern, tensors=pattern.tensors + chosen))
        relations = relations_of(pattern, _on_tokens(pattern, call))
        dtype = lse_dtype(q.dtype)
        vectors = q.unbind(0), k.unbind(0), v.unbind(0)
        sizes, slices = relations.sizes, relations.slices
        operands = Operands(*vectors, known, sizes, slices, call.scale, dtype, self._pattern.origins)
        width = max(q.shape[-1], v.shape[-1])
        numbers = AT_ONCE if pattern.documents is not None else q.shape[1] * max(q.shape[2], k.shape[2]) * width
        batches = []
        for entries in entries_at_once(q.shape[0], numbers, AT_ONCE):
            at_once, heads = folded(operands, entries), tuple(range(q.shape[1] * len(entries)))
            parts = []
            for window in relations.windows(entries.start):
                active = np.ones((1, window.n_q, 1), dtype=np.bool_)
                block = PairBlock(
                    entries.start, heads, window, np.arange(window.n_q), np.zeros(1, dtype=np.int64), active
                )
                value_rows = BlockValues(at_once, block).of(value)[:, :, 0]
                parts.append(value_rows.expand(len(heads), window.n_q, *value_rows.shape[2:]))
            heads_and_rows = torch.cat(parts, 1) if parts else q.new_zeros((len(heads), 0, v.shape[-1]), dtype=dtype)
            batches.append(torch.unflatten(heads_and_rows, 0, (len(entries), q.shape[1])))
        if batches and q.shape[2]:
            return torch.cat(batches)
        zeros = q.new_zeros((*q.shape[:3], *([v.shape[-1]] if rank(value) else [])), dtype=dtype)
        # The sum makes the gradients zeros instead of None.
        return zeros + sum(x.sum() for x in (q, k, v, *known.values()) if x.requires_grad)


def _stateful(pattern: ir.Pattern, strict: bool) -> list[PatternRecurrence]:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence  # only for recurrences

    return [PatternRecurrence(stateful_alone(pattern, recur), recur, strict=strict) for recur in pattern.stateful]


def _on_tokens(pattern: ir.Pattern, call: CallArguments) -> CallShape:
    """Return the shape of a call whose keys are tokens, even where the attention's keys are not."""
    return replace(call_shape(pattern, call.sizes, call.inputs), n_k=call.sizes.n_k, shift=None)
