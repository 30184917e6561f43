"""The protocol of executors: what each way to run a pattern offers to dispatch, plans and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.kernels.targets import Target
from attnc.compiler.planning.cpu_plan import Memory, Plan
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_shapes import TensorSizes
from attnc.runtime.fallbacks import Kind
from attnc.spec.program import BoundProgram

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence
    from attnc.runtime.planning.cache_arguments import CacheArguments
    from attnc.runtime.planning.plans import Planner

Pair = tuple[Tensor, Tensor]
States = dict[str, Tensor]


class Results(NamedTuple):
    """The results of a call: out (batch, heads, queries, dv), its natural LSE, and the states after the last token.

    `lse` is None where the result is not one softmax, `states` where the pattern is not a recurrence.
    """

    out: Tensor
    lse: Tensor | None = None
    states: States | None = None


class CallSite(NamedTuple):
    """The surroundings of a call: the device of its tensors, and what torch does with the call.

    `traced`: torch.compile traces it. `transformed`: a transform of torch.func acts on it.
    """

    device: torch.device
    traced: bool = False
    transformed: bool = False


@dataclass(frozen=True)
class SourceRequest:
    """A request for kernel texts: the program, for example inputs, the target, and the sizes and dtype of a call.

    `inputs`: those that decide how many attentions the pattern has.
    """

    bound: BoundProgram
    target: Target
    sizes: TensorSizes
    dtype: torch.dtype
    inputs: Mapping[str, object]


class PartRunner(Protocol):
    """An executor as what it does with the parts of a pattern: single attentions, and recurrences with states.

    `lists_tiles`: whether the executor lists the tiles of selected keys, in a way that `listing` names. `splits_sums`:
    whether weights that are sums run as several attentions.
    """

    lists_tiles: bool
    splits_sums: bool

    def operands(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v in a dtype that the executor multiplies."""

    def attention(self, planner: Planner, call: CallArguments, known: Mapping[str, Tensor]) -> Pair:
        """Return (out, lse) of the only attention of `planner`; `known`: tensors by name, inputs and earlier results.

        Recorded for autograd where a tensor requires a gradient. `call.k` and `call.v` belong to the attention's keys.
        """

    def attention_plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of the only attention of `planner`."""

    def listing(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> str:
        """Return, as text, where the tile list of an attention with selections comes from."""

    def recurrence(self, recurrence: PatternRecurrence, call: CallArguments) -> tuple[Tensor, States]:
        """Return (out, the states after the last token) of a recurrence, recorded for autograd."""

    def recurrence_plan(self, recurrence: PatternRecurrence, dtype: torch.dtype) -> str:
        """Return how a recurrence runs in calls of a dtype, as a phrase."""


class Executor(PartRunner, Protocol):
    """One way to run a pattern. An executor is a folder of `runtime/executors` and one line in `registry`.

    `name`: its name in `backend=` and in plans. `fallbacks`: the kinds of slower paths that its calls may count.
    """

    name: str
    fallbacks: tuple[Kind, ...]

    def supports(self, pattern: Pattern, call: CallSite) -> str | None:
        """Return why the executor does not run such a call, as the text of an error; None where it does."""

    def plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call. Raises ArgumentError, UnsupportedError, SpecError, EvaluationError."""

    def forward(self, planner: Planner, call: CallArguments) -> Results:
        """Compute a call, recorded for autograd where a tensor requires a gradient."""

    def backward(
        self, planner: Planner, call: CallArguments, results: Pair | None, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v and the real inputs in order; not recorded.

        `results`: (out, lse) of the forward, or None where they were not saved. `gradients`: of out and of the LSE.
        """

    def decode(self, rows: Planner, call: CacheArguments) -> Results:
        """Compute the last queries of a sequence against a cache; `rows`: the planner of the pattern's last rows.

        Not differentiable. Raises ArgumentError, UnsupportedError.
        """

    def source(self, planner: Planner, request: SourceRequest) -> dict[str, str]:
        """Return the texts of the kernels of a call by name. Raises UnsupportedError where there are none."""

    def memory(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Memory | None:
        """Return the bytes of memory of a call; None where they are not known before it runs."""


__all__ = ["CallSite", "Executor", "Pair", "PartRunner", "Results", "SourceRequest", "States"]
