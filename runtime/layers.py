"""A compiled pattern as a layer of a receptive field."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.attentions import open_choices
from attnc.compiler.lowering.lower import lower
from attnc.compiler.receptive.fields import Layer
from attnc.compiler.values import output, output_lse, values_of
from attnc.runtime.attention import Attention
from attnc.runtime.call import Sizes
from attnc.runtime.errors import UnsupportedError
from attnc.runtime.steps import Steps, places


def layer_of(attention: Attention, n: int, heads: int, inputs: Mapping[str, Tensor]) -> Layer:
    """What a pattern shows among n tokens, in any of its heads and branches, for the first batch entry.

    A query sees a unit of keys whole: pooled keys hold something of each of their tokens. Where content chooses, it
    sees all that may be chosen.

    Raises UnsupportedError for keys that are no tokens and for branches that read what others gave, and what a call of
    these sizes raises.
    """
    pattern = open_choices(lower(attention.bound))
    _refuse(pattern)
    batch = next((x.shape[0] for t, x in _given(pattern, inputs) if t.dims[:1] == ("batch",)), 1)
    sizes = Sizes(n, n, batch, heads, heads, 64, 64, "float32")
    found = Steps("", pattern, False).relations(sizes, inputs)
    return Layer.of(n, [(r, None if node.keys is None else places(node, r, n)) for node, r in found])


def _given(pattern: ir.Pattern, inputs: Mapping[str, Tensor]) -> list[tuple[ir.Tensor, Tensor]]:
    return [(tensor, inputs[tensor.name]) for tensor in pattern.tensors if tensor.name in inputs]


def _refuse(pattern: ir.Pattern) -> None:
    if pattern.recur is not None:
        raise UnsupportedError(
            f"`{pattern.name}` is a recurrence: a token knows of all before it, as much as the state holds"
        )
    given: set[str] = set()
    for node in pattern.nodes:
        if node.keys is not None and node.key_of is None:
            raise UnsupportedError(
                f"`{pattern.name}` has keys that are no tokens: what a token knows of through them is not followed"
            )
        read = {below.tensor.name for root in values_of(node) for below in root.below if isinstance(below, ir.Element)}
        if read & given:
            raise UnsupportedError(
                f"`{pattern.name}` has an attention that reads what another one gave: what a token knows of through "
                f"both is not followed"
            )
        given |= {output(node).name, output_lse(node).name}
