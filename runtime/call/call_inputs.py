"""The inputs of one call of several attentions, besides q, k and v."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from attnc.runtime.call.tensor_checks import TensorSizes


@dataclass(frozen=True)
class CallInputs:
    """One call: sizes, inputs by name (real inputs among them), and the scale.

    `states`: the outputs of branches with a state, by name, where they are computed already.
    """

    sizes: TensorSizes
    inputs: Mapping[str, object]
    real: Mapping[str, Tensor]
    scale: float
    states: Mapping[str, Tensor] | None = None

    @property
    def shape(self) -> Hashable:
        """The key of plans that do not depend on input data."""
        arrays = {name: x if isinstance(x, Tensor) else np.asarray(x) for name, x in self.inputs.items()}
        shapes = ((name, tuple(x.shape)) for name, x in arrays.items())
        return self.sizes, tuple(sorted(shapes))
