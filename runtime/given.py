"""One call of several attentions: what they are given besides q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnc.runtime.call import Sizes


@dataclass(frozen=True)
class Given:
    """One call: sizes, inputs by name (real ones among them), and the scale.

    `states`: what branches with a state give, by name, where it is known already.
    """

    sizes: Sizes
    inputs: Mapping[str, object]
    real: Mapping[str, Tensor]
    scale: float
    states: Mapping[str, Tensor] | None = None
