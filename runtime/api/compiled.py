"""A compiled pattern: its planner, its other forms, and the path of a call from its arguments to an executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from attnc.compiler.analysis.rank_only import rank_only
from attnc.compiler.ir import Pattern
from attnc.compiler.passes.last_rows import OtherRowsError
from attnc.compiler.planning.build_plan import CallShape
from attnc.runtime.call.arguments import CallArguments, read_call
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.call.device_targets import check_triton
from attnc.runtime.call.given_devices import check_devices
from attnc.runtime.call.given_indices import check_indices
from attnc.runtime.call.no_entries import has_no_entries, inputs_with_one_entry, with_one_entry
from attnc.runtime.call.tensor_checks import (
    TensorSizes,
    call_shape,
    check_are_tensors,
    check_tensors,
    completed,
    finite,
    input_tensors,
)
from attnc.runtime.call.transforms import cast_for_autocast, is_observed, without_autocast
from attnc.runtime.choices.choice_source import ChoiceSource
from attnc.runtime.choices.tuned_tables import remember
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.cpu.direct_decoding import DirectDecoding, direct_decoding
from attnc.runtime.executors.executor_protocol import CallSite, Executor, Results, States
from attnc.runtime.executors.pattern_attentions import PatternAttentions
from attnc.runtime.executors.pattern_parts import parts_of
from attnc.runtime.executors.registry import (
    TABLE,
    choose_executor,
    executor_named,
    executor_of_operators,
    executor_of_plans,
    refuse_in_graphs,
)
from attnc.runtime.operators import attend, attend_general
from attnc.runtime.patterns.pattern_description import PatternDescription
from attnc.runtime.planning.cache_arguments import not_served
from attnc.runtime.planning.planners import planner_in, shared_planner
from attnc.runtime.process.warned import warn_of_gradient
from attnc.runtime.texts import identity
from attnc.runtime.texts.identity import Form, How
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence

Backend = Literal["auto", "cpu", "reference", "triton"]


_NONE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Options:
    """The options of `compile_attention`."""

    backend: Backend = "auto"
    strict: bool = False
    deterministic: bool = True
    tune: ChoiceSource = field(default_factory=ChoiceSource)

    def checked(self) -> Options:
        """Return these options. Raises ArgumentError, ArgumentTypeError, UnsupportedError."""
        names = [registered.name for registered in TABLE]
        if self.backend not in ("auto", *names):
            listed = ", ".join(f'"{name}"' for name in ("auto", *sorted(names)[:-1]))
            raise ArgumentError(f'backend is {self.backend!r}: it must be {listed} or "{max(names)}"')
        if self.backend == "triton":
            check_triton()
        for name in ("strict", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if self.tune.source != "model" and self.backend == "reference":
            raise ArgumentError('backend="reference" has no schedule to tune: leave tune at "model"')
        return self


class CompiledAttention(PatternDescription):
    """A pattern with its options, immutable and stateless: what an `Attention` delegates to.

    `form`: the whole pattern, or a form of it for packed sequences or for the last rows of a cache. `planner`: what
    executors keep for its calls; `parts`: the attentions or the recurrence that it consists of. `requested`: the
    executor of `backend=`, None for "auto".
    """

    def __init__(
        self,
        bound: BoundProgram,
        options: Options,
        modules: Mapping[str, SourceFile],
        form: Form = "whole",
        pattern: Pattern | None = None,
    ) -> None:
        """`pattern`: the lowered pattern, if another form of it has lowered it already. Raises OtherRowsError."""
        self.options = options
        self.form = form
        if options.tune.table is not None:
            remember(options.tune.table)  # a pickle may have brought the table
        compile_options = How(options.strict, options.deterministic, options.tune.text)
        text = identity.write(bound, modules, compile_options, form)
        self.planner = (
            shared_planner(text, bound, compile_options, form)
            if pattern is None
            else planner_in(form, text, pattern, compile_options)
        )
        super().__init__(bound, modules, self.planner.pattern)
        self.parts = parts_of(self.planner)
        self.requested = None if options.backend == "auto" else executor_named(options.backend)
        # Created here, because a traced call must not create them.
        self.rows_text = identity.write(bound, modules, compile_options, "last rows")
        self._cpu_plans = cpu_plans(self.planner)
        self._rank_only = rank_only(self._pattern)
        tokens = self._pattern.chooses or all(node.keys is None for node in self._pattern.nodes)
        packs = form == "whole" and tokens and self._pattern.documents is None
        self._packed = self._in("packed") if packs else None
        # The cpu executor's shortcuts; tuned choices may change between calls, which they would not notice.
        on_cpu = executor_of_plans(None, "cpu") if self.requested is None else self.requested
        self.takes_shortcuts = on_cpu.name == "cpu" and options.tune.source == "model"
        self._cpu_executor = on_cpu if on_cpu.name == "cpu" else None  # small calls notice a choice
        self.is_plain = self.parts.is_plain
        """Whether the pattern is the softmax of `scale * dot(q, k)`."""

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax, so that `return_lse` is available."""
        return self.parts.has_lse

    @property
    def identity(self) -> tuple[str, str]:
        """The pattern with its parameters and options, as text, and the backend."""
        return self.planner.text, self.options.backend

    # --- its forms ---------------------------------------------------------------------------------------------------

    def _in(self, form: Form) -> CompiledAttention:
        """Return another form of the pattern. Raises OtherRowsError."""
        return CompiledAttention(self._bound, self.options, self._modules, form, self._pattern)

    def with_options(self, options: Options) -> CompiledAttention:
        """Return the same form compiled with other options, with planners of its own."""
        return CompiledAttention(self._bound, options, self._modules, self.form)

    def for_inputs(self, inputs: Mapping[str, object]) -> CompiledAttention:
        """Return this form, or the form for sequences where `inputs` have `cu_seqlens`."""
        return self.on_sequences() if "cu_seqlens" in inputs and self.form != "packed" else self

    def on_sequences(self) -> CompiledAttention:
        """Return the pattern's form for calls with `cu_seqlens`. Raises ArgumentError, UnsupportedError."""
        if self._packed is not None:
            return self._packed
        documents = self._pattern.documents
        if documents is not None:
            raise ArgumentError(f"cu_seqlens: `{self.name}` defines its own documents; pass `{documents.name}` instead")
        raise UnsupportedError(
            f"cu_seqlens with keys that are not tokens, as in `{self.name}`, is not supported yet; call it per sequence"
        )

    @cached_property
    def last_rows(self) -> CompiledAttention:
        """The pattern's form for its last rows. Raises UnsupportedError where a row needs data that no cache holds."""
        try:
            return self._in("last rows")
        except OtherRowsError as error:
            raise not_served(self.name, error) from error

    @cached_property
    def direct_decoding(self) -> DirectDecoding | None:
        """The decoding of steps of one query by formulas; None for patterns that no cache serves."""
        try:
            return direct_decoding(self.last_rows.planner)
        except UnsupportedError:
            return None

    # --- calls -------------------------------------------------------------------------------------------------------

    def shortcut(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
        """Return the output of a call equal to the last one that was a single kernel call; None for other calls."""
        direct = self._cpu_plans.direct
        return None if direct is None else direct.attend(q, k, v, scale)

    def executor_of(self, q: Tensor) -> Executor:
        """Return the executor of calls with this q that torch.compile does not trace. Raises UnsupportedError."""
        if self._cpu_executor is not None and q.is_cpu and not torch._C._are_functorch_transforms_active():
            return self._cpu_executor
        site = CallSite(q.device, transformed=torch._C._are_functorch_transforms_active())
        return choose_executor(self.requested, self._pattern, site)

    def refuse_in_graphs(self, q: Tensor) -> None:
        """Raise UnsupportedError for calls with this q that torch.compile traces and no operator of torch can run."""
        refuse_in_graphs(self.requested, self._pattern, q.device)

    def has_operators(self, q: Tensor) -> bool:
        """Check whether torch's operators can run calls with this q."""
        try:
            self.refuse_in_graphs(q)
        except UnsupportedError:
            return False
        return not self._pattern.stateful

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        inputs: Mapping[str, object],
        *,
        wants_lse: bool = True,
    ) -> Results:
        """Compute a call by the executor for q's device, or as an operator of torch.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError.
        """
        check_are_tensors(q, k, v)
        inputs = completed(self._pattern, inputs) if inputs else inputs
        traced = torch.compiler.is_compiling()
        if traced:
            self.refuse_in_graphs(q)
        executor = None if traced else self.executor_of(q)
        tensors = self._tensors(inputs, q) if inputs or self._pattern.tensors else []
        factor = None if scale is None else finite(scale)
        if self.options.strict and inputs and not traced:
            check_indices(self._pattern, inputs, k.shape[2])
        if not self.is_plain and has_no_entries(q, k, v):
            one_entry = inputs_with_one_entry(self._pattern, inputs)
            out, lse, _ = self.run(with_one_entry(q), with_one_entry(k), with_one_entry(v), scale, one_entry)
            return Results(out[:0], None if lse is None else lse[:0])
        if executor is None or (executor is executor_of_operators(q) and self._is_node(q, k, v)):
            operator = attend.attend if self.is_plain else attend_general.attend
            out, lse = operator(q, k, v, tensors, self.planner, factor)
            return Results(out, lse if self.has_lse else None)
        return self._run_eagerly(executor, (q, k, v), factor, inputs, tensors, wants_lse=wants_lse)

    def _is_node(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Check whether torch must see a call as one of its operators."""
        if self.is_plain:
            return is_observed(q, k, v) or torch._C._are_functorch_transforms_active()
        return is_fake(q) or q.is_meta

    def run_with_state(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object], state: object
    ) -> tuple[Tensor, States]:
        """Compute a call of a recurrence from the states before its first token; None: the start values."""
        if self.parts.recurrence is None:
            raise self.has_no_state()
        if torch.compiler.is_compiling():
            raise UnsupportedError("`state` in torch.compile is not supported yet: leave fullgraph=True out")
        check_are_tensors(q, k, v)
        factor = None if scale is None else finite(scale)
        executor, tensors = self.executor_of(q), self._tensors(inputs, q)
        out, _, states = self._run_eagerly(executor, (q, k, v), factor, inputs, tensors, state=state)
        assert states is not None
        return out, states

    def run_densely(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> Results:
        """Compute a call by the reference executor, in the dtype of q."""
        check_are_tensors(q, k, v)
        call = read_call(self._pattern, q, k, v, None if scale is None else finite(scale), inputs)
        self._warn_of_gradients(call.tensors_of(self._pattern))
        return executor_named("reference").forward(self.planner, call)

    def _run_eagerly(
        self,
        executor: Executor,
        vectors: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        inputs: Mapping[str, object],
        tensors: Sequence[Tensor],
        *,
        wants_lse: bool = True,
        state: object = None,
    ) -> Results:
        q, k, v = vectors
        autocast = torch._C._is_any_autocast_enabled()
        if autocast:
            q, k, v = cast_for_autocast(self.name, q, k, v)
        is_checked_by_plan = self.is_plain and q.dim() == 4 and q.shape[3] > 0
        sizes = None if is_checked_by_plan else check_tensors(q, k, v)
        call = CallArguments(
            q,
            k,
            v,
            inputs,
            {tensor.name: x for tensor, x in zip(self._pattern.tensors, tensors, strict=True)} if tensors else _NONE,
            float(q.shape[-1] ** -0.5) if scale is None else scale,
            wants_lse or not self.is_plain,
            state,
            passed_scale=scale,
            known_sizes=sizes,
        )
        if not autocast:
            return executor.forward(self.planner, call)
        with without_autocast(q):
            return executor.forward(self.planner, call)

    def _tensors(self, inputs: Mapping[str, object], q: Tensor) -> list[Tensor]:
        """Return the inputs in the order of the pattern.

        Raises ArgumentTypeError, ArgumentError, UnsupportedError.
        """
        tensors = input_tensors(self._pattern, inputs)
        check_devices(self._pattern, inputs, tensors, q)
        self._warn_of_gradients(tensors)
        return tensors

    def _warn_of_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Warn of inputs that require a gradient and get none, because they only rank what is selected."""
        if not self._rank_only or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for declared, tensor in zip(self._pattern.tensors, tensors, strict=True):
            if declared.name in self._rank_only and tensor.requires_grad:
                warn_of_gradient(self.name, declared.name)

    def lse_of(self, results: Results, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Return the result of a call: out, or (out, lse)."""
        if not return_lse:
            return results.out
        if results.lse is None:
            raise UnsupportedError(f"return_lse: `{self.name}` has no LSE, because its result is not one softmax")
        return results.out, results.lse

    def has_no_state(self) -> UnsupportedError:
        """Return the error of a method that only recurrences have."""
        if self._pattern.stateful:
            return UnsupportedError(
                f"`{self.name}` has states in branches beside keys: `decode` and `prefill` pass them on, with `state`"
            )
        return UnsupportedError(f"`{self.name}` is a pattern, which has no state: only a `recurrence` has one")

    # --- what its description asks of it -----------------------------------------------------------------------------

    def _recurrents(self) -> Sequence[PatternRecurrence]:
        """Return the recurrences with states: the pattern itself, or its branches with a state."""
        return self.parts.recurrences

    @property
    def _branches(self) -> PatternAttentions | None:
        return self.parts.attentions

    def _shape_of(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        return call_shape(self._pattern, sizes, inputs)
