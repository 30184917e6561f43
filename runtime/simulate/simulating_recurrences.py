"""Simulations of a recurrence: its call from sizes alone, on the requested machine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attnc.compiler.ir import Recur
from attnc.compiler.simulation.cpu_ladder import CpuMachine
from attnc.compiler.simulation.machine import MachineError
from attnc.compiler.simulation.recurrent.recurrence_call import call_of, own_sizes, repeats
from attnc.compiler.simulation.recurrent.recurrence_cpu_ladder import simulate_recurrence_cpu
from attnc.compiler.simulation.recurrent.recurrence_gpu_ladder import simulate_recurrence_gpu
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.compiler.simulation.simulation import PASSES, Pass, Shape
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.call_shapes import TensorSizes, is_tensor
from attnc.runtime.executors.recurrent.derived_recurrence import DerivedRecurrence
from attnc.runtime.simulate.simulating import Device
from attnc.spec.program import Value
from attnc.spec.suggest import did_you_mean

OWN_SIZE, OWN_REPEATS = 64, 2
"""Sizes of dimensions that neither q, k, v nor an input fixes: of a state, and of a repeated step."""

MOST_TOKENS = 16
"""Maximum number of tokens of a decoding call."""


def simulated_recurrence(
    recurrent: DerivedRecurrence,
    params: Mapping[str, Value],
    sizes: TensorSizes,
    device: Device,
    stage: Pass,
    inputs: Mapping[str, object],
) -> RecurrenceSimulation:
    """Simulate a call of `sizes.n_q` tokens; decoding follows `sizes.n_k` tokens.

    `inputs`: inputs that show sizes, and sizes themselves by name, `slots=64`; other sizes are assumed, with a note.

    Raises MachineError, ArgumentError.
    """
    if stage not in PASSES:
        raise ArgumentError(f"stage is {stage!r}: it must be {', '.join(map(repr, PASSES))}")
    name = recurrent.recur.name
    if not sizes.n_q:
        raise ArgumentError(f"n_q is 0: `{name}` needs at least one token to be simulated")
    if stage != "decode" and sizes.n_q != sizes.n_k:
        raise ArgumentError(
            f"n_q is {sizes.n_q} and n_k {sizes.n_k}: a recurrence takes as many keys as queries; "
            f'stage="decode" has n_k tokens before'
        )
    if stage == "decode" and sizes.n_q > MOST_TOKENS:
        raise MachineError(f"decode takes 1 to {MOST_TOKENS} tokens, got {sizes.n_q}")
    named, notes = _named(recurrent, sizes, inputs)
    shape = Shape(sizes.batch, sizes.heads, sizes.kv_heads, sizes.n_q, sizes.n_k, sizes.dk, sizes.dv, sizes.dtype)
    call = call_of(recurrent.recur, recurrent.derived, recurrent.reason, params, shape, named, notes)
    if isinstance(device, CpuMachine):
        return simulate_recurrence_cpu(call, device, _nodes(recurrent.recur), stage)
    return simulate_recurrence_gpu(call, device, stage)


def _named(
    recurrent: DerivedRecurrence, sizes: TensorSizes, inputs: Mapping[str, object]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return every size by name, and notes on the assumed sizes."""
    size_names = own_sizes(recurrent.recur)
    named = {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "dk": sizes.dk, "dv": sizes.dv}
    tensors = {tensor.name: tensor for tensor in recurrent.pattern.tensors}
    for name, value in inputs.items():
        if name in size_names:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}: a size must be an integer, at least 1")
            named[name] = value
        elif name in tensors and (is_tensor(value) or isinstance(value, np.ndarray)):
            named |= {str(d): n for d, n in zip(tensors[name].dims, value.shape, strict=False) if d in size_names}
        else:
            raise _unknown_input(recurrent, name, value, size_names)
    repeated = repeats(recurrent.recur)
    assumed = {name: OWN_REPEATS if name in repeated else OWN_SIZE for name in sorted(size_names - named.keys())}
    notes = tuple(f"{name} is assumed to be {value}: pass `{name}` to change it" for name, value in assumed.items())
    return {**named, **assumed}, notes


def _unknown_input(recurrent: DerivedRecurrence, name: str, value: object, size_names: frozenset[str]) -> ArgumentError:
    names = sorted({tensor.name for tensor in recurrent.pattern.tensors} | size_names)
    if name in names:
        return ArgumentError(f"{name} is {type(value).__name__}: it must be a torch tensor, or be left out")
    listed = f"it has {', '.join(names)}" if names else "it has none"
    return ArgumentError(
        f"`{recurrent.recur.name}` has no input and no size `{name}`: {did_you_mean(name, names, listed)}"
    )


def _nodes(recur: Recur) -> int:
    """Return the number of distinct IR nodes in the lines that run per token."""
    return len({node for root in (recur.read, *(step.value for step in recur.steps)) for node in root.below})


__all__ = ["simulated_recurrence"]
