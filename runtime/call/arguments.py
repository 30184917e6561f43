"""The arguments of one call, made and checked once and passed whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.call.given_devices import check_devices
from attnc.runtime.call.tensor_checks import TensorSizes, check_tensors, completed, input_tensors


@dataclass(frozen=True, eq=False)
class CallArguments:
    """The arguments of one call of a pattern.

    q (batch, heads, queries, dk), k (batch, kv heads, keys, dk), v (batch, kv heads, keys, dv). `inputs`: the pattern's
    inputs by name, as they were passed; `tensors`: the same as tensors. `scale`: the scale in effect. `wants_lse`:
    whether the caller reads the LSE. `state`: the states before the first token, by name. `states`: the outputs of
    branches with a state, by name, where they are computed already. `passed_scale`: the scale as it was passed.
    `known_sizes`: the sizes of the call where k and v are not those of its tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    scale: float
    wants_lse: bool = True
    state: object = None
    states: Mapping[str, Tensor] | None = None
    passed_scale: float | None = None
    known_sizes: TensorSizes | None = None

    @cached_property
    def sizes(self) -> TensorSizes:
        """The sizes of the call. Raises ArgumentError, ArgumentTypeError for tensors that do not fit each other."""
        return check_tensors(self.q, self.k, self.v) if self.known_sizes is None else self.known_sizes

    @property
    def shape(self) -> Hashable:
        """The key of plans that do not depend on input data."""
        arrays = {name: x if isinstance(x, Tensor) else np.asarray(x) for name, x in self.inputs.items()}
        shapes = ((name, tuple(x.shape)) for name, x in arrays.items())
        return self.sizes, tuple(sorted(shapes))

    def tensors_of(self, pattern: Pattern) -> list[Tensor]:
        """Return the inputs of a pattern in its order."""
        return [self.tensors[tensor.name] for tensor in pattern.tensors]


def read_call(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    inputs: Mapping[str, object],
    state: object = None,
    states: Mapping[str, Tensor] | None = None,
) -> CallArguments:
    """Return the arguments of a call; `scale` None: dk^-1/2.

    Raises ArgumentError, ArgumentTypeError, UnsupportedError for tensors that do not fit each other or the pattern.
    """
    sizes = check_tensors(q, k, v)
    in_order = input_tensors(pattern, inputs)
    check_devices(pattern, inputs, in_order, q)
    tensors = {tensor.name: x for tensor, x in zip(pattern.tensors, in_order, strict=True)}
    factor = float(sizes.dk**-0.5) if scale is None else scale
    return CallArguments(
        q,
        k,
        v,
        completed(pattern, inputs),
        tensors,
        factor,
        state=state,
        states=states,
        passed_scale=scale,
        known_sizes=sizes,
    )
