"""Measurement of the first few schedules of a call in turn, and storage of the fastest.

Knobs are measured one after another, each with the choices made for the previous knobs: the model's choice first, then
others until the time is over. Options under trial have planners of their own, so that no other call of the process uses
them.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attnc.runtime.call.tensor_checks import check_tensors
from attnc.runtime.choices.choice_keys import Executor, bucket_of
from attnc.runtime.choices.choice_source import Choices
from attnc.runtime.choices.records import MODEL, KnobTrial, Record, Stage
from attnc.runtime.choices.tuned import MEASURING, Tuned
from attnc.runtime.disk.store import store
from attnc.runtime.planning.plans import Planner
from attnc.runtime.tuning.timer import LEAST, LOOKED_AT, Clock, Timing, compared, is_faster
from attnc.runtime.tuning.tune_request import TuneRequest

if TYPE_CHECKING:
    from attnc.runtime.tuning.knobs import Knob

_log = logging.getLogger(__name__)

FASTER = 0.97
"""Maximum time of an option, relative to the model's choice, to be chosen instead."""

NOTHING = "there is nothing to tune: the computation leaves no choice, or content decides it"

PATIENCE = 10.0
"""Maximum wait for another process that measures on this machine, as a multiple of its time plus one second."""

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Maximum difference between results of two schedules, relative to the largest entry: far above summation order."""

Results = tuple["Tensor | None", ...]


@dataclass(frozen=True)
class Untuned:
    """A call that was not tuned, and why. `expected`: there is nothing to choose in it."""

    reason: str
    expected: bool = False

    def __str__(self) -> str:
        return self.reason


Report = Callable[[str], None]
Compute = Callable[[Choices, Tensor, Tensor, Tensor, Mapping[str, object]], Tensor]
"""A function (choices, q, k, v, inputs) → output of a call with these choices."""


@dataclass(frozen=True)
class TunedCall:
    """A call to tune; `planners` returns the planners of its attentions. `name`: the pattern's name."""

    name: str
    compute: Compute
    planners: Callable[[TuneRequest], Sequence[Planner]]
    tensors: tuple[Tensor, Tensor, Tensor]
    inputs: Mapping[str, object]
    by_kernels: bool

    @property
    def stage(self) -> Stage:
        """The measured stage."""
        return stage_of((*self.tensors, *self.inputs.values()))

    @property
    def request(self) -> TuneRequest:
        """The properties of the call that its schedule depends on."""
        q, k, v = self.tensors
        return TuneRequest(check_tensors(q, k, v), self.inputs, self.stage, q.device, self.by_kernels)

    def own(self) -> Callable[[Choices], Results]:
        """Return the call on detached tensors, which returns its output, and gradients of ones where required.

        The caller's hooks on tensors saved by autograd are not called: checkpoints count those calls.
        """
        q, k, v = (x.detach().requires_grad_(x.requires_grad) for x in self.tensors)
        inputs = {n: _fresh(x) for n, x in self.inputs.items()}
        leaves = [x for x in (q, k, v, *inputs.values()) if isinstance(x, Tensor) and x.requires_grad]
        recorded = self.stage == "training"

        def run(choices: Choices) -> Results:
            with torch.set_grad_enabled(recorded), saved_tensors_hooks(lambda x: x, lambda x: x):
                out = self.compute(choices, q, k, v, inputs)
                if not out.requires_grad:
                    return (out,)
                return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

        return run


def stage_of(arguments: Iterable[object]) -> Stage:
    """Return the stage to measure for a call on such tensors: with a gradient where one is required."""
    recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    return "training" if recorded else "forward"


def _fresh(x: object) -> object:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def tune(
    call: TunedCall, tuned: Tuned, seconds: float, report: Report = lambda text: None, *, again: bool = False
) -> Record | Untuned:
    """Return the record of a call, known or measured now within `seconds` and stored; or the reason for none.

    `again`: measure even if a record is known. Raises the errors of the call.
    """
    record = None if again else _known(call, tuned)
    if record is not None:
        return record
    with MEASURING.held(), store().alone(PATIENCE * (seconds + 1)):
        tuned.look_again()  # another process may have measured meanwhile
        record = None if again else _known(call, tuned)
        if record is not None:
            return record
        run = call.own()
        begun = time.perf_counter()
        model_results = run(())
        once = time.perf_counter() - begun
        if not all(result is None or bool(torch.isfinite(result).all()) for result in model_results):
            return Untuned("results are not finite, so schedules cannot be compared")
        try:
            return _tuned(call, tuned, run, model_results, seconds, once, report)
        except Exception as error:  # the call itself runs: a failing trial must not stop it
            return Untuned(f"a trial failed: {type(error).__name__}: {error}")


def _known(call: TunedCall, tuned: Tuned) -> Record | None:
    request = call.request
    record = tuned.record(request.sizes, _executor(call), request.device)
    return record if record is not None and (record.stage == "training" or request.stage == "forward") else None


