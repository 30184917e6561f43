"""`compile_attention` and the callable that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_dynamo_compiling

from attnc.compiler.analysis.rank_only import rank_only
from attnc.compiler.ir import Pattern
from attnc.compiler.warnings.call_warnings import call_warnings
from attnc.runtime.api.bridged import Bridged
from attnc.runtime.api.compiled import Backend, Options
from attnc.runtime.api.served import Served
from attnc.runtime.api.shown import Shown
from attnc.runtime.api.stateful import Stateful, States
from attnc.runtime.api.tunable import Tunable
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.device_targets import check_triton
from attnc.runtime.call.given_devices import check_devices
from attnc.runtime.call.given_indices import check_indices
from attnc.runtime.call.no_entries import has_no_entries, inputs_with_one_entry, with_one_entry
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import (
    FLOATS,
    check_are_tensors,
    check_counts,
    check_promises,
    check_tensors,
    completed,
    finite,
    input_tensors,
    refuse_options,
)
from attnc.runtime.call.transforms import (
    cast_for_autocast,
    untraced,
    wide_in_interpreter,
    without_autocast,
)
from attnc.runtime.choices.choice_source import read_wanted
from attnc.runtime.executors.reference import reference
from attnc.runtime.operators import attend, attend_general
from attnc.runtime.patterns.pattern_description import read_spec
from attnc.runtime.process.profiling import is_profiling, profiled
from attnc.runtime.process.warned import warn_of_gradient, warn_of_pattern
from attnc.runtime.texts import identity
from attnc.runtime.texts.identity import Form
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from attnc.runtime.api.module import AttentionModule

NOT_COMPILED = (
    'backend="reference" in torch.compile: the dense reference builds its mask outside of torch; use the default '
    "backend, or leave fullgraph=True out"
)

NOT_TRANSFORMED = (
    "torch.func transforms of a pattern with its own scores, weights or branches are not supported: use "
    'torch.autograd, or the reference executor, backend="reference"'
)


def compile_attention(
    spec: str | PathLike[str],
    *,
    preset: str | None = None,
    backend: Backend = "auto",
    strict: bool = False,
    deterministic: bool = True,
    tune: str | float | PathLike[str] = "model",
    **params: object,
) -> Attention:
    """Compile the attention that a spec describes.

    `spec`: text with a newline is source; a path, or a string that ends in `.attn` or reads `file.attn:name`, is a
    file; anything else names a pattern of the library. `params` are its parameters, `preset` one of its named parameter
    sets. `backend`: "auto" (kernels on a GPU, the cpu executor on a CPU), "cpu", "triton" (kernels; on a CPU in
    Triton's interpreter), or "reference" (dense, differentiable as often as torch allows). `strict`: raise
    UnsupportedError instead of running where no tile plan exists. Results are bitwise reproducible for the same input,
    whatever `deterministic` says. `tune`: "model" lets the cost model decide. A time ("2s", or seconds) lets the first
    call of a shape measure the first few schedules for that long, and the cache keeps the fastest ("0s": use the cache,
    measure nothing). The path of a table that `attnc tune … -o table.json` wrote takes every choice from that table.

    Warns with PatternWarning where a score reads no vectors (W008) or an even window is not centred (W009).

    Raises SpecError (the text or its parameters), PatternNotFoundError, ArgumentError, ArgumentTypeError.
    """
    options = Options(backend, strict, deterministic, read_wanted(tune))
    _check_options(options)
    bound, modules = read_spec(spec, params, preset)
    attention = Attention(bound, options, modules)
    warn_of_pattern(bound.program.name, call_warnings(bound))
    return attention


def _check_options(options: Options) -> None:
    """Check the options. Raises ArgumentError, ArgumentTypeError, UnsupportedError."""
    if options.backend not in ("auto", "cpu", "reference", "triton"):
        raise ArgumentError(f'backend is {options.backend!r}: it must be "auto", "cpu", "reference" or "triton"')
    if options.backend == "triton":
        check_triton()
    for name in ("strict", "deterministic"):
        if not isinstance(getattr(options, name), bool):
            raise ArgumentTypeError(f"{name} is {getattr(options, name)!r}: it must be True or False")
    if options.tune.source != "model" and options.backend == "reference":
        raise ArgumentError('backend="reference" has no schedule to tune: leave tune at "model"')


class Attention(Shown, Bridged, Served, Stateful, Tunable):
    """A compiled pattern: immutable, stateless, safe to call from several threads, pickled as its spec.

    `name`, `parameters` and `program` describe the pattern; calling the object runs it.
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
        super().__init__(bound, options, modules, form, pattern)
        # Created here, because a traced call must not create it.
        pattern = self._pattern
        self._rank_only = rank_only(pattern)
        tokens = pattern.chooses or all(node.keys is None for node in pattern.nodes)
        self._packed = self._in("packed") if form == "whole" and tokens and pattern.documents is None else None

    @property
    def _compiled(self) -> Attention:
        """The compiled pattern: this object."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        program = self._bound.program
        state = (program.source, program.name, self.parameters, self._options, dict(self._modules))
        return _restored, state

    # --- running it ---

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[False] = False,
        cu_seqlens: object = None,
        state: States | None = None,
        return_state: Literal[False] = False,
        **inputs: object,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[True],
        cu_seqlens: object = None,
        state: None = None,
        return_state: Literal[False] = False,
        **inputs: object,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[False] = False,
        cu_seqlens: object = None,
        state: States | None = None,
        return_state: Literal[True],
        **inputs: object,
    ) -> tuple[Tensor, States]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        cu_seqlens: object = None,
        state: States | None = None,
        return_state: bool = False,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, States]:
        """Compute attention over q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv): out (B, Hq, Nq, dv).

        `scale` is dk^-1/2 unless given. With `return_lse`, (out, lse): lse (B, Hq, Nq), natural log, fp32 (fp64 for
        fp64), differentiable. `inputs` are the pattern's. A row that sees nothing: out 0, lse -inf, gradients 0.
        `cu_seqlens`, int (sequences + 1,) from 0 to Nk: several sequences in one, the i-th from entry i to entry i + 1,
        each as if it were called alone; empty ones are allowed.

        Of a recurrence: `state`, the states before the first token by name (`init_state` where it is left out), and
        with `return_state` (out, states after the last token), fp32 (B, Hq, …), fp64 for fp64.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError.
        """
        if not is_dynamo_compiling():
            refuse_shards()
            if is_profiling():
                with profiled(self.name):
                    return self._attended(q, k, v, scale, return_lse, cu_seqlens, state, return_state, inputs)
        return self._attended(q, k, v, scale, return_lse, cu_seqlens, state, return_state, inputs)

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        return_lse: bool,
        cu_seqlens: object,
        state: States | None,
        return_state: bool,
        inputs: dict[str, object],
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, States]:
        if cu_seqlens is not None:
            attention, inputs = self._on_sequences(), {**inputs, "cu_seqlens": cu_seqlens}
        else:
            attention = self
            if not (inputs or return_lse or self._skips_direct or is_dynamo_compiling()):
                direct = self._cpu_plans.direct
                out = None if direct is None else direct.attend(q, k, v, scale)
                if out is not None:
                    return out
        if state is not None or return_state:
            result = attention._with_state(q, k, v, scale, state, inputs)
            return result if return_state else result[0]
        return attention._call(q, k, v, scale, return_lse, inputs)

    def _on_sequences(self) -> Attention:
        """Return the pattern's form for calls with `cu_seqlens`."""
        if self._packed is not None:
            return self._packed
        documents = self._pattern.documents
        if documents is not None:
            raise ArgumentError(f"cu_seqlens: `{self.name}` defines its own documents; pass `{documents.name}` instead")
        raise UnsupportedError(
            f"cu_seqlens with keys that are not tokens, as in `{self.name}`, is not supported yet; call it per sequence"
        )

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool, inputs: Mapping[str, object]
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self._measures:
            self._measure_first(q, k, v, scale, inputs)
        return self._called(q, k, v, scale, return_lse, inputs)

    def _called(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool, inputs: Mapping[str, object]
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_are_tensors(q, k, v)
        inputs = completed(self._pattern, inputs) if inputs else inputs
        if self._is_reference:
            if torch.compiler.is_compiling():
                raise UnsupportedError(NOT_COMPILED)
            q, k, v = cast_for_autocast(self.name, q, k, v)
            with without_autocast(q):
                return self._lse_of(untraced(self._dense)(q, k, v, scale, inputs), return_lse)
        if self._is_for_cpu:
            self._refuse_backend(q)
        tensors = self._tensors(inputs, q) if inputs or self._pattern.tensors else []
        factor = None if scale is None else finite(scale)
        if self._options.strict and inputs and not torch.compiler.is_compiling():
            check_indices(self._pattern, inputs, k.shape[2])
        if not self._plain:
            if has_no_entries(q, k, v):
                return self._call_without_entries(q, k, v, scale, return_lse, inputs)
            return self._lse_of(self._call_general(q, k, v, factor, inputs, tensors), return_lse)
        if self._is_interpreted(q):
            return _result(attend.by_kernels(q, k, v, tensors, self._planner, factor), return_lse)
        pair = attend.attend(q, k, v, tensors, self._planner, factor, return_lse=return_lse)
        return _result(pair, return_lse)

    def _call_without_entries(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool, inputs: Mapping[str, object]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the empty result of a call without batch entries, shaped like a call with one entry."""
        one_entry = inputs_with_one_entry(self._pattern, inputs)
        q, k, v = (with_one_entry(x) for x in (q, k, v))
        result = self._called(q, k, v, scale, return_lse, one_entry)
        return (result[0][:0], result[1][:0]) if isinstance(result, tuple) else result[:0]

    def _with_state(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, state: object, inputs: Mapping[str, object]
    ) -> tuple[Tensor, States]:
        recurrent = self._general.recurrent
        if recurrent is None:
            raise self._has_no_state()
        if torch.compiler.is_compiling():
            raise UnsupportedError("`state` in torch.compile is not supported yet: leave fullgraph=True out")
        check_are_tensors(q, k, v)
        q, k, v = cast_for_autocast(self.name, q, k, v)
        factor = None if scale is None else finite(scale)
        self._refuse_backend(q)
        tensors = self._tensors(inputs, q)
        executor = {"dense": self._is_reference, "by_kernels": self._is_interpreted(q)}
        dtype = q.dtype
        if executor["by_kernels"]:
            q, k, v = wide_in_interpreter(self.name, q, k, v)
        with without_autocast(q):
            out, states = recurrent.attend(q, k, v, inputs, tensors, factor, state, **executor)
        return out.to(dtype), states

    def _call_general(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object], tensors: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Run a pattern with scores, weights, values or branches of its own."""
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(NOT_TRANSFORMED)
        q, k, v = cast_for_autocast(self.name, q, k, v)
        check_tensors(q, k, v)
        attend.refuse_device(q)
        by_kernels = q.is_cuda or self._is_interpreted(q)
        if torch.compiler.is_compiling() or is_fake(q) or q.is_meta:
            return attend_general.attend(self._general, q, k, v, tensors, scale)
        dtype = q.dtype
        if by_kernels:
            q, k, v = wide_in_interpreter(self.name, q, k, v)
        with without_autocast(q):
            out, lse = self._general.attend(q, k, v, inputs, tensors, scale, by_kernels=by_kernels)
        return out.to(dtype), lse

    @overload
    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[False] = False,
        dtype: torch.dtype | None = None,
        cu_seqlens: object = None,
        **inputs: object,
    ) -> Tensor: ...

    @overload
    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[True],
        dtype: torch.dtype | None = None,
        cu_seqlens: object = None,
        **inputs: object,
    ) -> tuple[Tensor, Tensor]: ...

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        dtype: torch.dtype | None = None,
        cu_seqlens: object = None,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the same attention densely, straight from the relation, in `dtype` (None: the tensors' dtype)."""
        with profiled(self.name):
            if cu_seqlens is not None:
                packed: Any = {**inputs, "cu_seqlens": cu_seqlens}
                return self._on_sequences()._referenced(q, k, v, scale, return_lse, dtype, packed)
            return self._referenced(q, k, v, scale, return_lse, dtype, inputs)

    def _referenced(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        return_lse: bool,
        dtype: torch.dtype | None,
        inputs: Mapping[str, object],
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse_shards()
        if dtype is not None and dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype such as torch.float64")
        check_are_tensors(q, k, v)
        if dtype is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return self._lse_of(self._dense(q, k, v, scale, inputs), return_lse)

    def module(
        self, *, heads: int | None = None, dk: int | None = None, dv: int | None = None, **init: object
    ) -> AttentionModule:
        """Return a module that owns the learned tensors as Parameters, zeros unless `init` gives them by name.

        A pattern without learned tensors needs no sizes: `print` of a model then shows the pattern by its module. Pass
        a size that the pattern names itself as a keyword: `module(heads=8, dk=64, dv=64, length=512)`.

        Raises ArgumentError, ArgumentTypeError.
        """
        from attnc.runtime.api.module import AttentionModule, initial  # only for modules

        sizes = {"heads": heads, "dk": dk, "dv": dv}
        named_sizes = {name: size for name, size in sizes.items() if size is not None}
        check_counts(1, **named_sizes)
        dims = {"head" if name == "heads" else name: size for name, size in named_sizes.items()}
        return AttentionModule(self, initial(self._pattern, dims, init))

    # --- inside ---

    def _tensors(self, inputs: Mapping[str, object], q: Tensor) -> list[Tensor]:
        """Return the inputs in the order of the pattern.

        Raises ArgumentTypeError, ArgumentError, UnsupportedError.
        """
        tensors = input_tensors(self._pattern, inputs)
        check_devices(self._pattern, inputs, tensors, q)
        if self._rank_only and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_gradients(tensors)
        return tensors

    def _warn_of_gradients(self, tensors: list[Tensor]) -> None:
        for declared, tensor in zip(self._pattern.tensors, tensors, strict=True):
            if declared.name in self._rank_only and tensor.requires_grad:
                warn_of_gradient(self.name, declared.name)

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        refuse_options(self._pattern, inputs)
        sizes = check_tensors(q, k, v)
        inputs = completed(self._pattern, inputs)
        factor = float(sizes.dk**-0.5) if scale is None else finite(scale)
        tensors = self._tensors(inputs, q)
        check_promises(self._pattern, tensors)
        recurrent = self._general.recurrent
        if recurrent is not None:
            return recurrent.attend(q, k, v, inputs, tensors, factor, dense=True)[0], None
        real = {t.name: x for t, x in zip(self._pattern.tensors, tensors, strict=True)}
        if self._steps is not None:
            return self._steps.densely(q, k, v, CallInputs(sizes, inputs, real, factor))
        out, lse = reference.attend(q, k, v, self._relations(sizes, inputs), factor, real)
        return out.to(q.dtype), lse


def _restored(
    source: SourceFile, name: str, values: dict[str, object], options: Options, modules: dict[str, SourceFile]
) -> Attention:
    """Return an `Attention` from its pickled spec."""
    return Attention(identity.bound_program(source, name, values, modules), options, modules)


def _result(pair: tuple[Tensor, Tensor], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return pair if return_lse else pair[0]


__all__ = ["Attention", "compile_attention"]
