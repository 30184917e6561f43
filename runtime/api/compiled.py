"""A compiled pattern with its options, the base of every use of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from attnc.compiler.ir import Pattern
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape
from attnc.runtime.choices.choice_source import ChoiceSource
from attnc.runtime.choices.tuned_tables import remember
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.general_attention import general_of
from attnc.runtime.executors.pattern_executor import PatternExecutor
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.planning.planners import planner_in, shared_planner
from attnc.runtime.planning.plans import Planner
from attnc.runtime.texts import identity
from attnc.runtime.texts.identity import Form, How
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence
    from attnc.runtime.tuning.tune_request import TuneRequest

NOT_COMPILED_HERE = (
    'backend="triton" on the CPU in torch.compile: torch cannot trace Triton\'s interpreter; use the default backend, '
    "or leave fullgraph=True out"
)

Backend = Literal["auto", "cpu", "reference", "triton"]


@dataclass(frozen=True)
class Options:
    """The options of `compile_attention`."""

    backend: Backend = "auto"
    strict: bool = False
    deterministic: bool = True
    tune: ChoiceSource = field(default_factory=ChoiceSource)


class CompiledAttention(PatternAnalysis):
    """A pattern with its options, immutable and stateless."""

    def __init__(
        self,
        bound: BoundProgram,
        options: Options,
        modules: Mapping[str, SourceFile],
        form: Form = "whole",
        pattern: Pattern | None = None,
    ) -> None:
        """`pattern`: the lowered pattern, if another form of it has lowered it already. Raises OtherRowsError."""
        self._options = options
        self._form = form
        if options.tune.table is not None:
            remember(options.tune.table)  # a pickle may have brought the table
        compile_options = How(options.strict, options.deterministic, options.tune.text)
        text = identity.write(bound, modules, compile_options, form)
        self._planner = (
            shared_planner(text, bound, compile_options, form)
            if pattern is None
            else planner_in(form, text, pattern, compile_options)
        )
        super().__init__(bound, modules, self._planner.pattern)
        self._rows_text = identity.write(bound, modules, compile_options, "last rows")  # for traced calls
        self._cpu_plans = cpu_plans(self._planner)
        self._general = general_of(self._planner)
        self._steps = self._general.steps
        self._plain = self._general.is_plain
        self._is_reference = options.backend == "reference"
        self._is_for_cpu = options.backend == "cpu"
        # Tuned choices may change between calls, and `direct` would not notice.
        self._skips_direct = options.backend in ("reference", "triton") or options.tune.source != "model"

    def _refuse_backend(self, q: Tensor) -> None:
        """Raise UnsupportedError where the requested backend does not run on q's device."""
        if self._is_for_cpu and q.device.type not in ("cpu", "meta"):
            raise UnsupportedError(
                f'backend="cpu", but q is on {q.device}: the CPU executor takes tensors on the CPU; move them, or '
                f"leave `backend` out"
            )

    def _in(self, form: Form) -> Self:
        """Return another form of the pattern. Raises OtherRowsError."""
        return type(self)(self._bound, self._options, self._modules, form, self._pattern)

    # --- what it is ---

    @property
    def is_plain(self) -> bool:
        """Whether the pattern is the softmax of `scale * dot(q, k)`."""
        return self._plain

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax, so that `return_lse` is available."""
        return self._general.has_lse

    def __eq__(self, other: object) -> bool:
        """Check whether both have the same text, parameters and options."""
        return self is other or (isinstance(other, CompiledAttention) and self._identity == other._identity)

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[type, str, str]:
        return type(self), self._planner.text, self._options.backend

    def __repr__(self) -> str:
        values = "".join(f", {name}={value}" for name, value in self.parameters.items())
        return f"Attention({self.name!r}{values})"

    # --- inside ---

    def _is_interpreted(self, q: Tensor) -> bool:
        """Check whether Triton's interpreter runs kernels. Raises UnsupportedError where it cannot, or is traced."""
        if self._options.backend != "triton" or q.is_cuda:
            return False
        if torch.compiler.is_compiling():
            raise UnsupportedError(NOT_COMPILED_HERE)
        target_of(q.device)
        return True

    def _tuned_planners(self, request: TuneRequest) -> list[Planner]:
        """Return the planner of every attention that tuning covers; recurrences and selections are not tuned."""
        if self.is_recurrence or self._pattern.chooses:
            return []
        if self._steps is None:
            return [self._planner]
        steps = self._steps.by_kernels if request.by_kernels else self._steps
        return [planner for _, planner in steps.planners(request.sizes, request.inputs)]

    def _recurrents(self) -> Sequence[PatternRecurrence]:
        """Return the recurrences with states: the pattern itself, or its branches with a state."""
        if self._steps is not None:
            return self._steps.stateful
        return () if self._general.recurrent is None else (self._general.recurrent,)

    def _lse_of(self, pair: tuple[Tensor, Tensor | None], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Return the result of a call: out, or (out, lse)."""
        out, lse = pair
        if not return_lse:
            return out
        if lse is None:
            raise UnsupportedError(f"return_lse: `{self.name}` has no LSE, because its result is not one softmax")
        return out, lse

    @property
    def _branches(self) -> PatternExecutor | None:
        return self._steps

    def _plan_on_cpu(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        return self._cpu_plans.plan(sizes, inputs) if self._steps is None else self._steps.plan(sizes, inputs)

    def _shape_of(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        return call_shape(self._pattern, sizes, inputs)
