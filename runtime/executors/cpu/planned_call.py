"""A planned call of one attention with custom scores, weights or values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.ir.value_nodes import tensors_of
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.values.pair_blocks import Operands


@dataclass(frozen=True)
class PlannedCall:
    """The non-tensor state of a call."""

    plan: Plan
    relations: Relations
    scale: float

    def operands(
        self, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Operands:
        """Return the operands of values: vectors by batch entry, and floating-point inputs in the pattern's order."""
        return operands_of(self.relations, self.scale, (q, k, v), inputs)


def operands_of(
    relations: Relations,
    scale: float,
    vectors: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    inputs: Sequence[Tensor],
) -> Operands:
    """Return the operands of values: q, k and v by batch entry, and floating-point inputs in the pattern's order."""
    pattern = relations.pattern
    return Operands(
        *vectors,
        {tensor.name: x for tensor, x in zip(tensors_of(pattern), inputs, strict=True)},
        relations.sizes,
        relations.slices,
        scale,
        torch.float64 if relations.shape.dtype == "float64" else torch.float32,
        pattern.origins,
        pattern.attend.keys is not None,
        looks_up=all(x.device.type == "cpu" for x in vectors[0]),
    )
