"""The relations of a pattern's attentions, one by one, and the union of their visible pairs. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir.value_nodes import is_scored
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.passes.attentions import alone, open_choices, rows_of
from attnc.compiler.planning.build_plan import CallShape, Relations
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.call_shapes import TensorSizes, number, shape_of_call
from attnc.runtime.planning.call_relations import relations_of
from attnc.runtime.planning.gather_choices import choice_of
from attnc.spec.errors import EvaluationError

Int64 = NDArray[np.int64]

MOST_MEMBERS = 128
"""Maximum number of branches of a family: each is planned and computed separately, 10 ms of a first call."""


def is_single(pattern: ir.Pattern) -> bool:
    """Check whether a pattern is one attention over tokens, with nothing to combine and nothing selected."""
    if len(pattern.nodes) != 1 or pattern.combine is not None or pattern.chooses:
        return False
    (node,) = pattern.nodes
    return is_scored(node) and choice_of(node) is None


class BranchRelations:
    """The attentions of a pattern in their order, each with its own relation."""

    def __init__(self, pattern: ir.Pattern) -> None:
        self._pattern = pattern
        self._own_patterns: dict[tuple[str, int | None], ir.Pattern] = {}

    @property
    def has_tokens(self) -> bool:
        """Whether the keys of some attention are tokens, or units of tokens."""
        return any(node.keys is None or node.key_of is not None for node in self._pattern.nodes)

    @cached_property
    def open(self) -> BranchRelations:
        """The branch relations in which every key that a selection may select is visible."""
        return BranchRelations(open_choices(self._pattern))

    def relations(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> list[tuple[ir.Attend, Relations]]:
        """Return the relations of every attention; `inputs` include the results of selections."""
        relations = []
        for node in self._pattern.nodes:
            members = [None] if node.family is None else self._members(node, sizes, inputs)
            for i in members:
                pattern = self._pattern_of(node, i)
                branch_inputs = self._own_inputs(pattern, inputs)
                relations.append((pattern.attend, relations_of(pattern, self._shape_of(pattern, sizes, branch_inputs))))
        return relations

    def visible(self, sizes: TensorSizes, inputs: Mapping[str, object], batch: int, head: int) -> NDArray[np.bool_]:
        """Return the pairs of tokens visible to at least one attention; a unit stands for its tokens."""
        if not self.has_tokens:
            name = self._pattern.name
            raise UnsupportedError(f"`{name}` has keys that are not tokens: it has no mask of tokens")
        result = np.zeros((sizes.n_q, sizes.n_k), dtype=np.bool_)
        for node, relations in self.relations(sizes, inputs):
            if node.keys is not None and node.key_of is None:
                continue
            shape = relations.shape
            seen = relations.mask(batch, head, 0, shape.n_q, 0, shape.n_k)
            result |= seen if node.keys is None else seen[:, places(node, relations, sizes.n_k)]
        return result

    def _shape_of(self, pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
        """Return the shape of a call of one attention."""
        return shape_of_call(pattern, sizes, inputs)

    def _pattern_of(self, node: ir.Attend, member: int | None) -> ir.Pattern:
        """Return one attention as a pattern of its own."""
        key = node.name, member
        if key not in self._own_patterns:
            self._own_patterns[key] = alone(self._pattern, node, member)
        return self._own_patterns[key]

    def _own_inputs(self, pattern: ir.Pattern, inputs: Mapping[str, object]) -> Mapping[str, object]:
        """Return the inputs without the results of selections that this pattern does not read."""
        others = {item.name for item in self._pattern.selections} - {tensor.name for tensor in pattern.tensors}
        return {name: x for name, x in inputs.items() if name not in others}

    def _members(self, node: ir.Attend, sizes: TensorSizes, inputs: Mapping[str, object]) -> range:
        assert node.family is not None
        pattern = rows_of(replace(self._pattern, nodes=()))
        pattern = checked(replace(pattern, requirements=(), nodes=(replace(pattern.attend, family=node.family),)))
        named = self._shape_of(pattern, sizes, self._own_inputs(pattern, inputs)).sizes
        low, high = (number(end, sizes, named) for end in node.family[1:])
        if high - low > MOST_MEMBERS and not self._pattern.chooses:
            message = f"the family `{node.name}` has {high - low} branches; it must have at most {MOST_MEMBERS}"
            raise EvaluationError("A508", message, None, "make its range shorter, or join conditions in one `visible`")
        return range(low, high)


def places(node: ir.Attend, relations: Relations, tokens: int) -> Int64:
    """Return the key that holds each token."""
    assert node.key_of is not None
    window = Window(0, 0, relations.shape.n_q, tokens, 0)
    specialised = specialise(node.key_of, relations.sizes, relations.slices, window, batch=0, head=0, group=1)
    places: Int64 = exact_evaluation.integers(specialised, (0, 1), (0, tokens))[0]
    return places


__all__ = ["BranchRelations", "is_single", "places"]
