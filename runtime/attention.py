"""`compile_attention` and the callable it makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import ParamSpec

from attnc.compiler.ir import Pattern
from attnc.compiler.last_rows import OtherRowsError
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.plan import Plan
from attnc.compiler.values import is_plain, is_scored
from attnc.runtime import identity, operators, reference, serving
from attnc.runtime.caches import Cache, read_cache
from attnc.runtime.call import (
    FLOATS,
    Sizes,
    call_shape,
    check_are_tensors,
    check_promises,
    check_tensors,
    input_tensors,
    names_read,
    refuse_options,
)
from attnc.runtime.cpu import scored
from attnc.runtime.cpu.planned_call import Call
from attnc.runtime.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.gpu.targets import check_triton, named_target, planned_target
from attnc.runtime.identity import Form
from attnc.runtime.library import ModuleLoader, find
from attnc.runtime.planners import planner_in, shared_planner
from attnc.runtime.plans import relations_of
from attnc.runtime.steps import Given, Steps
from attnc.runtime.transforms import cast_for_autocast
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from attnc.compiler.growth.growth import Growth
    from attnc.compiler.simulation.simulation import Simulation
    from attnc.runtime.floors import Floor
    from attnc.runtime.module import AttentionModule

P = ParamSpec("P")
R = TypeVar("R")

Backend = Literal["auto", "cpu", "reference", "triton"]


NOT_COMPILED = (
    'backend="reference" in torch.compile: the dense reference makes its mask outside of torch; use the default '
    "backend, or leave fullgraph=True out"
)


NOT_COMPILED_HERE = (
    'backend="triton" on the CPU in torch.compile: Triton\'s interpreter is not traced; use the default backend, or '
    "leave fullgraph=True out"
)


NO_KERNELS = (
    "`{}` by kernels: there are none for scores, weights or keys of its own yet; use the default backend on the CPU, "
    'or backend="reference"'
)


NOT_TRANSFORMED = (
    "torch.compile and torch.func over scores, weights or branches of a pattern's own are not supported yet: call it "
    "outside of them, or leave fullgraph=True out"
)


@dataclass(frozen=True)
class Options:
    """How an `Attention` runs."""

    backend: Backend = "auto"
    strict: bool = False
    deterministic: bool = True
    tune: str = "model"


def compile_attention(
    spec: str | PathLike[str],
    *,
    preset: str | None = None,
    backend: Backend = "auto",
    strict: bool = False,
    deterministic: bool = True,
    tune: str = "model",
    **params: object,
) -> Attention:
    """The attention that a spec describes.

    `spec`: text with a newline is source; a path, or a string that ends in `.attn` or reads `file.attn:name`, is a
    file; anything else names a pattern of the library. `params` are its parameters, `preset` one of its named sets.
    `backend`: "auto" (kernels on a GPU, the cpu executor on a CPU), "cpu", "triton" (kernels; on a CPU in Triton's
    interpreter), or "reference" (dense, differentiable as often as torch can). `strict`: raise
    UnsupportedError rather than run where no tile plan exists. Results are the same bits for the same input, whatever
    `deterministic` says; `tune` is "model" until there is something to tune.

    Raises SpecError (the text or its parameters), PatternNotFoundError, ArgumentError, ArgumentTypeError.
    """
    options = Options(backend, strict, deterministic, tune)
    _check_options(options)
    found = find(spec)
    loader = ModuleLoader(found.folder)
    bound = bind(load_program(found.source, loader, found.name), params, preset)
    return Attention(bound, options, dict(loader.given))


def _check_options(options: Options) -> None:
    if options.backend not in ("auto", "cpu", "reference", "triton"):
        raise ArgumentError(f'backend is {options.backend!r}: it must be "auto", "cpu", "reference" or "triton"')
    if options.backend == "triton":
        check_triton()
    for name in ("strict", "deterministic"):
        if not isinstance(getattr(options, name), bool):
            raise ArgumentTypeError(f"{name} is {getattr(options, name)!r}: it must be True or False")
    if options.tune != "model":
        raise UnsupportedError(f'tune={options.tune!r}: tuning is not supported yet; leave it at "model"')


class Attention:
    """A compiled pattern: immutable, stateless, safe to call from several threads, pickled as its spec.

    `name`, `parameters` and `program` say what it is; calling it runs it.
    """

    def __init__(
        self,
        bound: BoundProgram,
        options: Options,
        modules: Mapping[str, SourceFile],
        form: Form = "whole",
        pattern: Pattern | None = None,
    ) -> None:
        """`pattern`: the same lowered, of which this is another form. Raises OtherRowsError."""
        self._bound = bound
        self._options = options
        self._modules = modules
        text = identity.write(bound, modules, options.strict, form)
        self._planner = (
            shared_planner(text, bound, options.strict)
            if pattern is None
            else planner_in(form, text, pattern, options.strict)
        )
        self._pattern: Pattern = self._planner.pattern
        nodes = self._pattern.nodes
        single = len(nodes) == 1 and self._pattern.combine is None and is_scored(nodes[0])
        self._plain = single and is_plain(nodes[0])
        self._steps = None if single else Steps(self._planner.text, self._pattern, options.strict)
        self._is_reference = options.backend == "reference"
        self._skips_direct = options.backend in ("reference", "triton")
        # Made here, as a call that is traced must not make it.
        packs = form == "whole" and self._pattern.documents is None and all(node.keys is None for node in nodes)
        self._packed = Attention(bound, options, modules, "packed", self._pattern) if packs else None

    # --- what it is ---

    @property
    def name(self) -> str:
        """The pattern's name."""
        return self._bound.program.name

    @property
    def parameters(self) -> dict[str, object]:
        """The value of every parameter."""
        return dict(self._bound.values)

    @property
    def is_plain(self) -> bool:
        """Whether it is the softmax of `scale * dot(q, k)`."""
        return self._plain

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax, so that `return_lse` may be asked."""
        return self._steps is None or self._steps.has_lse

    @property
    def has_mask(self) -> bool:
        """Whether its keys are tokens, or units of them, so that `mask` and `picture` may be asked."""
        return self._steps is None or self._steps.has_tokens

    @property
    def relation_inputs(self) -> frozenset[str]:
        """The inputs that the relation reads: what `mask`, `plan` and `picture` need."""
        return frozenset(names_read(self._pattern))

    @property
    def bound(self) -> BoundProgram:
        """The checked program with its parameters."""
        return self._bound

    @property
    def ir(self) -> str:
        """The pattern IR, as text."""
        return str(self._pattern)

    def __repr__(self) -> str:
        values = "".join(f", {name}={value}" for name, value in self.parameters.items())
        return f"Attention({self.name!r}{values})"

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
        **inputs: object,
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        cu_seqlens: object = None,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv): out (B, Hq, Nq, dv) in their dtype.

        `scale` is dk^-1/2 unless given. With `return_lse`, (out, lse): lse (B, Hq, Nq), natural log, fp32 (fp64 for
        fp64), differentiable. `inputs` are the pattern's. A row that sees nothing: out 0, lse -inf, gradients 0.
        `cu_seqlens`, int (sequences + 1,) from 0 to Nk: several sequences in one, the i-th from entry i to entry i + 1,
        each as if it were called alone; empty ones are allowed.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError.
        """
        if cu_seqlens is not None:
            given: Any = {**inputs, "cu_seqlens": cu_seqlens}
            return self._on_sequences()._call(q, k, v, scale, return_lse, given)
        if not (inputs or return_lse or self._skips_direct or is_dynamo_compiling()):
            direct = self._planner.direct
            out = None if direct is None else direct.attend(q, k, v, scale)
            if out is not None:
                return out
        return self._call(q, k, v, scale, return_lse, inputs)

    def _on_sequences(self) -> Attention:
        """The same pattern for calls with `cu_seqlens`."""
        if self._packed is not None:
            return self._packed
        documents = self._pattern.documents
        if documents is not None:
            raise ArgumentError(f"cu_seqlens: `{self.name}` has documents of its own; give `{documents.name}` instead")
        raise UnsupportedError(
            f"cu_seqlens: keys of `{self.name}` are no tokens, which is not supported yet; call it once for each "
            f"sequence"
        )

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool, inputs: Mapping[str, object]
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_are_tensors(q, k, v)
        if self._is_reference:
            if torch.compiler.is_compiling():
                raise UnsupportedError(NOT_COMPILED)
            q, k, v = cast_for_autocast(q, k, v)
            return self._lse_of(_untraced(self._dense)(q, k, v, scale, inputs), return_lse)
        tensors = input_tensors(self._pattern, inputs) if inputs or self._pattern.tensors else []
        factor = None if scale is None else _finite(scale)
        if not self._plain:
            if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
                raise UnsupportedError(NOT_TRANSFORMED)
            if torch.compiler.is_dynamo_compiling():
                torch._dynamo.graph_break(msg=NOT_TRANSFORMED)
            return self._lse_of(_untraced(self._general)(q, k, v, factor, inputs, tensors), return_lse)
        if self._options.backend == "triton" and not q.is_cuda:
            if torch.compiler.is_compiling():
                raise UnsupportedError(NOT_COMPILED_HERE)
            return _result(operators.by_kernels(q, k, v, tensors, self._planner, factor), return_lse)
        pair = operators.attend(q, k, v, tensors, self._planner, factor, return_lse=return_lse)
        return _result(pair, return_lse)

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
        """The same call, dense, straight from the relation, in `dtype` (None: the tensors' own)."""
        if cu_seqlens is not None:
            given: Any = {**inputs, "cu_seqlens": cu_seqlens}
            return self._on_sequences()._referenced(q, k, v, scale, return_lse, dtype, given)
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
        if dtype is not None and dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype such as torch.float64")
        check_are_tensors(q, k, v)
        if dtype is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return self._lse_of(self._dense(q, k, v, scale, inputs), return_lse)

    # --- against a cache ---

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        kv_len: int | Sequence[int] | Tensor,
        block_table: object = None,
        ring: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the last 1 to 16 tokens of each batch entry over a cache: out (B, Hq, Nq, dv), as a call of all
        tokens gives it in its last rows. No slot is read but those of keys that these rows see.

        q (B, Hq, Nq, dk). `kv_len`: the tokens of each entry so far, those of q included, whose keys and values are in
        the cache already: a number, or one for each entry. k_cache (B, Hkv, S, dk) and v_cache (B, Hkv, S, dv) hold
        token t in slot t. With `block_table`, int (B, columns), they are (pages, Hkv, page, d), and token t of entry b
        is in slot `t % page` of page `block_table[b, t // page]`. With `ring` the oldest slots are written again: a
        cache of `need.first + need.last + Nq - 1` slots is enough, need being what the plan says (`Plan.cache`); token
        t is in slot t before `need.first`, and in `need.first + (t - need.first) % (S - need.first)` from there on.
        Inputs by token have an entry for each slot, or, with a block table, for each token.

        Not differentiable. Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError.
        """
        cache = self._cache(q, k_cache, v_cache, kv_len, block_table, ring)
        factor = None if scale is None else _finite(scale)
        run = _untraced(serving.decode)
        return self._lse_of(run(self._last_rows, q, cache, factor, inputs, dense=self._is_reference), return_lse)

    def prefill(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        kv_len: int | Sequence[int] | Tensor,
        block_table: object = None,
        ring: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same of a chunk of any number of tokens, as a call computes it; differentiable.

        Takes what `decode` takes. No slot past `kv_len` is read; others may be, seen or not. Raises what `decode`
        raises.
        """
        cache = self._cache(q, k_cache, v_cache, kv_len, block_table, ring)
        factor = None if scale is None else _finite(scale)
        return self._lse_of(serving.prefill(self._last_rows, q, cache, factor, inputs), return_lse)

    def _cache(self, q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, ring: bool) -> Cache:
        if not isinstance(ring, bool):
            raise ArgumentTypeError(f"ring is {ring!r}: it must be True or False")
        if ring and block_table is not None:
            raise ArgumentError("ring and block_table are both given: a cache is one of them")
        cache = read_cache(q, k, v, kv_len, block_table, ring=ring)
        return replace(cache, ring=serving.check_ring(self._pattern, q.shape[1], cache, q.shape[2])) if ring else cache

    @cached_property
    def _last_rows(self) -> serving.LastRows:
        """Raises UnsupportedError where a row needs what no cache holds."""
        try:
            own = Attention(self._bound, self._options, self._modules, "last rows", self._pattern)
        except OtherRowsError as error:
            raise UnsupportedError(
                f"a cache of keys is not enough for `{self.name}`: a row needs {error}; call it on all tokens"
            ) from error

        def call(
            q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
        ) -> tuple[Tensor, Tensor | None]:
            found = own._call(q, k, v, scale, own.has_lse, inputs)
            return found if isinstance(found, tuple) else (found, None)

        return serving.LastRows(own._pattern, Steps(own._planner.text, own._pattern, self._options.strict), call)

    # --- looking at it ---

    def mask(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        head: int = 0,
        heads: int | None = None,
        kv_heads: int | None = None,
        **inputs: object,
    ) -> Tensor:
        """The relation, bool (Nq, Nk); with a leading batch dimension where an input has one.

        Of several branches it is the pairs that one of them sees; a unit of keys stands for its tokens.

        `heads` matters only to a relation that reads the number of heads; it defaults to what the parameters and inputs
        say.
        """
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, at_least=head + 1)
        if not 0 <= head < sizes.heads:
            raise ArgumentError(f"head is {head}: there are {sizes.heads} heads")
        batched = any("batch" in tensor.dims for tensor in self._pattern.tensors)
        masks = [self._mask(sizes, inputs, b, head) for b in range(sizes.batch if batched else 1)]
        return torch.stack(masks) if batched else masks[0]

    def _mask(self, sizes: Sizes, inputs: Mapping[str, object], batch: int, head: int) -> Tensor:
        if self._steps is not None:
            return self._steps.mask(sizes, inputs, batch, head)
        relations = self._relations(sizes, inputs)
        return torch.from_numpy(relations.mask(batch, head, 0, sizes.n_q, 0, sizes.n_k))

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
        """What a call of this shape would do, and why.

        `device`: "cpu", or "cuda", of which the kernels are those for the GPU that is there, or else for sm_90.
        """
        target = planned_target(device, self._options.backend == "triton")
        if dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch, head_dim=head_dim, dtype=dtype)
        if self._steps is None:
            return self._planner.plan_on(target, sizes, inputs)
        return self._steps.plan(sizes, inputs, target)

    def source(
        self,
        target: str | None = None,
        *,
        head_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        **inputs: object,
    ) -> dict[str, str]:
        """The Triton text of every kernel of calls with such heads, by name.

        `target`: "sm_80", "sm_90", "sm_100" or "gfx942"; None: the GPU that is there, or else sm_90. `inputs` are
        needed only by patterns whose number of attentions depends on them.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError.
        """
        from attnc.runtime.gpu.sources import sources

        _check_counts(1, head_dim=head_dim)
        if dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")
        planners = [(self.name, self._planner)]
        if self._steps is not None:
            sizes = self._sizes(head_dim, None, None, None, inputs, head_dim=head_dim, dtype=dtype)
            planners = self._steps.by_kernels.planners(sizes, inputs)
        return sources(planners, named_target(target), head_dim, dtype)

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
        baseline: Literal["full", "causal"] = "full",
        tile: tuple[int, int] | None = None,
        order: Literal["natural", "bricks", "residues"] | None = None,
        **inputs: object,
    ) -> Simulation:
        """How fast a call of this shape can be on a machine, without it: a ladder of bounds, time and schedule.

        `device`: a machine's name ("a100", "h100", "h200", "b200"), a file that describes one, or "cpu", this one.
        `dtype`: bf16 unless given, fp32 on the CPU. `tile` (queries, keys) and `order` leave the search less to choose.

        Raises MachineError, ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        from attnc.compiler.simulation.candidates import Wish
        from attnc.runtime.simulating import default_dtype, find_device, simulated

        machine = find_device(device)
        dtype = default_dtype(machine) if dtype is None else dtype
        if dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch, head_dim=head_dim, dtype=dtype)
        if self._steps is None:
            attends = [self._relations(sizes, inputs)]
        else:
            attends = [relations for _, relations in self._steps.relations(sizes, inputs)]
        plan = self._planner.plan if self._steps is None else self._steps.plan
        return simulated(
            self.name,
            self._bound.values,
            attends,
            sizes,
            machine,
            lambda: plan(sizes, inputs),
            stage,
            baseline,
            Wish(tile, order),
        )

    def growth(self, *, heads: int | None = None) -> Growth:
        """How the visible pairs grow with the length: a formula with its derivation, or a law that is fitted.

        Of `heads` heads together, where they differ. Of a grid of tokens it is fitted along its first axis.
        """
        from attnc.runtime.simulating import growth

        return growth(self._bound, self._pattern, heads)

    def floors(
        self, n_q: int, n_k: int | None = None, *, heads: int | None = None, **inputs: object
    ) -> tuple[Floor, ...]:
        """How sparse the pattern can become by its real parameters, and what is visible even then."""
        from attnc.runtime.simulating import floors

        return floors(self._bound, self._sizes(n_q, n_k, heads, heads, inputs), inputs)

    def module(self, *, heads: int, dk: int, dv: int, **init: object) -> AttentionModule:
        """A module that owns the learned tensors as Parameters, zeros unless `init` gives them by name.

        A size that the pattern names itself is given as a number: `module(heads=8, dk=64, dv=64, length=512)`.

        Raises ArgumentError, ArgumentTypeError.
        """
        from attnc.runtime.module import AttentionModule, initial

        _check_counts(1, heads=heads, dk=dk, dv=dv)
        return AttentionModule(self, initial(self._pattern, {"head": heads, "dk": dk, "dv": dv}, init))

    def picture(self, n: int, *, head: int = 0, **inputs: object) -> str:
        """The pattern at length n as an SVG: element view, tile view, keys per row."""
        from attnc.runtime.pictures.draw import draw, to_svg

        _check_counts(0, n=n, head=head)
        return to_svg(draw(self, n, None, head=head, **inputs))

    # --- inside ---

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        refuse_options(self._pattern, inputs)
        sizes = check_tensors(q, k, v)
        factor = float(sizes.dk**-0.5) if scale is None else _finite(scale)
        tensors = input_tensors(self._pattern, inputs)
        check_promises(self._bound.program.inputs, tensors[: len(self._bound.program.inputs)])
        real = {t.name: x for t, x in zip(self._pattern.tensors, tensors, strict=True)}
        if self._steps is not None:
            return self._steps.densely(q, k, v, Given(sizes, inputs, real, factor))
        out, lse = reference.attend(q, k, v, self._relations(sizes, inputs), factor, real)
        return out.to(q.dtype), lse

    def _lse_of(self, pair: tuple[Tensor, Tensor | None], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        """What a call returns."""
        out, lse = pair
        if not return_lse:
            return out
        if lse is None:
            raise UnsupportedError(f"return_lse: `{self.name}` has no LSE, as its result is not one softmax")
        return out, lse

    def _general(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object], tensors: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """A call with scores, weights, values or branches of its own, in torch."""
        q, k, v = cast_for_autocast(q, k, v)
        sizes = check_tensors(q, k, v)
        operators.refuse_device(q)
        factor = float(sizes.dk**-0.5) if scale is None else scale
        by_kernels = q.is_cuda or self._options.backend == "triton"
        if self._steps is not None:
            named = {t.name: x for t, x in zip(self._pattern.tensors, tensors, strict=True)}
            given = Given(sizes, inputs, named, factor)
            return self._steps.on_gpu(q, k, v, given) if by_kernels else self._steps.on_cpu(q, k, v, given)
        real = [x for x, tensor in zip(tensors, self._pattern.tensors, strict=True) if tensor.kind == "real"]
        relations = self._relations(sizes, inputs)
        if by_kernels:
            from attnc.runtime.gpu import scored as scored_on_gpu

            return scored_on_gpu.attend(q, k, v, relations, factor, self._planner, real, tensors)
        call = Call(self._planner.plan_of(q, k, v, tensors), relations, factor)
        return scored.attend(q, k, v, call, real)

    def _sizes(
        self,
        n_q: int,
        n_k: int | None,
        heads: int | None,
        kv_heads: int | None,
        inputs: Mapping[str, object],
        *,
        at_least: int = 1,
        batch: int | None = None,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> Sizes:
        n_k = n_q if n_k is None else n_k
        known = self._known_counts(inputs)
        heads = max(known.get("head", 1), at_least) if heads is None else heads
        kv_heads = known.get("kv_head", heads) if kv_heads is None else kv_heads
        batch = known.get("batch", 1) if batch is None else batch
        _check_counts(0, n_q=n_q, n_k=n_k)
        _check_counts(1, heads=heads, kv_heads=kv_heads, batch=batch, head_dim=head_dim)
        if heads % kv_heads:
            raise ArgumentError(f"heads is {heads} and kv_heads {kv_heads}: heads must be a multiple of kv_heads")
        return Sizes(n_q, n_k, batch, heads, kv_heads, head_dim, head_dim, str(dtype).removeprefix("torch."))

    def _known_counts(self, inputs: Mapping[str, object]) -> dict[str, int]:
        """Batch and heads as far as inputs and per-head parameters tell."""
        counts: dict[str, int] = {}
        counts.update(("head", length) for _, length in self._pattern.head_lists)
        for tensor in self._pattern.tensors:
            shape = getattr(inputs.get(tensor.name), "shape", ())
            counts.update({str(dim): int(size) for dim, size in zip(tensor.dims, shape, strict=False)})
        return counts

    def _relations(self, sizes: Sizes, inputs: Mapping[str, object]) -> Relations:
        return relations_of(self._pattern, call_shape(self._pattern, sizes, inputs))


def _restored(
    source: SourceFile, name: str, values: dict[str, object], options: Options, modules: dict[str, SourceFile]
) -> Attention:
    """An `Attention` from its pickled spec."""
    return Attention(identity.bound_program(source, name, values, modules), options, modules)


def _check_counts(least: int, **counts: object) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name} is {value!r}: it must be a whole number")
        if value < least:
            raise ArgumentError(f"{name} is {value}: it must be at least {least}")


def _finite(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ArgumentTypeError(f"scale is {type(scale).__name__}: it must be a number")
    if not abs(scale) < float("inf"):
        raise ArgumentError(f"scale is {scale}: it must be finite")
    return float(scale)


def _untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function` kept from torch.compile, whose parts take seconds to import: where they are not, nothing compiles."""
    if "torch._dynamo" not in sys.modules:
        return function
    return cast("Callable[P, R]", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def _result(pair: tuple[Tensor, Tensor], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return pair if return_lse else pair[0]


__all__ = ["Attention", "compile_attention"]