def _executor(call: TunedCall) -> Executor:
    return "triton" if call.by_kernels else "cpu"


def _tuned(
    call: TunedCall,
    tuned: Tuned,
    run: Callable[[Choices], Results],
    model_results: Results,
    seconds: float,
    once: float,
    report: Report,
) -> Record | Untuned:
    """Measure and store the record of a call. `once`: the seconds that one run takes."""
    from attnc.runtime.tuning.knobs import knobs_of  # only to tune

    begun, request = time.perf_counter(), call.request
    knobs = knobs_of(call.planners(request), request, begun + seconds / 3)
    if not knobs and time.perf_counter() <= begun + seconds / 3:
        return Untuned(NOTHING, expected=True)
    trials, choices = _measured(call, knobs, run, model_results, begun + seconds, report)
    if not choices:
        reason = f"{seconds:g} s are too short to measure {LEAST} rounds of two schedules, by {request.stage}"
        return Untuned(f"{reason}; use {_enough(seconds, once, max(len(knobs), 1))}")
    key = tuned.key(request.sizes, _executor(call), request.device)
    record = Record(key, bucket_of(request.sizes), request.stage, choices, tuple(trials))
    tuned.keep(record)
    _log.info("tuned `%s` in %.2f s: %s", call.name, time.perf_counter() - begun, record)
    return record


def _enough(seconds: float, once: float, knobs: int) -> str:
    """Return a time in which two options of every knob can be measured, given the seconds of one run.

    Each option runs once to warm up and `LEAST` times to be measured; the slower of the two may take twice as long, and
    a third of the time may go to finding options. The result exceeds the time that was too short.
    """
    needed = max(1.5 * knobs * 3 * (LEAST + 1) * once, 2 * seconds)
    if needed < 1:
        return f"{math.ceil(1000 * needed)}ms"
    step = 10 ** max(math.floor(math.log10(needed)) - 1, 0)
    return f"{math.ceil(needed / step) * step}s"


def _measured(
    call: TunedCall,
    knobs: Sequence[Knob],
    run: Callable[[Choices], Results],
    model_results: Results,
    until: float,
    report: Report,
) -> tuple[list[KnobTrial], dict[str, str]]:
    """Measure options knob by knob; return every trial, and the choices."""
    clock = Clock(call.tensors[0].device)
    chosen: dict[str, str] = {}
    trials: list[KnobTrial] = []
    for i, knob in enumerate(knobs):
        knob_seconds = (until - time.perf_counter()) / (len(knobs) - i)
        if knob_seconds <= 0:
            break
        runs = {name: partial(run, tuple(sorted({**chosen, knob.name: name}.items()))) for name in knob.options}
        agrees, end = partial(_agrees, f"`{call.name}`, {knob.name}", model_results), time.perf_counter() + knob_seconds
        samples = compared(runs, clock, end, agrees, partial(_tell, report, knob))
        measured = {name: times for name, times in samples.items() if name == MODEL or len(times) >= LOOKED_AT}
        decided = len(samples.get(MODEL, ())) >= LEAST or time.perf_counter() < end  # all others are far behind
        if decided and len(measured) > 1:
            chosen[knob.name] = _fastest(measured)
            trials += [_trial(knob, name, Timing.of(times)) for name, times in measured.items()]
    return trials, chosen


def _tell(report: Report, knob: Knob, text: str) -> None:
    report(f"{knob.name}: {text}" if knob.name else text)


def _agrees(knob: str, model_results: Results, name: str, run: Callable[[], object]) -> bool:
    """Check that an option runs, and gives the results of the model's choice; `knob`: of a pattern, for messages."""
    try:
        results = run()
        assert isinstance(results, tuple)
        if name == MODEL or all(_close(a, b) for a, b in zip(results, model_results, strict=True)):
            return True
    except Exception as error:  # any error of a kernel compiler: the option is not available
        if name == MODEL:
            raise
        _log.info("%s %s does not run here: %s", knob, name, error)
        return False
    _log.warning("%s %s gives other results than the model's choice and is not used; please report it", knob, name)
    return False


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Check that two results are equal up to the order of summation."""
    if a is None or b is None:
        return a is b
    if not a.numel():
        return True
    largest = float(b.abs().max())
    return float((a.double() - b.double()).abs().max()) <= ALLOWED[a.dtype] * max(largest, 1e-30)


def _trial(knob: Knob, name: str, timing: Timing) -> KnobTrial:
    return KnobTrial(knob.name, name, knob.options[name], timing.median, timing.low, timing.high, timing.rounds)


def _fastest(samples: Mapping[str, Sequence[float]]) -> str:
    """Return the option to choose; the model's unless another is faster by more than measurement noise."""
    model = samples[MODEL]
    medians = {name: statistics.median(times) for name, times in samples.items()}
    better = [
        name
        for name, times in samples.items()
        if name != MODEL and medians[name] <= FASTER * medians[MODEL] and is_faster(times, model)
    ]
    return min(better, key=medians.__getitem__, default=MODEL)
