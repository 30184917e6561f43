"""Executor of patterns with several attentions: plans each attention separately and combines their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis.pooled import PooledKeys, pooled_keys
from attnc.compiler.ir.value_nodes import (
    is_plain,
    is_scored,
    output,
    output_lse,
    passes,
    rank,
    values_of,
)
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.parts import in_parts
from attnc.compiler.kernels.targets import Target
from attnc.compiler.passes.attentions import (
    alone,
    content_masks,
    open_choices,
    rows_of,
    stateful_alone,
)
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.cpu_plan import Plan, joined
from attnc.runtime.call.caches import Cache
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.call_shapes import check_alignment
from attnc.runtime.call.tensor_checks import (
    TensorSizes,
    as_tensor,
    blank_choices,
    call_shape,
)
from attnc.runtime.choices.tuned import Tuned
from attnc.runtime.executors.cpu import cpu_decoding, row_attention, scored_attention
from attnc.runtime.executors.cpu.autograd import attend as attend_plain
from attnc.runtime.executors.cpu.autograd import differentiable
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.cpu.planned_call import PlannedCall, operands_of
from attnc.runtime.executors.cpu.pooled_attention import PooledTensors
from attnc.runtime.executors.cpu.pooled_attention import made as pooled_made
from attnc.runtime.executors.reference import reference
from attnc.runtime.executors.selections import listed
from attnc.runtime.executors.selections.call_selections import CallSelections
from attnc.runtime.executors.selections.few_tokens import attend as attend_few_tokens
from attnc.runtime.executors.selections.placed import attend as attend_placed
from attnc.runtime.executors.selections.planned import blank_choices_of, plan_of_choices
from attnc.runtime.executors.selections.prepared import PreparedSelections
from attnc.runtime.executors.selections.selected_executor import attend as attend_tokens
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

Pair = tuple[Tensor, Tensor]


Run = Callable[[Planner, CallInputs, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Pair]
"""A function (planner, call, q, k, v, tensors given and computed before) → (out, lse) of one attention."""


class PatternExecutor(BranchRelations):
    """Executor that runs the attentions of a pattern in order, each as a pattern of its own."""

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

    def on_cpu(self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs) -> tuple[Tensor, Tensor | None]:
        """Return (out, lse) of the pattern, differentiable once; lse is None where the pattern has none."""
        return self._run(q, k, v, call, _on_cpu)

    def on_gpu(self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs) -> tuple[Tensor, Tensor | None]:
        """Return (out, lse) of the pattern, computed by kernels."""
        return self.by_kernels._run(q, k, v, call, _on_gpu)

    @cached_property
    def by_kernels(self) -> PatternExecutor:
        """The executor for kernels, in which weights that are sums are split into attentions."""
        parts = in_parts(self._pattern)
        return (
            self if parts is self._pattern else PatternExecutor(f"{self._text}#parts", parts, self._strict, self._tuned)
        )

    @cached_property
    def open(self) -> PatternExecutor:
        """The executor of the pattern in which everything that may be selected is visible."""
        return PatternExecutor(f"{self._text}#open", open_choices(self._pattern), False)

    @cached_property
    def _alone(self) -> PatternExecutor:
        """The executor of the pattern for one sequence."""
        return PatternExecutor(f"{self._text}#alone", alone_in_call(self._pattern), self._strict)

    def on_cache(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, call: CallInputs) -> tuple[Tensor, Tensor | None]:
        """Return (out, lse) of queries against a cache; k and v only give shapes. Not differentiable."""
        if self._pattern.chooses and self._pattern.documents is not None:
            name = self._pattern.name
            raise UnsupportedError(
                f"decode of `{name}` is not supported, because it selects within documents: call it without a cache"
            )
        joining = [root for root in (self._pattern.combine, self._pattern.lse) if root is not None]
        joined = any(isinstance(below, ir.Vec) and below.tensor != "q" for root in joining for below in root.below)
        if joined or self._pattern.selections:
            k, v = cache.whole(range(len(cache.lengths)), cache.lengths[0])

        def run(
            planner: Planner, call: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]
        ) -> Pair:
            del k, v
            decoding = cpu_decoding.look(planner, call.sizes, call.inputs)
            return cpu_decoding.attend(q, cache, decoding, call.scale, _real(planner.pattern, known))

        return self._run(q, k, v, call, run)

    def densely(self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs) -> tuple[Tensor, Tensor | None]:
        """Return (out, lse) by the dense reference, differentiable as often as torch allows."""
        return self._run(q, k, v, call, _densely)

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs) -> dict[str, Tensor]:
        """Return the result of each selection by name: bool (batch[, heads or kv heads], rows, items)."""
        pattern = self._pattern
        roots = [root for item in pattern.selections for root in (item.score, item.candidates)]
        read = {below.tensor.name for root in roots for below in root.below if isinstance(below, ir.Element)}
        last = max(
            (i for i, node in enumerate(pattern.nodes) if {output(node).name, output_lse(node).name} & read), default=-1
        )
        check_alignment(pattern, call.sizes)
        choices = CallSelections(pattern, call, (q, k, v), call.real, kept=self._prepared)
        if last >= 0:
            choices = self._run_nodes(q, k, v, call, _on_cpu, pattern.nodes[: last + 1])
        choices.asking({item.given for item in pattern.selections})
        return choices.found

    def _run_nodes(
        self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs, run: Run, nodes: Sequence[ir.Attend] | None = None
    ) -> CallSelections:
        """Run every attention, or `nodes` alone; return the selections, with all tensors by name computed so far."""
        check_alignment(self._pattern, call.sizes)
        known = dict(call.real)
        known |= self._run_states(q, k, v, call, run) if call.states is None else call.states
        choices = CallSelections(self._pattern, call, (q, k, v), known, strict=self._strict, kept=self._prepared)
        for node in self._pattern.nodes if nodes is None else nodes:
            asking = choices.asking(self._masks_read[node.name]) if self._pattern.selections else call
            known[node.name], known[f"{node.name}.lse"] = self._node(node, q, k, v, asking, run, known)
        return choices

    @cached_property
    def _masks_read(self) -> Mapping[str, set[ir.Tensor]]:
        """The truth tensors that each attention reads, by its name."""
        return {node.name: content_masks([node.visible, *values_of(node)]) for node in self._pattern.nodes}

    def _run(self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs, run: Run) -> tuple[Tensor, Tensor | None]:
        pattern = self._pattern
        if pattern.chooses and pattern.documents is not None:
            return by_sequence(pattern, lambda q, k, v, own: self._alone._run(q, k, v, own, run), q, k, v, call)
        choices = self._run_nodes(q, k, v, call, run)
        known = choices.known
        if pattern.combine is None:
            name = pattern.nodes[0].name
            return known[name].to(q.dtype), known[f"{name}.lse"] if self.has_lse else None
        call = choices.asking(content_masks([root for root in (pattern.combine, pattern.lse) if root is not None]))
        out = self._combined(pattern.combine, q, k, v, call, known)
        lse = None if pattern.lse is None else self._combined(pattern.lse, q, k, v, call, known)
        return out.to(q.dtype), lse

    def _run_states(self, q: Tensor, k: Tensor, v: Tensor, call: CallInputs, run: Run) -> dict[str, Tensor]:
        """Return the outputs of branches with a state, by name."""
        tensors = [call.real[tensor.name] for tensor in self._pattern.tensors]
        executor = {"dense": run is _densely, "by_kernels": run is _on_gpu}
        outs = [
            recurrence.attend(q, k, v, call.inputs, tensors, call.scale, **executor)[0] for recurrence in self.stateful
        ]
        return self.by_branch(outs)

    def by_branch(self, outs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the outputs of `stateful` by branch name, with the members of a family stacked."""
        outs_by_name = dict[str, list[Tensor]]()
        for recurrence, out in zip(self.stateful, outs, strict=True):
            outs_by_name.setdefault(recurrence.recur.name, []).append(out)
        families = {recur.name for recur in self._pattern.stateful if recur.member is not None}
        return {name: torch.stack(parts, 3) if name in families else parts[0] for name, parts in outs_by_name.items()}

    def _node(
        self,
        node: ir.Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: CallInputs,
        run: Run,
        known: Mapping[str, Tensor],
    ) -> Pair:
        if node.family is None:
            return run(self._planner(node, None), call, q, k, v, known)
        members = self._members(node, call.sizes, call.inputs)
        pairs = []
        for i in members:
            planner = self._planner(node, i)
            inputs = self._own_inputs(planner.pattern, call.inputs)  # members may read different inputs
            member_call = replace(call, inputs=inputs)
            pairs.append(run(planner, member_call, q, k, v, known))
        outs, lses = ([pair[i] for pair in pairs] for i in (0, 1))
        if not pairs:
            empty = q.new_zeros((*q.shape[:3], 0, v.shape[-1]), dtype=lse_dtype(q.dtype))
            return empty, empty[..., 0]
        return torch.stack(outs, 3), torch.stack(lses, 3)

    # --- planning ----------------------------------------------------------------------------------------------------

    def planners(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> list[tuple[str, Planner]]:
        """Return the planner of every attention, by name."""
        planners = []
        for node in self._pattern.nodes:
            if node.family is None:
                planners.append((node.name, self._planner(node, None)))
                continue
            for i in self._members(node, sizes, inputs):
                planners.append((f"{node.name}[{i}]", self._planner(node, i)))
        return planners

    def plan(self, sizes: TensorSizes, inputs: Mapping[str, object], target: Target | None = None) -> Plan:
        """Return the plans of all attentions joined; with `target`, the plans on that GPU."""
        if self._pattern.chooses:
            return self._plan_of_choices(sizes, inputs, target)
        executor = self if target is None else self.by_kernels
        planners = executor.planners(sizes, inputs)
        plans = [(name, _plan_on(target, planner, sizes, inputs)) for name, planner in planners]
        if len(plans) == 1 and executor._pattern.combine is None:
            return plans[0][1]
        whole, dtype = joined(plans), getattr(torch, sizes.dtype)
        hows = [x.how if target is None else x.how_by_kernels(dtype) for x in self.stateful]
        return replace(whole, reasons=(*whole.reasons, *dict.fromkeys(f"before them {how}" for how in hows)))

    def _plan_of_choices(self, sizes: TensorSizes, inputs: Mapping[str, object], target: Target | None) -> Plan:
        """Return the plan of everything that may be selected, with the facts known about selections before a call."""
        lists = None if target is None else dict(self._listed(sizes, inputs, target))
        return plan_of_choices(self.open.plan(sizes, inputs, target), self._pattern, lists)

    def _listed(self, sizes: TensorSizes, inputs: Mapping[str, object], target: Target) -> Iterator[tuple[str, str]]:
        """Yield (attention name, source of its tile list) for attentions that read selections other than by place."""
        from attnc.runtime.executors.triton.gpu_plan import how_listed  # only where kernels run

        for node in self._pattern.nodes:
            planner = self._planner(node, None if node.family is None else 0)
            if planner.pattern.selections and choice_of(planner.pattern.attend) is None:
                chosen = blank_choices_of(planner.pattern, sizes, inputs)
                yield node.name, how_listed(planner, sizes, {**inputs, **chosen}, target)

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

    def _combined(
        self, value: ir.Value, q: Tensor, k: Tensor, v: Tensor, call: CallInputs, known: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute a value of every row: (B, Hq, Nq[, width])."""
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


def _plan_on(target: Target | None, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
    """Return the plan of an attention on a GPU, or on the CPU for None."""
    if target is None:
        return cpu_plans(planner).plan(sizes, inputs)
    from attnc.runtime.executors.triton.gpu_plan import plan_on_gpu  # only where kernels run

    return plan_on_gpu(planner, sizes, inputs, target)


def _stateful(pattern: ir.Pattern, strict: bool) -> list[PatternRecurrence]:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence  # only for recurrences

    return [PatternRecurrence(stateful_alone(pattern, recur), recur, strict=strict) for recur in pattern.stateful]


def _on_tokens(pattern: ir.Pattern, call: CallInputs) -> CallShape:
    """Return the shape of a call whose keys are tokens, even where the attention's keys are not."""
    return replace(call_shape(pattern, call.sizes, call.inputs), n_k=call.sizes.n_k, shift=None)


def _on_cpu(planner: Planner, call: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]) -> Pair:
    """Run one attention by the executor made for it."""
    node = planner.pattern.attend
    plain, pooled = planner.remembered("plain and pooled", lambda: (is_plain(node), pooled_keys(node)))
    if pooled is not None and q.numel() and k.numel():
        keys = _pooled_tensors(planner, call, q, k, v, known, pooled)
        return keys.of_scores(_plainly(planner, replace(call, scale=keys.scale), q, keys.k, keys.v))
    if plain:
        return _plainly(planner, call, q, k, v)
    plan = listed.plan_of(planner, call) or cpu_plans(planner).plan(call.sizes, call.inputs)
    relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
    planned = PlannedCall(plan, relations, call.scale)
    real = _real(planner.pattern, known)
    return (
        scored_attention.attend(q, k, v, planned, real)
        if is_scored(node)
        else row_attention.attend(q, k, v, planned, real)
    )


def _plainly(planner: Planner, call: CallInputs, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Compute softmax attention with scores `scale * dot(q, k)`; k and v belong to the attention's keys."""
    pair = attend_few_tokens(planner, q, k, v, call) or attend_placed(planner, q, k, v, call)
    pair = pair or attend_tokens(planner, q, k, v, call)
    if pair is not None:
        return pair
    plan = listed.plan_of(planner, call) or cpu_plans(planner).plan(call.sizes, call.inputs)
    if k.shape[1] != plan.kv_heads:  # heads of one kv head have different keys
        original, heads = plan, k.shape[1]
        _, plan = planner.remembered(
            ("heads", id(original), heads), lambda: (original, replace(original, kv_heads=heads))
        )
    return attend_plain(q, k, v, plan, call.scale)


def _pooled_tensors(
    planner: Planner,
    call: CallInputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: Mapping[str, Tensor],
    pooled: PooledKeys,
) -> PooledTensors:
    """Compute the keys and values of an attention whose keys are pooled."""
    relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
    vectors = q.unbind(0), k.unbind(0), v.unbind(0)
    return pooled_made(operands_of(relations, call.scale, vectors, _real(planner.pattern, known)), relations, pooled)


def _on_gpu(planner: Planner, call: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]) -> Pair:
    """Run one attention by the kernels made for it."""
    from attnc.runtime.executors.triton import scored_on_gpu  # only where kernels run
    from attnc.runtime.executors.triton.gpu_work import OnGpu  # only where kernels run

    pattern = planner.pattern
    pooled = pooled_keys(pattern.attend) if q.numel() and k.numel() and choice_of(pattern.attend) else None
    if pooled is not None:
        keys = _pooled_tensors(planner, call, q, k, v, known, pooled)
        placed = attend_placed(planner, q, keys.k, keys.v, replace(call, scale=keys.scale), by_kernels=True)
        placed = None if placed is None else keys.of_scores(placed)
    else:
        placed = attend_placed(planner, q, k, v, call, by_kernels=True)
    if placed is not None:
        return placed
    inputs = [known[t.name] if t.is_floating else as_tensor(call.inputs[t.name]) for t in pattern.tensors]
    if is_plain(pattern.attend):
        return differentiable(q, k, v, OnGpu(planner, call.scale), inputs)
    relations = relations_of(pattern, call_shape(pattern, call.sizes, blank_choices(pattern, call.inputs)))
    return scored_on_gpu.attend(q, k, v, relations, call.scale, planner, _real(pattern, known), inputs)


def _densely(planner: Planner, call: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]) -> Pair:
    relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
    real = {tensor.name: known[tensor.name] for tensor in planner.pattern.tensors if tensor.is_floating}
    return reference.attend(q, k, v, relations, call.scale, real)


def _real(pattern: ir.Pattern, known: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [known[tensor.name] for tensor in pattern.tensors if tensor.is_floating]
