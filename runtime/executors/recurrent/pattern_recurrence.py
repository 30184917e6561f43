"""The calls of a pattern's recurrence: check the tensors, prepare the states, and choose how to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern, Recur, Value
from attnc.compiler.lowering.specialise import CallSizes, Slices
from attnc.compiler.planning.documents import Windows
from attnc.compiler.recurrences.call_constants import constants_of
from attnc.compiler.recurrences.derive import derive
from attnc.compiler.recurrences.derived import (
    ElementwiseScan,
    NoFormError,
    Pass,
    RunningReduction,
)
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.call.requirements import check_requirements
from attnc.runtime.call.tensor_checks import call_shape, check_promises, check_tensors
from attnc.runtime.executors.recurrent import passes, token_loop
from attnc.runtime.executors.recurrent.borders import (
    CROSSED,
    has_closed,
    may_be_crossed,
    may_have_borders,
    with_borders,
)
from attnc.runtime.executors.recurrent.call_tokens import (
    CallTokens,
    computed_in,
    cut,
    documents_of,
    first_tokens,
    reads_later_tokens,
    reads_positions,
)
from attnc.runtime.executors.recurrent.checkpointed import Fresh, Parts, Run
from attnc.runtime.executors.recurrent.derived_recurrence import DerivedRecurrence
from attnc.runtime.executors.recurrent.linear import linear_recurrence
from attnc.runtime.executors.recurrent.passes import Linear
from attnc.runtime.executors.recurrent.prefixes import by_kernels
from attnc.runtime.fallbacks import FACTORS, RECURRENT_IN_TORCH, SEQUENCES, TOKENS, note
from attnc.runtime.process.profiling import NamedCall

TOKEN_COUNT = "t"
"""Name of the state that holds the number of tokens so far, int64 (B,)."""

GROWS = "a factor of its state is above 1, or below 0"

States = dict[str, Tensor]
Result = tuple[Tensor, States]


class PatternRecurrence(DerivedRecurrence):
    """The recurrence of a pattern, ready to be called. `strict`: refuse to run token by token.

    Raises UnsupportedError if `strict` and the recurrence has no derived form.
    """

    def __init__(self, pattern: Pattern, recur: Recur, *, strict: bool) -> None:
        super().__init__(pattern, recur)
        self._strict = strict
        self._reads_positions = reads_positions(recur)
        self._reads_later_tokens = reads_later_tokens(recur)
        self._constants: tuple[Value, ...] = () if self.derived is None else constants_of(self.derived)
        if strict and self.derived is None:
            raise UnsupportedError(
                f"strict: `{pattern.name}` would run token by token: {self.reason}; compile it without strict=True to "
                f"allow that"
            )

    @property
    def how(self) -> str:
        """The way the recurrence runs on a CPU, as a phrase for messages."""
        if self.derived is None:
            return f"the state of `{self.recur.name}`, token by token: {self.reason}"
        return f"the state of `{self.recur.name}`, chunk by chunk"

    def how_by_kernels(self, dtype: torch.dtype) -> str:
        """Return how the recurrence runs on a GPU in calls of a dtype, as a phrase for messages."""
        if self.derived is None:
            return f"{self.how}, {'as operations of torch' if dtype == torch.float64 else 'by one kernel'}"
        from attnc.runtime.executors.triton.recurrent.linear_on_gpu import without_kernels  # only where kernels run

        missing = without_kernels(self.derived, self.recur, dtype)
        return f"{self.how}, {f'as operations of torch: {missing}' if missing else 'by kernels'}"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Mapping[str, object],
        tensors: Sequence[Tensor],
        scale: float | None,
        state: object = None,
        *,
        dense: bool = False,
        by_kernels: bool = False,
    ) -> Result:
        """Compute (out (B, H, T, width) in the dtype of q, the states after the last token, fp32 or fp64).

        The states include `TOKEN_COUNT` if the recurrence reads positions. `state`: the states before the first token
        by name; None: the start values. `dense`: token by token, straight from the steps as they are written.
        `by_kernels`: linear passes by Triton kernels, as always on a GPU. Differentiable once; repeatedly if `dense`.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError, SpecError.
        """
        sizes = check_tensors(q, k, v)
        linear = None if dense else self._linear_function(q, wanted=by_kernels)
        if sizes.n_q != sizes.n_k:
            raise ArgumentError(
                f"q has {sizes.n_q} tokens and k has {sizes.n_k} (dimension 2): a recurrence needs equal numbers; to "
                f"continue after earlier tokens, pass `state`"
            )
        shape = call_shape(self.pattern, sizes, inputs)
        check_requirements(self.pattern, shape)
        check_promises(self.pattern, tensors)
        group = sizes.heads // max(sizes.kv_heads, 1)
        named = zip(self.pattern.tensors, tensors, strict=True)
        real = {tensor.name: x for tensor, x in named if tensor.is_floating}
        factor = float(sizes.dk**-0.5) if scale is None else scale
        call_sizes = CallSizes({**shape.sizes, "queries": sizes.n_q, "keys": sizes.n_k})
        tokens = CallTokens(q, k, v, real, call_sizes, Slices(dict(shape.inputs)), factor, group, self.pattern.origins)
        dtype_like = q.new_empty((), dtype=computed_in(q.dtype))
        initial = self.beginning(call_sizes.values, sizes.batch, sizes.heads, dtype_like)
        documents = documents_of(self.pattern, shape.inputs, sizes.n_q)
        self._check_initial_state(state, documents)
        states = _initial_states(self.recur, initial, state)
        with NamedCall(self.pattern.name):
            if documents is not None and self._reads_positions:
                return self._run_each_document(tokens, documents, states, linear)
            first = None if documents is None else first_tokens(documents, sizes.n_q)
            return self._run(tokens, states, first, linear)

    def beginning(self, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor) -> States:
        """Return the states before the first token, in the dtype and on the device of `like`."""
        return token_loop.beginning(self.recur, sizes, batch, heads, like) | _initial_token_count(self.recur, batch)

    def _linear_function(self, q: Tensor, *, wanted: bool) -> Linear:
        """Return the function that computes linear passes; `wanted`: use kernels even on a CPU.

        Raises UnsupportedError for a device without kernels, and for torch operations on a GPU if strict.
        """
        if q.device.type == "cpu" and not wanted:
            return linear_recurrence
        if q.device.type not in ("cpu", "cuda"):
            raise no_kernels(self.pattern, q.device.type)
        from attnc.runtime.executors.triton.recurrent.linear_on_gpu import (
            linear_of,
            without_kernels,
        )  # only where kernels run

        if self.derived is None:
            return linear_of(q.dtype)
        missing = without_kernels(self.derived, self.recur, q.dtype)
        if self._strict and missing:
            raise UnsupportedError(
                f"strict: `{self.pattern.name}` would run as operations of torch: {missing}; compile it without "
                f"strict=True to allow that"
            )
        if missing:
            note(self.pattern.name, RECURRENT_IN_TORCH, missing)
        return linear_of(q.dtype)

    def _check_initial_state(self, state: object, documents: Sequence[Windows] | None) -> None:
        if state is None:
            return
        if documents is not None:
            raise ArgumentError(
                f"`{self.pattern.name}` with `state` and documents is not supported: each document starts from new "
                f"states and would not read `state`; omit `state`, or use a pattern without documents"
            )
        if self._reads_later_tokens:
            raise UnsupportedError(
                f"`{self.pattern.name}` with `state` is not supported: its steps depend on later tokens (`scan`, or "
                f"the number of tokens); pass all of them in one call, without `state`"
            )

    def _run(self, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear | None) -> Result:
        """Run the tokens from the states before them; `linear` None: token by token."""
        initial = {state.name: states[state.name] for state in self.recur.states}
        token_count = states.get(TOKEN_COUNT)
        if token_count is not None:
            before = token_count.tolist()
            tokens = replace(tokens, before=tuple(before) if len(set(before)) > 1 else tuple(before[:1]))
        restarts = fresh is not None or self.recur.reset is not None

        def run(tokens: CallTokens, states: States) -> Result:
            return self._run_within_borders(tokens, states, fresh, linear)

        if linear is None or not may_have_borders(self.pattern, restarts, tokens.q):
            out, last = run(tokens, initial)
        else:
            out, last = with_borders(self.pattern.name, run, tokens, initial)
        return out, last if token_count is None else {**last, TOKEN_COUNT: token_count + tokens.counts[2]}

    def _run_within_borders(self, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear | None) -> Result:
        """Compute the result of `_run` so that NaN and overflow do not cross a border."""
        inputs = [tokens.inputs.get(tensor.name, tokens.q) for tensor in self.pattern.tensors]
        if linear is None:
            guarded = has_closed(self.pattern, inputs)
            out, last = self._run_token_by_token(tokens, states, fresh, guarded=guarded)
        elif self.derived is None:
            out, last = self._run_in_parts(None, tokens, states, fresh, linear)
        else:
            out, last = self._run_passes(self.derived, tokens, states, fresh, linear)
        restarts = fresh is not None or self.recur.reset is not None
        if may_be_crossed(self.pattern, inputs, restarts, out, list(last.values())):
            out, last = self._run_guarded(tokens, states, fresh, dense=linear is None)
        return out, last

    def _run_guarded(self, tokens: CallTokens, states: States, fresh: Fresh, *, dense: bool) -> Result:
        """Run token by token, so that NaN and overflow do not cross a border; `dense`: all tokens in one part."""
        run = partial(self._run_token_by_token, guarded=True)
        if dense:
            return run(tokens, states, fresh)
        note(self.pattern.name, TOKENS, CROSSED)
        if self._reads_later_tokens:
            return run(tokens, states, fresh)
        return Parts(run, tokens, self.pattern.tensors, fresh).attend(states)

    def _run_passes(
        self, derived: RecurrenceForm, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear
    ) -> Result:
        try:
            return self._run_in_parts(derived, tokens, states, fresh, linear)
        except passes.GrowingError:
            note(self.pattern.name, FACTORS, GROWS)
            return self._run_with_any_factors(tokens, states, fresh, linear)

    def _run_with_any_factors(self, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear) -> Result:
        """Run with passes that accept any factors, derived again; token by token if there are none."""
        derived = None
        try:
            derived = derive(self.recur, trusting=False)
        except NoFormError as error:
            if self._strict:
                raise UnsupportedError(f"strict: `{self.pattern.name}` would run token by token: {GROWS}") from error
        return self._run_in_parts(derived, tokens, states, fresh, linear)

    def _run_in_parts(
        self, derived: RecurrenceForm | None, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear
    ) -> Result:
        """Run the tokens in parts, one after another; in one part by kernels, or where steps depend on later tokens.

        Scans of matrices are not cut either: they have their own stretches, a few tokens long. Running log-sums and
        maxima may be large beside their changes, so they are kept in fp64 between parts.
        """
        if derived is None:
            note(self.pattern.name, TOKENS, self.reason or GROWS)
        run = self._token_run(linear) if derived is None else self._pass_run(derived, linear)
        stages = derived.stages if derived else ()
        scans_matrices = any(isinstance(stage, ElementwiseScan) and len(stage.state.dims) > 1 for stage in stages)
        if self._reads_later_tokens or scans_matrices or linear is not linear_recurrence:
            return run(tokens, states, fresh)
        parts = Parts(run, tokens, self.pattern.tensors, fresh)
        if derived is not None:
            wide = frozenset(stage.state.name for stage in stages if isinstance(stage, RunningReduction))
            constants = self._constants if derived is self.derived else constants_of(derived)
            parts = replace(parts, wide=wide, constants=constants, longer=_part_length_factor(derived))
        return parts.attend(states)

    def _pass_run(self, derived: RecurrenceForm, linear: Linear) -> Run:
        """Return the function that runs the passes of a derived form."""

        def run(tokens: CallTokens, states: States, fresh: Fresh) -> Result:
            with by_kernels(linear is not linear_recurrence):
                out, last = passes.run(derived, self.recur, tokens.computed(), states, fresh, linear)
            return out.to(tokens.q.dtype), last

        return run

    def _token_run(self, linear: Linear) -> Run:
        """Return the function that runs token by token: one kernel where passes would run as kernels."""
        return self._run_token_by_token if linear is linear_recurrence else self._run_one_kernel

    def _run_one_kernel(self, tokens: CallTokens, states: States, fresh: Fresh) -> Result:
        """Run token by token in one GPU kernel."""
        from attnc.runtime.executors.triton.recurrent import token_loop_on_gpu  # only where kernels run

        out, last = token_loop_on_gpu.run(self.recur, tokens.computed(), states, fresh)
        return out.to(tokens.q.dtype), last

    def _run_token_by_token(self, tokens: CallTokens, states: States, fresh: Fresh, *, guarded: bool = False) -> Result:
        """Run token by token in torch; `guarded` as in `TokenValues`."""
        out, last = token_loop.run(self.recur, tokens.computed(), states, fresh, guarded=guarded)
        return out.to(tokens.q.dtype), last

    def _run_each_document(
        self,
        tokens: CallTokens,
        documents: Sequence[Windows],
        states: States,
        linear: Linear | None,
    ) -> Result:
        """Run document by document, because positions count within each document."""
        note(self.pattern.name, SEQUENCES, "positions count within each document")
        outs, lasts = [], []
        for batch in range(tokens.counts[0]):
            entry = slice(batch, batch + 1)
            last = start = {name: x[entry] for name, x in states.items()}
            parts = [tokens.q.new_empty(1, tokens.counts[1], 0, tokens.v.shape[-1])]
            for window in documents[min(batch, len(documents) - 1)]:
                span = slice(window.key, window.key + window.n_k)
                document_tokens = replace(cut(self.pattern.tensors, tokens, span, entry), before=(0,))
                out, last = self._run(document_tokens, start, None, linear)
                parts.append(out)
            outs.append(torch.cat(parts if len(parts) == 1 else parts[1:], 2))
            lasts.append(last)
        return torch.cat(outs), {name: torch.cat([last[name] for last in lasts]) for name in states}


def _part_length_factor(derived: RecurrenceForm) -> float:
    """Return the factor of part lengths: above 1 for elementwise scans, below 1 for two readers and two writers."""
    if all(isinstance(stage, ElementwiseScan) for stage in derived.stages):
        return 2
    return 0.5 if any(isinstance(stage, Pass) and stage.form().is_rank_one for stage in derived.stages) else 1


def _initial_token_count(recur: Recur, batch: int) -> States:
    """Return the initial `TOKEN_COUNT` state; empty unless the recurrence reads positions but no later tokens."""
    if reads_later_tokens(recur) or not reads_positions(recur):
        return {}
    return {TOKEN_COUNT: torch.zeros(batch, dtype=torch.int64)}


def no_kernels(pattern: Pattern, where: str) -> UnsupportedError:
    """Return the error for a device without kernels."""
    return UnsupportedError(
        f"`{pattern.name}`: recurrences have no kernels for device {where}; use the reference executor, "
        f'backend="reference" (token by token), or move the tensors to the CPU'
    )


def _initial_states(recur: Recur, initial: States, state: object) -> States:
    """Return the states that a call starts from; `state` is the caller's. Raises ArgumentError, ArgumentTypeError."""
    if state is None:
        return initial
    if not isinstance(state, Mapping):
        example = ", ".join(f'"{name}": …' for name in initial)
        raise ArgumentTypeError(
            f"state is {type(state).__name__}: pass a dictionary with a tensor for each state, {{{example}}}"
        )
    missing, strange = initial.keys() - state.keys(), state.keys() - initial.keys()
    if missing or strange:
        raise ArgumentError(
            f"`{recur.name}` has the states {', '.join(initial)}, but `state` has "
            f"{', '.join(map(str, state)) or 'none'}; pass exactly the states of `{recur.name}`"
        )
    for name, expected in initial.items():
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"state[{name!r}] is {type(tensor).__name__}: it must be a tensor")
        if tensor.shape != expected.shape or tensor.device != expected.device:
            raise ArgumentError(
                f"state[{name!r}] is {tuple(tensor.shape)} on {tensor.device}: it must be {tuple(expected.shape)} on "
                f"{expected.device}"
            )
        if name == TOKEN_COUNT and (tensor.is_floating_point() or bool((tensor < 0).any())):
            raise ArgumentError(f"state[{name!r}] is the number of earlier tokens: it must hold whole numbers from 0")
    return {name: state[name].to(expected.dtype) for name, expected in initial.items()}
