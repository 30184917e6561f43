"""The callable that `compile_attention` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api import state_calls, tuned_calls
from attnc.runtime.api.cached_calls import CachedCall
from attnc.runtime.api.compiled import Backend, CompiledAttention, Options
from attnc.runtime.api.flex_masks import FlexMasks
from attnc.runtime.api.inspection import Inspection, check_dtype
from attnc.runtime.api.tuned_calls import TunedCalls
from attnc.runtime.call.call_errors import ArgumentTypeError
from attnc.runtime.call.call_shapes import dtype_name
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import FLOATS, TensorSizes, check_are_tensors, check_counts
from attnc.runtime.choices.records import Record
from attnc.runtime.choices.tuned import Tuned
from attnc.runtime.executors.executor_protocol import States
from attnc.runtime.executors.pattern_attentions import PatternAttentions
from attnc.runtime.executors.registry import executor_named
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.process.profiling import is_profiling, profiled
from attnc.runtime.texts import identity
from attnc.runtime.tuning.tuner import Untuned
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from attnc.compiler.simulation.simulation import Simulation
    from attnc.runtime.api.module import AttentionModule
    from attnc.runtime.executors.flex.torch_tape import MaskMod, ScoreMod
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence


class Attention(PatternAnalysis):
    """A compiled pattern: immutable, stateless, safe to call from several threads, pickled as its spec.

    `name`, `parameters` and `bound` describe the pattern; calling the object runs it.
    """

    def __init__(self, bound: BoundProgram, options: Options, modules: Mapping[str, SourceFile]) -> None:
        self._core = CompiledAttention(bound, options, modules)
        super().__init__(bound, modules, self._core.pattern)
        self._measures = options.tune.seconds > 0  # a bool, because torch.compile turns numbers into symbols
        self._tuned_calls = TunedCalls()
        self._decode, self._prefill = CachedCall(self._core, "decode"), CachedCall(self._core, "prefill")

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def is_plain(self) -> bool:
        """Whether the pattern is the softmax of `scale * dot(q, k)`."""
        return self._core.is_plain

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax, so that `return_lse` is available."""
        return self._core.has_lse

    def __eq__(self, other: object) -> bool:
        """Check whether both have the same text, parameters and options."""
        return self is other or (isinstance(other, Attention) and self._core.identity == other._core.identity)

    def __hash__(self) -> int:
        return hash(self._core.identity)

    def __repr__(self) -> str:
        values = "".join(f", {name}={value}" for name, value in self.parameters.items())
        return f"Attention({self.name!r}{values})"

    def __reduce__(self) -> tuple[Any, ...]:
        program = self._bound.program
        state = (program.source, program.name, self.parameters, self._core.options, dict(self._modules))
        return _restored, state

    def _by_executor(self, name: str) -> Attention:
        """Return the pattern compiled for an executor of the table."""
        return Attention(self._bound, replace(self._core.options, backend=cast("Backend", name)), self._modules)

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
            core, inputs = self._core.on_sequences(), {**inputs, "cu_seqlens": cu_seqlens}
        else:
            core = self._core
            if core.takes_shortcuts and not (inputs or return_lse or is_dynamo_compiling()):
                out = core.shortcut(q, k, v, scale)
                if out is not None:
                    return out
        if state is not None or return_state:
            result = core.run_with_state(q, k, v, scale, inputs, state)
            return result if return_state else result[0]
        if self._measures:
            self._tuned_calls.measure_first(core, q, k, v, scale, inputs)
        return core.lse_of(core.run(q, k, v, scale, inputs, wants_lse=return_lse), return_lse)

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
        refuse_shards()
        if dtype is not None and dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype such as torch.float64")
        check_are_tensors(q, k, v)
        if dtype is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        core = self._core if cu_seqlens is None else self._core.on_sequences()
        with profiled(self.name):
            return core.lse_of(core.run_densely(q, k, v, scale, {**inputs, **packed}), return_lse)

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

    # --- against a cache ---------------------------------------------------------------------------------------------

    @property
    def decode(self) -> CachedCall:
        """Attention of the last 1 to 16 tokens of each batch entry over a cache, as `CachedCall` takes them.

        Only slots of keys that are visible to these rows are read. Not differentiable.
        """
        return self._decode

    @property
    def prefill(self) -> CachedCall:
        """Attention of a chunk of any number of tokens over a cache, computed as a call computes it; differentiable.

        It takes the arguments of `decode`. No slot past `kv_len` is read; any other slot may be, visible or not.
        """
        return self._prefill

    # --- states ------------------------------------------------------------------------------------------------------

    def derivation(self) -> str:
        """Return the derivation from a recurrence's steps: the passes that run chunk by chunk, or why there are none.

        A pattern with stateful branches has one section per branch. Raises UnsupportedError for a pattern without
        states.
        """
        return state_calls.derivation(self._core)

    def init_state(
        self,
        batch: int,
        heads: int,
        dk: int,
        dv: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **sizes: int,
    ) -> States:
        """Return the states before the first token: a tensor (batch, heads, …) for each, by name.

        A recurrence that reads token positions counts them in one more state, `t`, int64 (batch,). For a pattern that
        has branches with a state the names are `branch.state`, for `decode` and `prefill`.

        `sizes`: other sizes of states, named as in the inputs (`slots=64`).

        Raises UnsupportedError for a pattern, ArgumentError.
        """
        return state_calls.first_states(self._core, batch, heads, {"dk": dk, "dv": dv, **sizes}, dtype, device)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: States, *, scale: float | None = None, **inputs: object
    ) -> tuple[Tensor, States]:
        """Return (out, state) of the next tokens: q (B, Hq, T, dk), k (B, Hkv, T, dk), v (B, Hkv, T, dv).

        The same as a call with `state` and `return_state=True`. Raises the errors of a call.
        """
        return self._core.run_with_state(q, k, v, scale, inputs, state)

    # --- schedules by measurement ------------------------------------------------------------------------------------

    @property
    def tuned(self) -> Tuned | None:
        """The tuned choices for calls; None where the cost model decides everything."""
        return self._core.planner.tuned

    def tune(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: object
    ) -> Record | Untuned:
        """Measure the first few schedules of a call on these tensors, as its first call would.

        The call includes its gradient where a tensor requires one. Returns `Untuned`, with the reason, where there is
        nothing to choose or the time of `tune=` is too short.

        Raises ArgumentError where the pattern was compiled without a time to measure in, and the errors of the call.
        """
        core = self._core if inputs.get("cu_seqlens") is None else self._core.on_sequences()
        return tuned_calls.tuned_call(core, q, k, v, scale, inputs)

    # --- before a call -----------------------------------------------------------------------------------------------

    def mask(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        head: int = 0,
        heads: int | None = None,
        kv_heads: int | None = None,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        **inputs: object,
    ) -> Tensor:
        """Return the relation as a mask, bool (Nq, Nk); with a leading batch dimension where an input has one.

        For several branches the mask holds the pairs visible in at least one branch; a unit of keys stands for its
        tokens. A pattern with selections needs `q` and `k` of a call, and `v` if a selection reads values (`k` is used
        in place of a missing `v`); its mask has a leading batch dimension.

        `heads` matters only to a relation that reads the number of heads; the default comes from the parameters and
        inputs. `cu_seqlens`, as in a call: several packed sequences. Raises ArgumentError for a mask of more than 4
        GiB.
        """
        return Inspection(self._core.for_inputs(inputs)).mask((n_q, n_k), (head, heads, kv_heads), (q, k, v), inputs)

    def chosen(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: object
    ) -> dict[str, Tensor]:
        """Return the result of each selection in a call, by its name: bool (B[, Hq or Hkv], rows, items).

        The result has heads where it differs between heads. A row is a query, a unit of queries, or all of them (1
        row); an item is a key, a unit of keys, or a number, counted from 0. A family has the rows of its members one
        after another. Raises ArgumentError, ArgumentTypeError.
        """
        return Inspection(self._core).chosen(q, k, v, scale, inputs)

    def plan(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        batch: int | None = None,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **inputs: object,
    ) -> Plan:
        """Return the plan of a call of this shape. `cu_seqlens`, as in a call: several packed sequences.

        `device`: "cpu", or "cuda" for the kernels of the GPU of this machine, or of sm_90 where there is none. Raises
        ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        core = self._core.for_inputs(inputs)
        core._refuse_recurrence("plan", "`attend.derivation()` says how it runs, `attend.simulate(…)` in which chunks")
        check_dtype(dtype)
        sizes = core._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch, head_dim=head_dim, dtype=dtype_name(dtype))
        return Inspection(core).plan(sizes, device, inputs)

    def source(
        self,
        target: str | None = None,
        *,
        head_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        **inputs: object,
    ) -> dict[str, str]:
        """Return the Triton text of every kernel of calls with this head dimension, by name, paged decode included.

        `target`: "sm_80", "sm_90", "sm_100" or "gfx942"; None: the GPU of this machine, or sm_90 where there is none.
        Only patterns whose number of attentions depends on `inputs` need them. For a recurrence, the texts of all
        kernels that a call starts, alone and with its gradient.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError.
        """
        return Inspection(self._core).source(target, head_dim, dtype, inputs)

    def simulate(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        batch: int | None = None,
        head_dim: int = 128,
        dtype: torch.dtype | None = None,
        device: str = "h100",
        stage: Literal["forward", "backward", "decode"] = "forward",
        baseline: Literal["full", "causal"] | None = None,
        tile: tuple[int, int] | None = None,
        order: Literal["natural", "bricks", "residues"] | None = None,
        **inputs: object,
    ) -> Simulation:
        """Simulate a call of this shape on a machine, without running it: a ladder of bounds, the time, the schedule.

        `device`: a machine's name ("a100", "h100", "h200", "b200"), a file that describes one, or "cpu", this machine.
        `dtype`: bf16 by default, fp32 on the CPU. `tile` (queries, keys) and `order` restrict the search. `baseline`:
        the dense rival; None: causal attention if no query sees a key behind its own position, else full. For a
        recurrence the result is a `RecurrenceSimulation`, always against dense causal attention; sizes that the pattern
        names are keywords, `slots=64`.

        Raises MachineError, ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        if dtype is not None:
            check_dtype(dtype)
        return self._simulated(
            n_q,
            n_q if n_k is None else n_k,
            inputs,
            heads=heads,
            kv_heads=kv_heads,
            batch=batch,
            head_dim=head_dim,
            dtype=None if dtype is None else dtype_name(dtype),
            device=device,
            stage=stage,
            baseline=baseline,
            tile=tile,
            order=order,
        )

    def picture(self, n: int, *, head: int = 0, **inputs: object) -> str:
        """Return an SVG of the pattern at length n: element view, tile view, keys per row; or one view per branch."""
        from attnc.runtime.pictures.branch_svg import branches_svg  # only for pictures
        from attnc.runtime.pictures.branch_views import has_states  # only for pictures
        from attnc.runtime.pictures.branches import make_branches  # only for pictures
        from attnc.runtime.pictures.draw import draw, to_svg  # only for pictures

        check_counts(0, n=n, head=head)
        if has_states(self):
            return branches_svg(make_branches(self, n, n, inputs, head=head))
        return to_svg(draw(self, n, None, head=head, **inputs))

    # --- for FlexAttention -------------------------------------------------------------------------------------------

    def mask_mod(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        batch: int | None = None,
        device: torch.device | str | None = None,
        relation_only: bool = False,
        **inputs: object,
    ) -> MaskMod:
        """Return FlexAttention's mask_mod of a call: a function of (batch entry, query head, row, key) to bool.

        The function keeps the lengths, the heads and the inputs as they are now; the tables that it reads are on
        `device`, by default the device of the inputs. `heads` is required for a relation that differs between heads or
        reads their number. `relation_only`: accept a pattern with its own score or weights, which the caller then
        computes. `cu_seqlens=` packs several sequences, as in a call.

        Raises UnsupportedError (selected by content, recurrent, several branches, keys that are not tokens, its own
        scores), ArgumentError, ArgumentTypeError.
        """
        return FlexMasks(self._core, (n_q, n_k), (heads, kv_heads, batch), inputs, device).mask_mod(relation_only)

    def block_mask(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        batch: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
        relation_only: bool = False,
        **inputs: object,
    ) -> BlockMask:
        """Return FlexAttention's BlockMask of a call, with `mask_mod` for its partial blocks.

        The result equals `create_block_mask` of `mask_mod`, but is found from the live tiles instead of all pairs; its
        batch and head dimensions are 1 where all entries or heads are equal. `block_size`: (queries, keys), or one
        number. Other arguments and errors are those of `mask_mod`; also raises EvaluationError where the relation
        faults.
        """
        masks = FlexMasks(self._core, (n_q, n_k), (heads, kv_heads, batch), inputs, device)
        return masks.block_mask(block_size, relation_only)

    def score_mod(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        batch: int | None = None,
        scale: float | None = None,
        device: torch.device | str | None = None,
        **inputs: object,
    ) -> ScoreMod:
        """Return FlexAttention's score_mod: a function of (score, batch entry, query head, row, key) to the score.

        The function computes the pattern's `score` in fp32 from FlexAttention's score, which is `scale * dot(q, k)`;
        `block_mask(…, relation_only=True)` gives the visible pairs. `scale`: the scale passed to `flex_attention`, for
        a pattern that reads `dot(q, k)` or `scale` separately. Inputs are read when the function runs; real inputs have
        gradients where FlexAttention gives them. Other arguments are those of `mask_mod`.

        Also raises UnsupportedError for its own weights or value, documents, and scores of vectors or sums over keys;
        ArgumentError, ArgumentTypeError.
        """
        return FlexMasks(self._core, (n_q, n_k), (heads, kv_heads, batch), inputs, device).score_mod(scale)

    # --- what analysis asks of it ------------------------------------------------------------------------------------

    @property
    def _compiled(self) -> Attention:
        """The compiled pattern: this object."""
        return self

    @property
    def _branches(self) -> PatternAttentions | None:
        return self._core._branches

    def _recurrents(self) -> Sequence[PatternRecurrence]:
        return self._core._recurrents()

    def _plan_on_cpu(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        return executor_named("cpu").plan(self._core.planner, sizes, inputs)

    def _shape_of(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        return self._core._shape_of(sizes, inputs)

    def _drawn_mask(self, n_q: int, n_k: int, head: int, inputs: Mapping[str, object]) -> NDArray[np.bool_]:
        """Return the pairs that a picture of one head shows, for the first batch entry."""
        arguments: dict[str, Any] = {**inputs}
        mask = self.mask(n_q, n_k, head=head, **arguments)
        pairs: NDArray[np.bool_] = (mask[0] if mask.dim() == 3 else mask).numpy()
        return pairs

    def _drawn_plan(self, n_q: int, n_k: int, heads: int, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call, which covers the pairs of one attention."""
        if not self.is_recurrence:
            self._refuse_states("mask")
        arguments: dict[str, Any] = {**inputs}
        return self.plan(n_q, n_k, heads=heads, **arguments)


def _restored(
    source: SourceFile, name: str, values: dict[str, object], options: Options, modules: dict[str, SourceFile]
) -> Attention:
    """Return an `Attention` from its pickled spec."""
    return Attention(identity.bound_program(source, name, values, modules), options, modules)
