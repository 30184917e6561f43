"""The attentions of a pattern one by one, each planned by itself, and what joins them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.attentions import alone, asked, open_choices, rows_of, stateful_alone
from attnc.compiler.kernels.parts import in_parts
from attnc.compiler.kernels.targets import Target
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.cpu_plan import Plan, joined
from attnc.compiler.pooled import PooledKeys, pooled_keys
from attnc.compiler.value_nodes import (
    is_plain,
    is_scored,
    output,
    output_lse,
    passes,
    rank,
    values_of,
)
from attnc.compiler.verify_ir import checked
from attnc.runtime import reference
from attnc.runtime.block_values import BlockValues
from attnc.runtime.branch_relations import BranchRelations
from attnc.runtime.caches import Cache
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.call_shapes import check_alignment
from attnc.runtime.cpu import cpu_decoding, row_attention, scored_attention
from attnc.runtime.cpu.autograd import attend as attend_plain
from attnc.runtime.cpu.autograd import differentiable
from attnc.runtime.cpu.flash_kernel import lse_dtype
from attnc.runtime.cpu.planned_call import PlannedCall, operands_of
from attnc.runtime.cpu.pooled_attention import PooledTensors
from attnc.runtime.cpu.pooled_attention import made as pooled_made
from attnc.runtime.folded import AT_ONCE, entries_at_once, folded
from attnc.runtime.pair_blocks import Operands, PairBlock
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.recent import Recent
from attnc.runtime.selections import listed
from attnc.runtime.selections.call_selections import CallSelections
from attnc.runtime.selections.few_tokens import attend as attend_few_tokens
from attnc.runtime.selections.gather_choices import choice_of
from attnc.runtime.selections.placed import attend as attend_placed
from attnc.runtime.selections.planned import blank_choices_of, plan_of_choices
from attnc.runtime.selections.selected_executor import attend as attend_tokens
from attnc.runtime.selections.sequences import alone as alone_in_call
from attnc.runtime.selections.sequences import by_sequence
from attnc.runtime.settings import SETTINGS
from attnc.runtime.tensor_checks import TensorSizes, as_tensor, blank_choices, call_shape
from attnc.runtime.tuning.tuned import Tuned

if TYPE_CHECKING:
    from attnc.runtime.recurrent.pattern_recurrence import PatternRecurrence

Pair = tuple[Tensor, Tensor]


Run = Callable[[Planner, CallInputs, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Pair]
"""(planner, call, q, k, v, what was given and computed before) → (out, lse) of one attention."""


class PatternExecutor(BranchRelations):
    """The attentions of a pattern as patterns of their own, in their order."""

    def __init__(self, text: str, pattern: ir.Pattern, strict: bool, tuned: Tuned | None = None) -> None:
        super().__init__(pattern)
        self._text = text
        self._strict = strict
        self._tuned = tuned
        self._planners: Recent[Planner] = Recent(SETTINGS.plans)
        self.stateful = _stateful(pattern, strict) if pattern.stateful else []
        """What its branches with a state are, each by itself."""
        if strict:
            self._check_passes()

    def _check_passes(self) -> None:
        for node in self._pattern.nodes:
            count = passes(node)
            if count > 1:
                raise UnsupportedError(
                    f"strict: the weights of `{node.name}` need {count} passes over a row's keys, as one sum needs "
                    f"another one whole; compile it without strict to allow that"
                )

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax."""
        pattern = self._pattern
        if pattern.combine is not None:
            return pattern.lse is not None
        (node,) = pattern.nodes
        return isinstance(node.weights, ir.Softmax) and node.stack is None

    # --- running -----------------------------------------------------------------------------------------------------

    def on_cpu(self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of the pattern, differentiable once; lse is None where it has none."""
        return self._run(q, k, v, given, _on_cpu)

    def on_gpu(self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> tuple[Tensor, Tensor | None]:
        """The same by kernels."""
        return self.by_kernels._run(q, k, v, given, _on_gpu)

    @cached_property
    def by_kernels(self) -> PatternExecutor:
        """The same for kernels: weights that are sums are attentions of their own."""
        parts = in_parts(self._pattern)
        return (
            self if parts is self._pattern else PatternExecutor(f"{self._text}#parts", parts, self._strict, self._tuned)
        )

    @cached_property
    def open(self) -> PatternExecutor:
        """The same where all is seen that may be chosen."""
        return PatternExecutor(f"{self._text}#open", open_choices(self._pattern), False)

    @cached_property
    def _alone(self) -> PatternExecutor:
        """The same of one sequence."""
        return PatternExecutor(f"{self._text}#alone", alone_in_call(self._pattern), self._strict)

    def on_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, given: CallInputs
    ) -> tuple[Tensor, Tensor | None]:
        """The same of queries against a cache, for which k and v only stand; not differentiable."""
        if self._pattern.chooses and self._pattern.documents is not None:
            name = self._pattern.name
            raise UnsupportedError(
                f"decode of `{name}`, which chooses in documents: call it, or cu_seqlens without them"
            )
        joining = [root for root in (self._pattern.combine, self._pattern.lse) if root is not None]
        joined = any(isinstance(below, ir.Vec) and below.tensor != "q" for root in joining for below in root.below)
        if joined or self._pattern.selections:
            k, v = cache.whole(range(len(cache.lengths)), cache.lengths[0])

        def run(
            planner: Planner, given: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]
        ) -> Pair:
            del k, v
            looked = cpu_decoding.look(planner, given.sizes, given.inputs)
            return cpu_decoding.attend(q, cache, looked, given.scale, _real(planner.pattern, known))

        return self._run(q, k, v, given, run)

    def densely(self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> tuple[Tensor, Tensor | None]:
        """The same by the reference, differentiable as often as torch can."""
        return self._run(q, k, v, given, _densely)

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> dict[str, Tensor]:
        """What each selection chooses, by name: bool (batch[, heads or kv heads], rows, places)."""
        pattern = self._pattern
        roots = [root for item in pattern.selections for root in (item.score, item.candidates)]
        read = {below.tensor.name for root in roots for below in root.below if isinstance(below, ir.Element)}
        last = max(
            (i for i, node in enumerate(pattern.nodes) if {output(node).name, output_lse(node).name} & read), default=-1
        )
        check_alignment(pattern, given.sizes)
        choices = CallSelections(pattern, given, (q, k, v), given.real)
        if last >= 0:
            choices = self._of_nodes(q, k, v, given, _on_cpu, pattern.nodes[: last + 1])
        choices.asking({item.given for item in pattern.selections})
        return choices.found

    def _of_nodes(
        self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs, run: Run, nodes: Sequence[ir.Attend] | None = None
    ) -> CallSelections:
        """What is known by name once every attention has run, or those `nodes`, and what was chosen so far."""
        check_alignment(self._pattern, given.sizes)
        known = dict(given.real)
        known |= self._of_states(q, k, v, given, run) if given.states is None else given.states
        choices = CallSelections(self._pattern, given, (q, k, v), known, strict=self._strict)
        for node in self._pattern.nodes if nodes is None else nodes:
            asking = choices.asking(asked([node.visible, *values_of(node)]))
            known[output(node).name], known[output_lse(node).name] = self._node(node, q, k, v, asking, run, known)
        return choices

    def _run(self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs, run: Run) -> tuple[Tensor, Tensor | None]:
        pattern = self._pattern
        if pattern.chooses and pattern.documents is not None:
            return by_sequence(pattern, lambda q, k, v, own: self._alone._run(q, k, v, own, run), q, k, v, given)
        choices = self._of_nodes(q, k, v, given, run)
        known = choices.known
        if pattern.combine is None:
            name = pattern.nodes[0].name
            return known[name].to(q.dtype), known[f"{name}.lse"] if self.has_lse else None
        given = choices.asking(asked([root for root in (pattern.combine, pattern.lse) if root is not None]))
        out = self._combined(pattern.combine, q, k, v, given, known)
        lse = None if pattern.lse is None else self._combined(pattern.lse, q, k, v, given, known)
        return out.to(q.dtype), lse

    def _of_states(self, q: Tensor, k: Tensor, v: Tensor, given: CallInputs, run: Run) -> dict[str, Tensor]:
        """What branches with a state give, by name."""
        tensors = [given.real[tensor.name] for tensor in self._pattern.tensors]
        how = {"dense": run is _densely, "by_kernels": run is _on_gpu}
        outs = [one.attend(q, k, v, given.inputs, tensors, given.scale, **how)[0] for one in self.stateful]
        return self.by_branch(outs)

    def by_branch(self, outs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What each of `stateful` gives, by the names of branches, those of a family as one."""
        found = dict[str, list[Tensor]]()
        for one, out in zip(self.stateful, outs, strict=True):
            found.setdefault(one.recur.name, []).append(out)
        families = {recur.name for recur in self._pattern.stateful if recur.member is not None}
        return {name: torch.stack(parts, 3) if name in families else parts[0] for name, parts in found.items()}

    def _node(
        self,
        node: ir.Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        given: CallInputs,
        run: Run,
        known: Mapping[str, Tensor],
    ) -> Pair:
        if node.family is None:
            return run(self._planner(node, None), given, q, k, v, known)
        members = self._members(node, given.sizes, given.inputs)
        pairs = []
        for i in members:
            planner = self._planner(node, i)
            own = replace(given, inputs=self._own_inputs(planner.pattern, given.inputs))  # not all members ask alike
            pairs.append(run(planner, own, q, k, v, known))
        outs, lses = ([pair[i] for pair in pairs] for i in (0, 1))
        if not pairs:
            empty = q.new_zeros((*q.shape[:3], 0, v.shape[-1]), dtype=lse_dtype(q.dtype))
            return empty, empty[..., 0]
        return torch.stack(outs, 3), torch.stack(lses, 3)

    # --- planning ----------------------------------------------------------------------------------------------------

    def planners(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> list[tuple[str, Planner]]:
        """The planner of every attention, by name."""
        found = []
        for node in self._pattern.nodes:
            if node.family is None:
                found.append((node.name, self._planner(node, None)))
                continue
            for i in self._members(node, sizes, inputs):
                found.append((f"{node.name}[{i}]", self._planner(node, i)))
        return found

    def plan(self, sizes: TensorSizes, inputs: Mapping[str, object], target: Target | None = None) -> Plan:
        """The plans of all attentions in one; `target`: on a GPU."""
        if self._pattern.chooses:
            return self._plan_of_choices(sizes, inputs, target)
        own = self if target is None else self.by_kernels
        planners = own.planners(sizes, inputs)
        plans = [(name, planner.plan_on(target, sizes, inputs)) for name, planner in planners]
        if len(plans) == 1 and own._pattern.combine is None:
            return plans[0][1]
        whole, dtype = joined(plans), getattr(torch, sizes.dtype)
        how = [x.how if target is None else x.how_by_kernels(dtype) for x in self.stateful]
        return replace(whole, reasons=(*whole.reasons, *dict.fromkeys(f"before them {one}" for one in how)))

    def _plan_of_choices(self, sizes: TensorSizes, inputs: Mapping[str, object], target: Target | None) -> Plan:
        """The plan of all that may be chosen, with what is known of the choice before a call."""
        lists = None if target is None else dict(self._listed(sizes, inputs, target))
        return plan_of_choices(self.open.plan(sizes, inputs, target), self._pattern, lists)

    def _listed(self, sizes: TensorSizes, inputs: Mapping[str, object], target: Target) -> Iterator[tuple[str, str]]:
        """Where lists of tiles come from, in words, by attention that asks selections otherwise than for places."""
        from attnc.runtime.gpu.gpu_plan import how_listed

        for node in self._pattern.nodes:
            planner = self._planner(node, None if node.family is None else 0)
            if planner.pattern.selections and choice_of(planner.pattern.attend) is None:
                chosen = blank_choices_of(planner.pattern, sizes, inputs)
                yield node.name, how_listed(planner, sizes, {**inputs, **chosen}, target)

    def mask(self, sizes: TensorSizes, inputs: Mapping[str, object], batch: int, head: int) -> Tensor:
        """`visible`, as a tensor."""
        return torch.from_numpy(self.visible(sizes, inputs, batch, head))

    def _shape_of(self, pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        return call_shape(pattern, sizes, inputs)

    def _pattern_of(self, node: ir.Attend, member: int | None) -> ir.Pattern:
        return self._planner(node, member).pattern

    def _planner(self, node: ir.Attend, member: int | None) -> Planner:
        name, number = node.name, str(self._pattern.nodes.index(node))  # names are the text's own, and in no key
        if member is not None:
            name, number = f"{name}[{member}]", f"{number}[{member}]"

        def make() -> Planner:
            own = alone(self._pattern, node, member)
            return Planner(f"{self._text}#{name}", own, self._strict, self._tuned, number)

        return self._planners.get(name, make)

    # --- combining ---------------------------------------------------------------------------------------------------

    def _combined(
        self, value: ir.Value, q: Tensor, k: Tensor, v: Tensor, given: CallInputs, known: Mapping[str, Tensor]
    ) -> Tensor:
        """A value of every row: (B, Hq, Nq[, width])."""
        chosen = tuple(item.given for item in self._pattern.selections if item.name in given.inputs)
        pattern = replace(rows_of(replace(self._pattern, nodes=())), requirements=())
        pattern = checked(replace(pattern, tensors=pattern.tensors + chosen))
        relations = relations_of(pattern, _on_tokens(pattern, given))
        dtype = lse_dtype(q.dtype)
        vectors = q.unbind(0), k.unbind(0), v.unbind(0)
        sizes, slices = relations.sizes, relations.slices
        operands = Operands(*vectors, known, sizes, slices, given.scale, dtype, self._pattern.origins)
        width = max(q.shape[-1], v.shape[-1])
        numbers = AT_ONCE if pattern.documents is not None else q.shape[1] * max(q.shape[2], k.shape[2]) * width
        batches = []
        for entries in entries_at_once(q.shape[0], numbers, AT_ONCE):
            at_once, heads = folded(operands, entries), tuple(range(q.shape[1] * len(entries)))
            parts = []
            for window in relations.windows(entries.start):
                alive = np.ones((1, window.n_q, 1), dtype=np.bool_)
                block = PairBlock(
                    entries.start, heads, window, np.arange(window.n_q), np.zeros(1, dtype=np.int64), alive
                )
                found = BlockValues(at_once, block).of(value)[:, :, 0]
                parts.append(found.expand(len(heads), window.n_q, *found.shape[2:]))
            own = torch.cat(parts, 1) if parts else q.new_zeros((len(heads), 0, v.shape[-1]), dtype=dtype)
            batches.append(torch.unflatten(own, 0, (len(entries), q.shape[1])))
        if batches and q.shape[2]:
            return torch.cat(batches)
        nothing = q.new_zeros((*q.shape[:3], *([v.shape[-1]] if rank(value) else [])), dtype=dtype)
        return nothing + sum(x.sum() for x in (q, k, v, *known.values()) if x.requires_grad)  # zeros as gradients


def _stateful(pattern: ir.Pattern, strict: bool) -> list[PatternRecurrence]:
    from attnc.runtime.recurrent.pattern_recurrence import PatternRecurrence

    return [PatternRecurrence(stateful_alone(pattern, recur), recur, strict=strict) for recur in pattern.stateful]


def _on_tokens(pattern: ir.Pattern, given: CallInputs) -> CallShape:
    """The shape of a call whose keys are tokens, whatever the attention's are."""
    return replace(call_shape(pattern, given.sizes, given.inputs), n_k=given.sizes.n_k, shift=None)


def _on_cpu(planner: Planner, given: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]) -> Pair:
    """One attention by the executor that is made for it."""
    node = planner.pattern.attend
    pooled = pooled_keys(node) if q.numel() and k.numel() else None
    if pooled is not None:
        keys = _made(planner, given, q, k, v, known, pooled)
        return keys.of_scores(_plainly(planner, replace(given, scale=keys.scale), q, keys.k, keys.v))
    if is_plain(node):
        return _plainly(planner, given, q, k, v)
    plan = listed.plan_of(planner, given) or planner.plan(given.sizes, given.inputs)
    relations = relations_of(planner.pattern, call_shape(planner.pattern, given.sizes, given.inputs))
    call = PlannedCall(plan, relations, given.scale)
    real = _real(planner.pattern, known)
    return (
        scored_attention.attend(q, k, v, call, real) if is_scored(node) else row_attention.attend(q, k, v, call, real)
    )


def _plainly(planner: Planner, given: CallInputs, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """The softmax of `scale * dot(q, k)`, k and v being those of an attention's keys."""
    found = attend_few_tokens(planner, q, k, v, given) or attend_placed(planner, q, k, v, given)
    found = found or attend_tokens(planner, q, k, v, given)
    if found is not None:
        return found
    plan = listed.plan_of(planner, given) or planner.plan(given.sizes, given.inputs)
    if k.shape[1] != plan.kv_heads:  # keys that differ among the heads of a kv head
        own, heads = plan, k.shape[1]
        _, plan = planner.remembered(("heads", id(own), heads), lambda: (own, replace(own, kv_heads=heads)))
    return attend_plain(q, k, v, plan, given.scale)


def _made(
    planner: Planner,
    given: CallInputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: Mapping[str, Tensor],
    pooled: PooledKeys,
) -> PooledTensors:
    """The keys of an attention whose keys are no tokens."""
    relations = relations_of(planner.pattern, call_shape(planner.pattern, given.sizes, given.inputs))
    vectors = q.unbind(0), k.unbind(0), v.unbind(0)
    return pooled_made(operands_of(relations, given.scale, vectors, _real(planner.pattern, known)), relations, pooled)


def _on_gpu(planner: Planner, given: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]) -> Pair:
    """One attention by the kernels that are made for it."""
    from attnc.runtime.gpu import scored_on_gpu
    from attnc.runtime.gpu.gpu_work import OnGpu

    pattern = planner.pattern
    pooled = pooled_keys(pattern.attend) if q.numel() and k.numel() and choice_of(pattern.attend) else None
    if pooled is not None:
        keys = _made(planner, given, q, k, v, known, pooled)
        placed = attend_placed(planner, q, keys.k, keys.v, replace(given, scale=keys.scale), by_kernels=True)
        placed = None if placed is None else keys.of_scores(placed)
    else:
        placed = attend_placed(planner, q, k, v, given, by_kernels=True)
    if placed is not None:
        return placed
    inputs = [known[t.name] if t.is_floating else as_tensor(given.inputs[t.name]) for t in pattern.tensors]
    if is_plain(pattern.attend):
        return differentiable(q, k, v, OnGpu(planner, given.scale), inputs)
    relations = relations_of(pattern, call_shape(pattern, given.sizes, blank_choices(pattern, given.inputs)))
    return scored_on_gpu.attend(q, k, v, relations, given.scale, planner, _real(pattern, known), inputs)


def _densely(planner: Planner, given: CallInputs, q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Tensor]) -> Pair:
    relations = relations_of(planner.pattern, call_shape(planner.pattern, given.sizes, given.inputs))
    real = {tensor.name: known[tensor.name] for tensor in planner.pattern.tensors if tensor.is_floating}
    return reference.attend(q, k, v, relations, given.scale, real)


def _real(pattern: ir.Pattern, known: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [known[tensor.name] for tensor in pattern.tensors if tensor.is_floating]
