"""A compiled pattern whose schedules are measured: at the first call of a shape, or on request."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.tensor_checks import check_are_tensors, completed
from attnc.runtime.call.transforms import cast_for_autocast, is_watched
from attnc.runtime.choices.choice_source import Choices, ChoiceSource
from attnc.runtime.choices.records import Record
from attnc.runtime.choices.tuned import Tuned
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.runtime.tuning.tuner import TunedCall, Untuned, stage_of, tune

_log = logging.getLogger(__name__)


class Tunable(CompiledAttention):
    """Methods that `tune=` adds to a pattern."""

    def __init__(self, *compiled: Any) -> None:
        super().__init__(*compiled)
        self._measures = self._options.tune.seconds > 0  # a bool, because torch.compile turns numbers into symbols
        self._measured: Recent[Record | Untuned] = Recent(SETTINGS.plans)

    @abstractmethod
    def _called(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool, inputs: Mapping[str, object]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run a call without measuring anything first."""

    @abstractmethod
    def _on_sequences(self) -> Tunable:
        """Return the pattern's form for calls with `cu_seqlens`."""

    @property
    def tuned(self) -> Tuned | None:
        """The tuned choices for calls; None where the cost model decides everything."""
        return self._planner.tuned

    def tune(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: object
    ) -> Record | Untuned:
        """Measure the first few schedules of a call on these tensors, as its first call would.

        The call includes its gradient where a tensor requires one. Returns `Untuned`, with the reason, where there is
        nothing to choose or the time of `tune=` is too short.

        Raises ArgumentError where the pattern was compiled without a time to measure in, and the errors of the call.
        """
        tunable = self if inputs.get("cu_seqlens") is None else self._on_sequences()
        if tunable.tuned is None or not tunable._measures:
            raise ArgumentError('tune: compile the pattern with a time to measure in, as in tune="2s"')
        return tune(tunable._tuning_call(q, k, v, scale, inputs), tunable.tuned, tunable._options.tune.seconds)

    def _measure_first(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> None:
        """Tune the call unless its shape was tuned before. In graphs, transforms and traces nothing is measured."""
        check_are_tensors(q, k, v)
        tuned = self.tuned
        if tuned is None or is_watched(q, k, v):
            return
        autocast = torch.is_autocast_enabled(q.device.type) and torch.get_autocast_dtype(q.device.type)
        key = (q.shape, k.shape, v.shape, q.dtype, q.device, autocast, stage_of((q, k, v, *inputs.values())))
        self._measured.get(key, lambda: self._measured_now(q, k, v, scale, inputs))

    def _measured_now(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> Record | Untuned:
        assert self.tuned is not None
        result = tune(self._tuning_call(q, k, v, scale, inputs), self.tuned, self._options.tune.seconds)
        if isinstance(result, Untuned):
            _log.log(logging.INFO if result.expected else logging.WARNING, "`%s`: %s", self.name, result)
        return result

    def _tuning_call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> TunedCall:
        """Return a call in the form that tuning takes. Raises ArgumentError, ArgumentTypeError, UnsupportedError."""
        check_are_tensors(q, k, v)
        self._refuse_backend(q)
        compiled: dict[Choices, Tunable] = {}

        def compute(choices: Choices, q: Tensor, k: Tensor, v: Tensor, call_inputs: Mapping[str, object]) -> Tensor:
            if choices not in compiled:
                compiled[choices] = self._by(choices)
            out = compiled[choices]._called(q, k, v, scale, False, call_inputs)
            assert isinstance(out, Tensor)
            return out

        completed_inputs = completed(self._pattern, inputs) if inputs else inputs
        tensors, by_kernels = cast_for_autocast(self.name, q, k, v), q.is_cuda or self._is_interpreted(q)
        return TunedCall(self.name, compute, self._tuned_planners, tensors, completed_inputs, by_kernels)

    def _by(self, choices: Choices) -> Tunable:
        """Return the pattern compiled with these choices, with planners of its own."""
        options = replace(self._options, tune=ChoiceSource("tried", choices=choices))
        return type(self)(self._bound, options, self._modules, self._form)
