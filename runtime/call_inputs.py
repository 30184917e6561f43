"""One call of several attentions: what they are given besides q, k and v."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from attnc.runtime.tensor_checks import TensorSizes


@dataclass(frozen=True)
class CallInputs:
    """One call: sizes, inputs by name (real ones among them), and the scale.

    `states`: what branches with a state give, by name, where it is known already.
    """

    sizes: TensorSizes
    inputs: Mapping[str, object]
    real: Mapping[str, Tensor]
    scale: float
    states: Mapping[str, Tensor] | None = None

    @property
    def shape(self) -> Hashable:
        """What plans depend on that know nothing of what inputs hold."""
        known = {name: x if isinstance(x, Tensor) else np.asarray(x) for name, x in self.inputs.items()}
        shapes = ((name, tuple(x.shape)) for name, x in known.items())
        return self.sizes, tuple(sorted(shapes))
