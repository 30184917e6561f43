"""A pattern with its parameters: its name, its parts, the sizes and the relations of its calls. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Pattern
from attnc.compiler.passes.attentions import content_masks_of_selection, stateful_alone
from attnc.compiler.planning.build_plan import CallShape, Relations
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError, needing_torch
from attnc.runtime.call.call_shapes import TensorSizes, check_counts, names_read, shape_of_call
from attnc.runtime.planning.branch_relations import BranchRelations, is_single
from attnc.runtime.planning.call_relations import relations_of
from attnc.runtime.texts.library import load
from attnc.spec.meaning.bind import bind
from attnc.spec.program import BoundProgram
from attnc.spec.source import SourceFile

if TYPE_CHECKING:
    from attnc.runtime.call.example_inputs import Example
    from attnc.runtime.executors.recurrent.derived_recurrence import DerivedRecurrence


def read_spec(
    spec: str | PathLike[str], params: Mapping[str, object], preset: str | None
) -> tuple[BoundProgram, dict[str, SourceFile]]:
    """Return the checked program that a spec names, as for `compile_attention`, and the modules that it uses.

    Raises SpecError, PatternNotFoundError.
    """
    program, modules = load(spec)
    return bind(program, params, preset), modules


class PatternDescription:
    """A lowered pattern, with the facts about its calls that follow from their sizes."""

    def __init__(self, bound: BoundProgram, modules: Mapping[str, SourceFile], pattern: Pattern) -> None:
        self._bound = bound
        self._modules = modules
        self._pattern = pattern

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
    def has_mask(self) -> bool:
        """Whether keys are tokens or units of tokens, so that `mask` and `picture` are available."""
        if self._pattern.recur is not None or self._pattern.stateful:
            return False
        branches = self._branches
        return branches is None or branches.has_tokens

    @property
    def is_recurrence(self) -> bool:
        """Whether tokens update a state one after another, so that there are no pairs of queries and keys."""
        return len(self._pattern.nodes) == 0  # a form that torch.compile traces

    @property
    def relation_inputs(self) -> frozenset[str]:
        """The inputs that `mask` and `plan` need: those that the relation reads, or whose sizes it reads."""
        pattern = self._pattern
        names = names_read(pattern) | {t.name for item in pattern.selections for t in content_masks_of_selection(item)}
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

    def _arrays_of(self, examples: Mapping[str, Example]) -> dict[str, NDArray[Any]]:
        """Return example inputs as relations read them: integers, and the shapes of real numbers.

        Real numbers that a pattern sorts tokens by are drawn. Raises TorchMissingError where torch is not installed.
        """
        sorts = {tensor.made.of for tensor in self._pattern.tensors if tensor.made is not None}
        arrays = {name: example.array for name, example in examples.items()}
        for name, example in examples.items():
            if name in sorts and example.draw is not None:
                with needing_torch(f"an example of `{name}`, the random numbers that `{self.name}` sorts tokens by,"):
                    arrays[name] = example.tensor.numpy()
        return arrays

    # --- inside ---

    @property
    def _branches(self) -> BranchRelations | None:
        """The relations of the attentions one by one; None for one attention over tokens, and for a recurrence."""
        return self._separate

    @cached_property
    def _separate(self) -> BranchRelations | None:
        pattern = self._pattern
        return None if pattern.recur is not None or is_single(pattern) else BranchRelations(pattern)

    def _recurrents(self) -> Sequence[DerivedRecurrence]:
        """Return the recurrence itself, or each branch with a state."""
        from attnc.runtime.executors.recurrent.derived_recurrence import DerivedRecurrence  # only for recurrences

        pattern = self._pattern
        if pattern.recur is not None:
            return [DerivedRecurrence(pattern, pattern.recur)]
        return [DerivedRecurrence(stateful_alone(pattern, recur), recur) for recur in pattern.stateful]

    def _refuse_recurrence(self, what: str, instead: str = "") -> None:
        """Raise UnsupportedError if the pattern is a recurrence, for a method that needs pairs of queries and keys."""
        if self.is_recurrence:
            also = f"; {instead}" if instead else ""
            raise UnsupportedError(
                f"`{self.name}` is a recurrence, which has no pairs of queries and keys: no {what}{also}"
            )

    def _refuse_states(self, what: str) -> None:
        """Raise UnsupportedError for a recurrence, and for a pattern in which a branch has a state."""
        self._refuse_recurrence(what)
        if self._pattern.stateful:
            name = self._pattern.stateful[0].name
            raise UnsupportedError(f"`{self.name}` has a branch with a state, `{name}`, which has no {what}")

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
        dtype: str = "float32",
    ) -> TensorSizes:
        """Return the sizes of a call; counts that are None come from inputs and per-head parameters.

        `at_least`: the least number of heads by default. Raises ArgumentError for counts that do not fit each other.
        """
        n_k = n_q if n_k is None else n_k
        counts = self._known_counts(inputs)
        if heads is None and kv_heads is None and counts.get("kv_head", 1) > 1 and "head" not in counts:
            raise ArgumentError(f"an input has {counts['kv_head']} kv heads: pass the number of query heads, heads=…")
        heads = max(counts.get("head", 1), at_least) if heads is None else heads
        kv_heads = counts.get("kv_head", heads) if kv_heads is None else kv_heads
        batch = counts.get("batch", 1) if batch is None else batch
        check_counts(0, n_q=n_q, n_k=n_k)
        check_counts(1, heads=heads, kv_heads=kv_heads, batch=batch, head_dim=head_dim)
        if heads % kv_heads:
            raise ArgumentError(f"heads is {heads} and kv_heads {kv_heads}: heads must be a multiple of kv_heads")
        return TensorSizes(n_q, n_k, batch, heads, kv_heads, head_dim, head_dim, dtype)

    def _known_counts(self, inputs: Mapping[str, object]) -> dict[str, int]:
        """Return the batch size and the numbers of heads that inputs and per-head parameters show."""
        counts: dict[str, int] = {}
        counts.update(("head", length) for _, length in self._pattern.head_lists)
        for tensor in self._pattern.tensors:
            shape = getattr(inputs.get(tensor.name), "shape", ())
            counts.update({str(dim): int(size) for dim, size in zip(tensor.dims, shape, strict=False)})
        return counts

    def _shape_of(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        """Return the shape of a call; CPU plans also need the rates of the machine."""
        return shape_of_call(self._pattern, sizes, inputs)

    def _relations(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Relations:
        """Return the relation of a call of the only attention. Raises the errors of a call."""
        return relations_of(self._pattern, self._shape_of(sizes, inputs))

    def _visible(self, sizes: TensorSizes, inputs: Mapping[str, object], batch: int, head: int) -> NDArray[np.bool_]:
        """Return the pairs visible in one head of a batch entry, (queries, keys)."""
        branches = self._branches
        if branches is not None:
            return branches.visible(sizes, inputs, batch, head)
        return self._relations(sizes, inputs).mask(batch, head, 0, sizes.n_q, 0, sizes.n_k)
