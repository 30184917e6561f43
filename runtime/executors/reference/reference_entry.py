"""The reference executor: each part of a pattern densely, straight from its mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.planning.cpu_plan import Memory, Plan
from attnc.runtime.call.arguments import CallArguments, read_call
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.length_groups import LengthGroup, Result, by_length
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape, check_promises
from attnc.runtime.call.transforms import untraced
from attnc.runtime.executors.executor_protocol import CallSite, Executor, Pair, Results, SourceRequest, States
from attnc.runtime.executors.pattern_parts import parts_of, recomputed_gradients, run_parts
from attnc.runtime.executors.reference import reference
from attnc.runtime.executors.reference.reference_plan import reference_plan
from attnc.runtime.executors.stateful_cache import run_with_states
from attnc.runtime.fallbacks import CAST, HOST_WAIT, MOVED, SEQUENCES, Kind
from attnc.runtime.planning.cache_arguments import CacheArguments
from attnc.runtime.planning.plans import Planner, relations_of

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence

TRACED = (
    'backend="reference" in torch.compile: the dense reference builds its mask outside of torch; use the default '
    "backend, or leave fullgraph=True out"
)


class ReferenceExecutor:
    """Dense attention over all pairs, differentiable as often as torch allows."""

    name = "reference"
    fallbacks: tuple[Kind, ...] = (SEQUENCES, HOST_WAIT, MOVED, CAST)
    lists_tiles = False
    splits_sums = False

    # --- calls -------------------------------------------------------------------------------------------------------

    def supports(self, pattern: Pattern, call: CallSite) -> str | None:
        """Return None for calls that torch.compile does not trace."""
        return TRACED if call.traced else None

    def forward(self, planner: Planner, call: CallArguments) -> Results:
        """Compute a call over all pairs; checks what the types of inputs promise."""
        check_promises(planner.pattern, call.tensors_of(planner.pattern))
        out, lse, states = untraced(run_parts)(planner, call, self)
        return Results(out.to(call.q.dtype), lse, states)

    def backward(
        self, planner: Planner, call: CallArguments, results: Pair | None, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return the gradients by a second forward."""
        return recomputed_gradients(planner, call, self, gradients)

    def decode(self, rows: Planner, call: CacheArguments) -> Results:
        """Compute the last queries over all keys."""
        if rows.pattern.stateful:
            return run_with_states(rows, call, self)

        def run(q: Tensor, group: LengthGroup) -> Result:
            k, v = group.cache.whole(range(len(group.entries)), group.length)
            return self.forward(rows, read_call(rows.pattern, q, k, v, call.scale, group.inputs))[:2]

        return Results(*by_length(rows.pattern, call.q, call.cache(rows.pattern), call.inputs, run))

    # --- before a call -----------------------------------------------------------------------------------------------

    def plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the dense plan; everything that selections may select is visible in it."""
        pattern, attentions = planner.pattern, parts_of(planner).attentions
        if attentions is None:
            relations = relations_of(pattern, call_shape(pattern, sizes, inputs))
            return reference_plan([(pattern.name, relations)], ())
        shown = attentions.open if pattern.chooses else attentions
        by_name = [(node.name, relations) for node, relations in shown.relations(sizes, inputs)]
        return reference_plan(by_name, [recurrence.recur.name for recurrence in attentions.stateful])

    def source(self, planner: Planner, request: SourceRequest) -> dict[str, str]:
        """Raise UnsupportedError: the reference executor emits no text."""
        raise UnsupportedError(f"`{planner.pattern.name}` by the reference runs as operations of torch: no source")

    def memory(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Memory | None:
        """Return None: the memory of the reference is not modelled."""
        return None

    # --- parts -------------------------------------------------------------------------------------------------------

    def operands(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as they are."""
        return q, k, v

    def attention(self, planner: Planner, call: CallArguments, known: Mapping[str, Tensor]) -> Pair:
        """Run one attention over all pairs."""
        pattern = planner.pattern
        relations = relations_of(pattern, call_shape(pattern, call.sizes, call.inputs))
        real = {tensor.name: known[tensor.name] for tensor in pattern.tensors if tensor.is_floating}
        return reference.attend(call.q, call.k, call.v, relations, call.scale, real)

    def attention_plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the dense plan of one attention."""
        return self.plan(planner, sizes, inputs)

    def listing(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> str:
        """Raise UnsupportedError: the reference has no tiles."""
        raise UnsupportedError(f"`{planner.pattern.name}` by the reference lists no tiles")

    def recurrence(self, recurrence: PatternRecurrence, call: CallArguments) -> tuple[Tensor, States]:
        """Run a recurrence token by token, straight from its steps."""
        tensors = call.tensors_of(recurrence.pattern)
        return recurrence.attend(call.q, call.k, call.v, call.inputs, tensors, call.scale, call.state, dense=True)

    def recurrence_plan(self, recurrence: PatternRecurrence, dtype: torch.dtype) -> str:
        """Return how a recurrence runs."""
        return f"the state of `{recurrence.recur.name}`, token by token"


EXECUTOR: Executor = ReferenceExecutor()
"""The executor that `registry` names."""
