"""A compiled pattern: what it is, and what every use of it starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from attnc.compiler.attentions import asked_by_selection
from attnc.compiler.ir import Pattern
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime import identity
from attnc.runtime.call import Sizes, call_shape, check_counts, names_read
from attnc.runtime.errors import ArgumentError, UnsupportedError
from attnc.runtime.general import general_of
from attnc.runtime.gpu.targets import target_of
from attnc.runtime.identity import Form, How
from attnc.runtime.planners import planner_in, shared_planner
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.tuning.tables import remember
from attnc.runtime.tuning.wanted import Wanted
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from attnc.runtime.recurrent.call import Recurrent
    from attnc.runtime.tuning.asked import Asked

NOT_COMPILED_HERE = (
    'backend="triton" on the CPU in torch.compile: Triton\'s interpreter is not traced; use the default backend, or '
    "leave fullgraph=True out"
)

Backend = Literal["auto", "cpu", "reference", "triton"]


@dataclass(frozen=True)
class Options:
    """How an `Attention` runs."""

    backend: Backend = "auto"
    strict: bool = False
    deterministic: bool = True
    tune: Wanted = field(default_factory=Wanted)


class Compiled:
    """A pattern with its options, immutable and stateless."""

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
        self._form = form
        if options.tune.table is not None:
            remember(options.tune.table)  # it came with a pickle, perhaps
        how = How(options.strict, options.deterministic, options.tune.text)
        text = identity.write(bound, modules, how, form)
        self._planner = (
            shared_planner(text, bound, how, form) if pattern is None else planner_in(form, text, pattern, how)
        )
        self._pattern: Pattern = self._planner.pattern
        self._rows_text = identity.write(bound, modules, how, "last rows")  # for what is traced
        self._general = general_of(self._planner)
        self._steps = self._general.steps
        self._plain = self._general.is_plain
        self._is_reference = options.backend == "reference"
        self._is_for_cpu = options.backend == "cpu"
        # What is tuned may change from call to call, and `direct` would not notice.
        self._skips_direct = options.backend in ("reference", "triton") or options.tune.source != "model"

    def _refuse_backend(self, q: Tensor) -> None:
        """Raise UnsupportedError where q is on a device that the backend asked for does not have."""
        if self._is_for_cpu and q.device.type not in ("cpu", "meta"):
            raise UnsupportedError(
                f'backend="cpu" and q is on {q.device}: the CPU executor takes tensors on the CPU; move them, or leave '
                f"`backend` out"
            )

    def _in(self, form: Form) -> Self:
        """Another form of the same. Raises OtherRowsError."""
        return type(self)(self._bound, self._options, self._modules, form, self._pattern)

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
        return self._general.has_lse

    @property
    def has_mask(self) -> bool:
        """Whether its keys are tokens, or units of them, so that `mask` and `picture` may be asked."""
        if self._pattern.recur is not None or self._pattern.stateful:
            return False
        return self._steps is None or self._steps.has_tokens

    @property
    def is_recurrence(self) -> bool:
        """Whether tokens update a state one after another: there are no pairs of queries and keys."""
        return len(self._pattern.nodes) == 0  # as torch.compile traces it

    @property
    def relation_inputs(self) -> frozenset[str]:
        """The inputs that the relation reads, or that have a size that it reads: what `mask` and `plan` need."""
        pattern = self._pattern
        names = names_read(pattern) | {t.name for item in pattern.selections for t in asked_by_selection(item)}
        read = [t for t in pattern.tensors if names & {t.name, *map(str, t.dims)}]
        return frozenset(t.name if t.made is None else t.made.of for t in read)

    @property
    def bound(self) -> BoundProgram:
        """The checked program with its parameters."""
        return self._bound

    @property
    def pattern(self) -> Pattern:
        """The pattern IR."""
        return self._pattern

    @property
    def ir(self) -> str:
        """The pattern IR, as text."""
        return str(self._pattern)

    def __eq__(self, other: object) -> bool:
        """Whether both are the same text with the same parameters and options."""
        return self is other or (isinstance(other, Compiled) and self._identity == other._identity)

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
        """Whether Triton's interpreter runs kernels. Raises UnsupportedError where it cannot, or would be traced."""
        if self._options.backend != "triton" or q.is_cuda:
            return False
        if torch.compiler.is_compiling():
            raise UnsupportedError(NOT_COMPILED_HERE)
        target_of(q.device)
        return True

    def _tuned_planners(self, asked: Asked) -> list[Planner]:
        """The planner of every attention of a call; of recurrences, and of what content chooses, nothing is tuned."""
        if self.is_recurrence or self._pattern.chooses:
            return []
        if self._steps is None:
            return [self._planner]
        steps = self._steps.by_kernels if asked.by_kernels else self._steps
        return [planner for _, planner in steps.planners(asked.sizes, asked.inputs)]

    def _recurrents(self) -> Sequence[Recurrent]:
        """What has states: the recurrence itself, or the branches that have some."""
        if self._steps is not None:
            return self._steps.stateful
        return () if self._general.recurrent is None else (self._general.recurrent,)

    def _refuse_recurrence(self, what: str, instead: str = "") -> None:
        """Raise UnsupportedError where a recurrence is asked for what only pairs of queries and keys have."""
        if self.is_recurrence:
            also = f"; {instead}" if instead else ""
            raise UnsupportedError(
                f"`{self.name}` is a recurrence, which has no pairs of queries and keys: no {what}{also}"
            )

    def _refuse_states(self, what: str) -> None:
        """The same, and where a branch has a state beside branches with keys."""
        self._refuse_recurrence(what)
        if self._pattern.stateful:
            name = self._pattern.stateful[0].name
            raise UnsupportedError(f"`{self.name}` has a branch with a state, `{name}`, which has no {what}")

    def _lse_of(self, pair: tuple[Tensor, Tensor | None], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        """What a call returns."""
        out, lse = pair
        if not return_lse:
            return out
        if lse is None:
            raise UnsupportedError(f"return_lse: `{self.name}` has no LSE, as its result is not one softmax")
        return out, lse

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
        if heads is None and kv_heads is None and known.get("kv_head", 1) > 1 and "head" not in known:
            raise ArgumentError(
                f"an input has {known['kv_head']} kv heads: say how many query heads there are, heads=…"
            )
        heads = max(known.get("head", 1), at_least) if heads is None else heads
        kv_heads = known.get("kv_head", heads) if kv_heads is None else kv_heads
        batch = known.get("batch", 1) if batch is None else batch
        check_counts(0, n_q=n_q, n_k=n_k)
        check_counts(1, heads=heads, kv_heads=kv_heads, batch=batch, head_dim=head_dim)
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
