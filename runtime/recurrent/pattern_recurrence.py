"""A call of a recurrence: its tensors checked and laid out, its states begun, an executor chosen."""

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
from attnc.compiler.recurrences.derived import ElementwiseScan, NoFormError, Pass, RecurrenceForm, RunningReduction
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.fallbacks import FACTORS, RECURRENT_IN_TORCH, SEQUENCES, TOKENS, note
from attnc.runtime.profiling import NamedCall
from attnc.runtime.recurrent import passes, token_loop
from attnc.runtime.recurrent.border_gradients import with_borders
from attnc.runtime.recurrent.borders import CROSSED, has_closed, may_be_crossed, may_have_borders
from attnc.runtime.recurrent.call_tokens import CallTokens, computed_in
from attnc.runtime.recurrent.checkpointed import Fresh, Parts, Run
from attnc.runtime.recurrent.derived_recurrence import DerivedRecurrence
from attnc.runtime.recurrent.document_runs import cut, documents_of, first_tokens, reads_places, reads_whole
from attnc.runtime.recurrent.linear import linear_recurrence
from attnc.runtime.recurrent.passes import Linear
from attnc.runtime.recurrent.prefixes import by_kernels
from attnc.runtime.requirements import check_requirements
from attnc.runtime.tensor_checks import call_shape, check_promises, check_tensors

PLACE = "t"
"""The state that counts tokens, int64 (B,)."""

GROWS = "a factor of its state is above 1, or below 0"

States = dict[str, Tensor]
Result = tuple[Tensor, States]


