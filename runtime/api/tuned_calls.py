"""Calls of a compiled pattern whose schedules are measured: at the first call of a shape, or on request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.tensor_checks import check_are_tensors, completed
from attnc.runtime.call.transforms import cast_for_autocast, is_watched
from attnc.runtime.choices.choice_source import Choices, ChoiceSource
from attnc.runtime.choices.records import Record
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.runtime.tuning.tune_request import TuneRequest
from attnc.runtime.tuning.tuner import TunedCall, Untuned, stage_of, tune

_log = logging.getLogger(__name__)


class TunedCalls:
    """The measurements of one compiled pattern in this process."""

    def __init__(self) -> None:
        self._measured: Recent[Record | Untuned] = Recent(SETTINGS.plans)

    def measure_first(
        self,
        compiled: CompiledAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        inputs: Mapping[str, object],
    ) -> None:
        """Tune a call unless its shape was tuned before. In graphs, transforms and traces nothing is measured."""
        check_are_tensors(q, k, v)
        if compiled.planner.tuned is None or is_watched(q, k, v):
            return
        autocast = torch.is_autocast_enabled(q.device.type) and torch.get_autocast_dtype(q.device.type)
        key = (q.shape, k.shape, v.shape, q.dtype, q.device, autocast, stage_of((q, k, v, *inputs.values())))
        self._measured.get((compiled.form, *key), lambda: _logged(compiled, q, k, v, scale, inputs))


def _logged(
    compiled: CompiledAttention, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
) -> Record | Untuned:
    result = tuned_call(compiled, q, k, v, scale, inputs)
    if isinstance(result, Untuned):
        _log.log(logging.INFO if result.expected else logging.WARNING, "`%s`: %s", compiled.name, result)
    return result


def tuned_call(
    compiled: CompiledAttention, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
) -> Record | Untuned:
    """Measure the first few schedules of a call, as `Attention.tune` does. Raises ArgumentError and those of calls."""
    tuned, seconds = compiled.planner.tuned, compiled.options.tune.seconds
    if tuned is None or not seconds:
        raise ArgumentError('tune: compile the pattern with a time to measure in, as in tune="2s"')
    return tune(tuning_call(compiled, q, k, v, scale, inputs), tuned, seconds)


def tuning_call(
    compiled: CompiledAttention, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
) -> TunedCall:
    """Return a call in the form that tuning takes. Raises ArgumentError, ArgumentTypeError, UnsupportedError."""
    check_are_tensors(q, k, v)
    by_kernels = compiled.executor_of(q).name == "triton"
    tried: dict[Choices, CompiledAttention] = {}

    def compute(choices: Choices, q: Tensor, k: Tensor, v: Tensor, call_inputs: Mapping[str, object]) -> Tensor:
        if choices not in tried:
            tried[choices] = compiled.with_options(
                replace(compiled.options, tune=ChoiceSource("tried", choices=choices))
            )
        return tried[choices].run(q, k, v, scale, call_inputs, wants_lse=False).out

    def planners(request: TuneRequest) -> list[Planner]:
        """Return the planner of every attention that tuning covers; recurrences and selections are not tuned."""
        if compiled.is_recurrence or compiled.pattern.chooses:
            return []
        attentions = compiled.parts.attentions
        if attentions is None:
            return [compiled.planner]
        by_name = attentions.planners(request.sizes, request.inputs, splits_sums=request.by_kernels)
        return [planner for _, planner in by_name]

    completed_inputs = completed(compiled.pattern, inputs) if inputs else inputs
    tensors = cast_for_autocast(compiled.name, q, k, v)
    return TunedCall(compiled.name, compute, planners, tensors, completed_inputs, by_kernels)
