"""Patterns whose relation is more than a selection of blocks, and their calls, for tile lists made on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from attnc.compiler.ir import Pattern
from attnc.compiler.passes.attentions import alone
from attnc.compiler.planning.build_plan import CallShape, Relations
from attnc.runtime.call.tensor_checks import TensorSizes, blank, call_shape
from attnc.runtime.planning.plans import relations_of

NOT_IN_KERNELS = """pattern counted
    align   end
    input   seen: int[batch, few]
    select chosen
        over   b = k // 16
        score  dot(q, mean(b.k))
        keep   rank < 2
    visible (k in chosen or any(seen[i] == k for i in few)) and k <= q
"""
"""A pattern whose tiles the host lists, as kernels do not compute aggregates over an input's entries."""

TEXTS: Mapping[str, str] = {
    "what was not chosen": """
    select worst
        score  -dot(q, k)
        from   k <= q
        keep   rank < 9
    visible k not in worst and k <= q""",
    "queries and keys that a head keeps": """
    select kept
        per    head
        score  dot(k, k)
        keep   rank < keys - 50
    visible q in kept and (k in kept or k == q)""",
    "two choices, of a group and by units of queries": """
    select near
        per    a = q // 16
        over   b = k // 8
        score  sum(dot(mean(a.q), mean(b.k)) for head in group)
        from   8 * b <= 16 * a
        keep   rank < 2
    select far
        score  sum(dot(q, k) for head in group)
        from   k <= q
        keep   rank < 3
    visible (k in near or k in far) and k <= q""",
    "rows with nothing": """
    select chosen
        over   b = k // 16
        score  dot(q, mean(b.k))
        keep   score >= 1.5
    visible k in chosen and (k <= q or k not in chosen)""",
    "strides of numbers that cover keys": """
    select spans
        over   n in 0 .. keys // 3
        covers 3 * n <= k < 3 * n + 5
        score  dot(q, k[3 * n])
        from   3 * n <= q
        keep   rank < 2
    visible (k in spans or q - k < 2) and k <= q""",
    "heads that differ": """
    select chosen
        per    batch
        score  sum(dot(k, k) for head)
        keep   rank < 7
    visible k in chosen and k <= q or 0 <= q - k <= 8 * head""",
    "a branch of what was chosen": """
    select chosen
        per    head
        score  dot(k, k)
        keep   rank < 11
    visible (k in chosen if q % 32 < 20 else k <= q and k not in chosen)""",
}


@dataclass(frozen=True)
class Asking:
    """A pattern and the sizes of its call."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    n_q: int = 70
    n_k: int = 70
    batch: int = 2
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def compiled(self, **options: Any) -> Attention:
        source = f"pattern asking\n    align   end{TEXTS[self.name]}\n" if self.name in TEXTS else self.name
        return compile_attention(source, **self.params, **options)

    def drawn(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Draw q with four heads, k and v with two, and the inputs."""
        sizes = ((4, self.n_q), (2, self.n_k), (2, self.n_k))
        vectors = [torch.randn(self.batch, heads, n, 16) for heads, n in sizes]
        return vectors, {name: torch.randn(shape) for name, shape in self.inputs.items()}

    @property
    def sizes(self) -> TensorSizes:
        return TensorSizes(self.n_q, self.n_k, self.batch, 4, 2, 16, 16, "float32")


OWN = tuple(Asking(name) for name in TEXTS)
OWN = (*OWN, Asking("what was not chosen", n_q=33, n_k=101), Asking("rows with nothing", n_q=64, n_k=129, batch=1))
LIBRARY = (
    Asking("anchor", {"block": 4, "group": 3, "theta": 1}, 75, 75),
    Asking("deepseek_sparse", {"topk": 6}, 75, 75, 2, {"iq": (2, 75, 3, 4), "ik": (2, 75, 4), "w": (2, 75, 3)}),
    Asking("dynamic_mask", {"keys_kept": 7}, 75, 75, 2, {"bias": (2, 2, 75)}),
    Asking(
        "hip",
        {"stages": [8, 4], "kept": [24, 8], "strides": [2, 1], "rows": 8, "sinks": 3, "window": 8},
        75,
        75,
    ),
    Asking("mminference_grid", {"strides": [7, 11], "probe": 6}, 75, 75),
    Asking("minference_vertical_slash", {"columns": 34, "slashes": 103, "block": 8, "probe": 5}, 200, 200),
    Asking("token_sparse", {"window": 6, "pool": 3, "tau": 0.3}, 75, 75),
)


def pattern_of(case: Asking) -> Pattern:
    """Return the only attention of a pattern."""
    whole = case.compiled(backend="triton").pattern
    return alone(whole, whole.nodes[0])


def drawn_choices(case: Asking, share: float) -> dict[str, Tensor]:
    """Draw truth tensors of the shapes of a call, true in a share of their runs of entries."""
    vectors, inputs = case.drawn()
    with torch.no_grad():
        q, k, v = vectors
        selections = case.compiled().chosen(q, k, v, **inputs)
    runs = {
        name: torch.rand(*x.shape[:-1], -(-x.shape[-1] // 9)).repeat_interleave(9, -1) for name, x in selections.items()
    }
    return {name: runs[name][..., : x.shape[-1]] < share for name, x in selections.items()}


def shape_of(case: Asking, pattern: Pattern, inputs: Mapping[str, Tensor], choices: Mapping[str, Any]) -> CallShape:
    """Return the shape of a call with inputs and selections, or the selections' shapes."""
    names = {tensor.name for tensor in pattern.tensors}
    tensors = {name: x for name, x in {**inputs, **choices}.items() if name in names}
    return call_shape(pattern, case.sizes, tensors)


def blank_shape(case: Asking, pattern: Pattern, inputs: Mapping[str, Tensor], choices: Mapping[str, Any]) -> CallShape:
    """Return the call shape without the data of any tensor."""
    tensors = {name: blank(x) for name, x in {**inputs, **choices}.items()}
    return shape_of(case, pattern, {}, {name: x for name, x in tensors.items() if x is not None})


def exact_relations(
    case: Asking, pattern: Pattern, inputs: Mapping[str, Tensor], choices: Mapping[str, Tensor]
) -> Relations:
    """Return the relations of a call whose content masks are known."""
    return relations_of(pattern, shape_of(case, pattern, inputs, choices))