class PatternRecurrence(DerivedRecurrence):
    """The recurrence of a pattern. `strict`: refuse what would run token by token.

    Raises UnsupportedError.
    """

    def __init__(self, pattern: Pattern, recur: Recur, *, strict: bool) -> None:
        super().__init__(pattern, recur)
        self._strict = strict
        self._reads_places = reads_places(recur)
        self._reads_whole = reads_whole(recur)
        self._constants: tuple[Value, ...] = () if self.derived is None else constants_of(self.derived)
        if strict and self.derived is None:
            raise UnsupportedError(
                f"strict: `{pattern.name}` would run token by token, for {self.reason}; compile it without strict to "
                f"allow that"
            )

    @property
    def how(self) -> str:
        """How it runs, as a phrase."""
        if self.derived is None:
            return f"the state of `{self.recur.name}`, token by token: {self.reason}"
        return f"the state of `{self.recur.name}`, chunk by chunk"

    def how_by_kernels(self, dtype: torch.dtype) -> str:
        """Return how the recurrence runs on a GPU."""
        if self.derived is None:
            return f"{self.how}, {'as operations of torch' if dtype == torch.float64 else 'by one kernel'}"
        from attnc.runtime.gpu.recurrent.passes_on_gpu import without_kernels

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
        """(out (B, H, T, width) in the dtype of q, states after the last token, fp32 or fp64; `PLACE` among them).

        `state`: those before the first token by name, None: as the recurrence begins. Differentiable, once by chunks;
        `dense`: token by token, straight from the lines. `by_kernels`: linear passes by Triton's, as always on a GPU.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError, SpecError.
        """
        sizes = check_tensors(q, k, v)
        linear = None if dense else self._linear(q, wanted=by_kernels)
        if sizes.n_q != sizes.n_k:
            raise ArgumentError(
                f"q has {sizes.n_q} tokens and k has {sizes.n_k} (dimension 2): a recurrence takes as many of both; "
                f"for later tokens give `state`"
            )
        shape = call_shape(self.pattern, sizes, inputs)
        check_requirements(self.pattern, shape)
        check_promises(self.pattern, tensors)
        group = sizes.heads // max(sizes.kv_heads, 1)
        named = zip(self.pattern.tensors, tensors, strict=True)
        real = {tensor.name: x for tensor, x in named if tensor.is_floating}
        factor = float(sizes.dk**-0.5) if scale is None else scale
        own = CallSizes({**shape.sizes, "queries": sizes.n_q, "keys": sizes.n_k})
        tokens = CallTokens(q, k, v, real, own, Slices(dict(shape.inputs)), factor, group, self.pattern.origins)
        like = q.new_empty((), dtype=computed_in(q.dtype))
        begun = self.beginning(own.values, sizes.batch, sizes.heads, like)
        documents = documents_of(self.pattern, shape.inputs, sizes.n_q)
        self._check_continued(state, documents)
        states = _given(self.recur, begun, state)
        with NamedCall(self.pattern.name):
            if documents is not None and self._reads_places:
                return self._apart(tokens, documents, states, linear)
            first = None if documents is None else first_tokens(documents, sizes.n_q)
            return self._run(tokens, states, first, linear)

    def beginning(self, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor) -> States:
        """The states before the first token, of the type and on the device of `like`."""
        return token_loop.beginning(self.recur, sizes, batch, heads, like) | _count_of(self.recur, batch)

    def _linear(self, q: Tensor, *, wanted: bool) -> Linear:
        """How linear passes are computed; `wanted`: by kernels.

        Raises UnsupportedError for what is not there, or not allowed.
        """
        if q.device.type == "cpu" and not wanted:
            return linear_recurrence
        if q.device.type not in ("cpu", "cuda"):
            raise no_kernels(self.pattern, q.device.type)
        from attnc.runtime.gpu.recurrent.passes_on_gpu import linear_of, without_kernels

        if self.derived is None:
            return linear_of(q.dtype)
        missing = without_kernels(self.derived, self.recur, q.dtype)
        if self._strict and missing:
            raise UnsupportedError(
                f"strict: `{self.pattern.name}` would run as operations of torch, for {missing}; compile it without "
                f"strict to allow that"
            )
        if missing:
            note(self.pattern.name, RECURRENT_IN_TORCH, missing)
        return linear_of(q.dtype)

    def _check_continued(self, state: object, documents: Sequence[Windows] | None) -> None:
        if state is None:
            return
        if documents is not None:
            raise ArgumentError(
                f"`{self.pattern.name}` with `state` and documents: each document begins anew, so nothing would read "
                f"the state; call without documents"
            )
        if self._reads_whole:
            raise UnsupportedError(
                f"`{self.pattern.name}` with `state`: it has an order of its own, or reads how many tokens there are, "
                f"and needs all of them in one call"
            )

    def _run(self, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear | None) -> Result:
        """`linear`: None: token by token."""
        own = {state.name: states[state.name] for state in self.recur.states}
        count = states.get(PLACE)
        if count is not None:
            before = count.tolist()
            tokens = replace(tokens, before=tuple(before) if len(set(before)) > 1 else tuple(before[:1]))
        anew = fresh is not None or self.recur.reset is not None

        def run(tokens: CallTokens, states: States) -> Result:
            return self._kept_apart(tokens, states, fresh, linear)

        if linear is None or not may_have_borders(self.pattern, anew, tokens.q):
            out, last = run(tokens, own)
        else:
            out, last = with_borders(self.pattern.name, run, tokens, own)
        return out, last if count is None else {**last, PLACE: count + tokens.counts[2]}

    def _kept_apart(self, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear | None) -> Result:
        """Return the result of `_run`, computed so that nothing crosses a border that is not finite."""
        given = [tokens.inputs.get(tensor.name, tokens.q) for tensor in self.pattern.tensors]
        if linear is None:
            guarded = has_closed(self.pattern, given)
            out, last = self._of_tokens(tokens, states, fresh, guarded=guarded)
        elif self.derived is None:
            out, last = self._in_parts(None, tokens, states, fresh, linear)
        else:
            out, last = self._by_passes(self.derived, tokens, states, fresh, linear)
        anew = fresh is not None or self.recur.reset is not None
        if may_be_crossed(self.pattern, given, anew, out, list(last.values())):
            out, last = self._guarded(tokens, states, fresh, dense=linear is None)
        return out, last

    def _guarded(self, tokens: CallTokens, states: States, fresh: Fresh, *, dense: bool) -> Result:
        """Token by token, where nothing that is not finite crosses a border; `dense`: at once."""

        run = partial(self._of_tokens, guarded=True)
        if dense:
            return run(tokens, states, fresh)
        note(self.pattern.name, TOKENS, CROSSED)
        if self._reads_whole:
            return run(tokens, states, fresh)
        return Parts(run, tokens, self.pattern.tensors, fresh).attend(states)

    def _by_passes(
        self, derived: RecurrenceForm, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear
    ) -> Result:
        try:
            return self._in_parts(derived, tokens, states, fresh, linear)
        except passes.GrowingError:
            note(self.pattern.name, FACTORS, GROWS)
            return self._growing(tokens, states, fresh, linear)

    def _growing(self, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear) -> Result:
        """By passes for which factors may be any numbers, where there are some."""
        derived = None
        try:
            derived = derive(self.recur, trusting=False)
        except NoFormError as error:
            if self._strict:
                raise UnsupportedError(f"strict: `{self.pattern.name}` would run token by token: {GROWS}") from error
        return self._in_parts(derived, tokens, states, fresh, linear)

    def _in_parts(
        self, derived: RecurrenceForm | None, tokens: CallTokens, states: States, fresh: Fresh, linear: Linear
    ) -> Result:
        """One part of the tokens after another, where a later one does not matter to those before it; not by kernels.

        Scans of matrices have stretches of their own, a few tokens long. What is the logarithm of a sum, or a largest
        number, may be large beside its changes: fp64 between parts.
        """
        if derived is None:
            note(self.pattern.name, TOKENS, self.reason or GROWS)
        run = self._by_tokens(linear) if derived is None else self._passing(derived, linear)
        stages = derived.stages if derived else ()
        of_matrices = any(isinstance(stage, ElementwiseScan) and len(stage.state.dims) > 1 for stage in stages)
        if self._reads_whole or of_matrices or linear is not linear_recurrence:
            return run(tokens, states, fresh)
        parts = Parts(run, tokens, self.pattern.tensors, fresh)
        if derived is not None:
            wide = frozenset(stage.state.name for stage in stages if isinstance(stage, RunningReduction))
            constants = self._constants if derived is self.derived else constants_of(derived)
            parts = replace(parts, wide=wide, constants=constants, longer=_longer(derived))
        return parts.attend(states)

    def _passing(self, derived: RecurrenceForm, linear: Linear) -> Run:
        def run(tokens: CallTokens, states: States, fresh: Fresh) -> Result:
            with by_kernels(linear is not linear_recurrence):
                out, last = passes.run(derived, self.recur, tokens.computed(), states, fresh, linear)
            return out.to(tokens.q.dtype), last

        return run

    def _by_tokens(self, linear: Linear) -> Run:
        """Token by token; by one kernel where passes would run as kernels."""
        return self._of_tokens if linear is linear_recurrence else self._by_one_kernel

    def _by_one_kernel(self, tokens: CallTokens, states: States, fresh: Fresh) -> Result:
        from attnc.runtime.gpu.recurrent import token_loop_on_gpu

        out, last = token_loop_on_gpu.run(self.recur, tokens.computed(), states, fresh)
        return out.to(tokens.q.dtype), last

    def _of_tokens(self, tokens: CallTokens, states: States, fresh: Fresh, *, guarded: bool = False) -> Result:
        """Token by token."""
        out, last = token_loop.run(self.recur, tokens.computed(), states, fresh, guarded=guarded)
        return out.to(tokens.q.dtype), last

    def _apart(
        self,
        tokens: CallTokens,
        documents: Sequence[Windows],
        states: States,
        linear: Linear | None,
    ) -> Result:
        """Document by document, as places of tokens count within each."""
        note(self.pattern.name, SEQUENCES, "places of tokens count within each document")
        outs, lasts = [], []
        for batch in range(tokens.counts[0]):
            entry = slice(batch, batch + 1)
            last = start = {name: x[entry] for name, x in states.items()}
            parts = [tokens.q.new_empty(1, tokens.counts[1], 0, tokens.v.shape[-1])]
            for window in documents[min(batch, len(documents) - 1)]:
                span = slice(window.key, window.key + window.n_k)
                own = replace(cut(self.pattern.tensors, tokens, span, entry), before=(0,))
                out, last = self._run(own, start, None, linear)
                parts.append(out)
            outs.append(torch.cat(parts if len(parts) == 1 else parts[1:], 2))
            lasts.append(last)
        return torch.cat(outs), {name: torch.cat([last[name] for last in lasts]) for name in states}


def _longer(derived: RecurrenceForm) -> float:
    """How long parts are: shorter with two readers and two writers of a state, longer where all goes entry by entry."""
    if all(isinstance(stage, ElementwiseScan) for stage in derived.stages):
        return 2
    corrections = [step.correction for stage in derived.stages if isinstance(stage, Pass) for step in stage.steps]
    return 0.5 if any(one is not None and not one.merged for one in corrections) else 1


def _count_of(recur: Recur, batch: int) -> States:
    """How many tokens came before, where that is a part of the state: for a recurrence that reads places of tokens."""
    if reads_whole(recur) or not reads_places(recur):
        return {}
    return {PLACE: torch.zeros(batch, dtype=torch.int64)}


def no_kernels(pattern: Pattern, where: str) -> UnsupportedError:
    """Return the error for a device without kernels."""
    return UnsupportedError(
        f"`{pattern.name}` on {where}: recurrences have no kernels there; use the reference executor, "
        f'backend="reference" (token by token), or move the tensors to the CPU'
    )


def _given(recur: Recur, begun: States, state: object) -> States:
    """The states that a call begins with. Raises ArgumentError, ArgumentTypeError."""
    if state is None:
        return begun
    if not isinstance(state, Mapping):
        example = ", ".join(f'"{name}": …' for name in begun)
        raise ArgumentTypeError(f"state is {type(state).__name__}: give a tensor for each state, {{{example}}}")
    missing, strange = begun.keys() - state.keys(), state.keys() - begun.keys()
    if missing or strange:
        raise ArgumentError(
            f"`{recur.name}` has the states {', '.join(begun)}, and `state` has {', '.join(map(str, state)) or 'none'}"
        )
    for name, wanted in begun.items():
        found = state[name]
        if not isinstance(found, Tensor):
            raise ArgumentTypeError(f"state[{name!r}] is {type(found).__name__}: it must be a tensor")
        if found.shape != wanted.shape or found.device != wanted.device:
            raise ArgumentError(
                f"state[{name!r}] is {tuple(found.shape)} on {found.device}: it must be {tuple(wanted.shape)} on "
                f"{wanted.device}"
            )
        if name == PLACE and (found.is_floating_point() or bool((found < 0).any())):
            raise ArgumentError(f"state[{name!r}] counts tokens: whole numbers from 0")
    return {name: state[name].to(wanted.dtype) for name, wanted in begun.items()}


__all__ = ["PLACE", "PatternRecurrence", "Result", "States", "no_kernels"]
