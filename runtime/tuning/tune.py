"""Measuring the first few schedules of a call in turn, and keeping the fastest.

One knob after another, each with what was found for those before: the model's choice first, then others until the time
is over. An option is taken only if its results agree with those of the model's choice, and if it is faster by more than
two measurements of one thing differ.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnc.runtime.call import check_tensors
from attnc.runtime.disk.store import store
from attnc.runtime.plans import Planner
from attnc.runtime.tuning.keys import Executor, bucket_of
from attnc.runtime.tuning.knobs import Asked, Knob, knobs_of
from attnc.runtime.tuning.records import MODEL, Record, Stage, Trial
from attnc.runtime.tuning.timer import LEAST, Clock, Timing, compared
from attnc.runtime.tuning.tuned import MEASURING, Tuned

_log = logging.getLogger(__name__)

FASTER = 0.97
"""What an option takes at most of the model's choice, to be taken in its place."""

NOTHING = "there is nothing to tune: what it computes leaves no choice, or content decides it"

PATIENCE = 10.0
"""How long another process is waited for that measures on this machine, in times of what it may take, and a second."""

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far results of two schedules may be apart, of the largest entry: far more than orders of summation differ by."""


@dataclass(frozen=True)
class Untuned:
    """A call of which nothing is decided by measuring, and why."""

    reason: str

    def __str__(self) -> str:
        return self.reason


Told = Callable[[str], None]


@dataclass(frozen=True)
class Call:
    """A call to be tuned. `compute` makes its output of q, k, v and the inputs; `planners` are those of its attentions.

    `name`: the pattern's.
    """

    name: str
    compute: Callable[[Tensor, Tensor, Tensor, Mapping[str, object]], Tensor]
    planners: Callable[[Asked], Sequence[Planner]]
    tensors: tuple[Tensor, Tensor, Tensor]
    inputs: Mapping[str, object]
    by_kernels: bool

    @property
    def stage(self) -> Stage:
        """What is measured."""
        return stage_of((*self.tensors, *self.inputs.values()))

    @property
    def asked(self) -> Asked:
        """What its schedule depends on."""
        q, k, v = self.tensors
        return Asked(check_tensors(q, k, v), self.inputs, self.stage, q.device, self.by_kernels)

    def own(self) -> Callable[[], tuple[Tensor, ...]]:
        """The call on tensors that nothing else hangs on: its output, and gradients of ones where these are wanted."""
        q, k, v = (x.detach().requires_grad_(x.requires_grad) for x in self.tensors)
        inputs = {n: _fresh(x) for n, x in self.inputs.items()}
        leaves = [x for x in (q, k, v, *inputs.values()) if isinstance(x, Tensor) and x.requires_grad]
        recorded = self.stage == "training"

        def run() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(recorded):
                out = self.compute(q, k, v, inputs)
                gradients = torch.autograd.grad(out, leaves, torch.ones_like(out)) if recorded else ()
                return out.detach(), *gradients

        return run


def stage_of(given: Iterable[object]) -> Stage:
    """What is measured of a call on such tensors: a gradient too, where one is wanted."""
    recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    return "training" if recorded else "forward"


def _fresh(x: object) -> object:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def tune(
    call: Call, tuned: Tuned, seconds: float, told: Told = lambda text: None, *, again: bool = False
) -> Record | Untuned:
    """The record of a call: what is known of it, or what is measured now in so many seconds, and kept; or why not.

    `again`: measured although it is known.
    Raises what the call raises.
    """
    asked = call.asked
    executor: Executor = "triton" if call.by_kernels else "cpu"
    with MEASURING, store().alone(PATIENCE * (seconds + 1)):
        tuned.look_again()
        known = tuned.record(asked.sizes, executor, asked.device)
        if not again and known is not None and (known.stage == "training" or asked.stage == "forward"):
            return known
        begun = time.perf_counter()
        knobs = knobs_of(call.planners(asked), asked, begun + seconds / 3)
        if not knobs and time.perf_counter() <= begun + seconds / 3:
            _log.info("`%s`: %s", call.name, NOTHING)
            return Untuned(NOTHING)
        trials = _measured(call, tuned, knobs, begun + seconds, told)
        choices = {knob.name: _fastest(trials, knob.name) for knob in knobs if _of(trials, knob.name)}
        if not choices:
            reason = f"{seconds:g} s are too short to measure {LEAST} rounds of two schedules, by {asked.stage}"
            _log.warning("`%s`: %s", call.name, reason)
            return Untuned(reason)
        key = tuned.key(asked.sizes, executor, asked.device)
        record = Record(key, bucket_of(asked.sizes), asked.stage, choices, tuple(trials))
        tuned.keep(record)
    _log.info("tuned `%s` in %.2f s: %s", call.name, time.perf_counter() - begun, record)
    return record


def _measured(call: Call, tuned: Tuned, knobs: Sequence[Knob], until: float, told: Told) -> list[Trial]:
    """Every option that was measured, knob by knob."""
    run, clock = call.own(), Clock(call.tensors[0].device)
    with tuned.trying({}):
        wanted = run()
    chosen: dict[str, str] = {}
    trials: list[Trial] = []
    for i, knob in enumerate(knobs):
        share = (until - time.perf_counter()) / (len(knobs) - i)
        if share <= 0:
            break
        runs = {name: partial(_tried, tuned, {**chosen, knob.name: name}, run) for name in knob.options}
        warm, end = _Warm(call, knob, wanted), time.perf_counter() + share
        times = compared(runs, clock, end, warm.agrees, partial(_tell, told, knob))
        enough = {name: timing for name, timing in times.items() if timing.rounds >= LEAST}
        if MODEL in enough and len(enough) > 1:
            own = [_trial(knob, name, timing) for name, timing in enough.items()]
            chosen[knob.name] = _fastest(own, knob.name)
            trials += own
    return trials


def _tell(told: Told, knob: Knob, text: str) -> None:
    told(f"{knob.name}: {text}" if knob.name else text)


def _tried(tuned: Tuned, choices: Mapping[str, str], run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with tuned.trying(choices):
        return run()


@dataclass(frozen=True)
class _Warm:
    """The first runs of options, held against what the model's choice gives."""

    call: Call
    knob: Knob
    wanted: Sequence[Tensor]

    def agrees(self, name: str, run: Callable[[], object]) -> bool:
        """Whether an option runs, and gives what the model's choice gives."""
        what = f"`{self.call.name}`, {self.knob.name} {name}"
        try:
            found = run()
        except Exception as error:  # whatever a compiler of kernels raises: it is no option then
            if name == MODEL:
                raise
            _log.info("%s does not run here: %s", what, error)
            return False
        assert isinstance(found, tuple)
        if all(_close(a, b) for a, b in zip(found, self.wanted, strict=True)):
            return True
        _log.warning("%s gives other results than the model's choice and is not taken; please report it", what)
        return name == MODEL


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.numel():
        return True
    largest = float(b.abs().max())
    return float((a.double() - b.double()).abs().max()) <= ALLOWED[a.dtype] * max(largest, 1e-30)


def _trial(knob: Knob, name: str, timing: Timing) -> Trial:
    return Trial(knob.name, name, knob.options[name], timing.median, timing.low, timing.high, timing.rounds)


def _of(trials: Sequence[Trial], knob: str) -> dict[str, Trial]:
    return {trial.option: trial for trial in trials if trial.knob == knob}


def _fastest(trials: Sequence[Trial], knob: str) -> str:
    """The option to take; the model's where no other is noticeably faster."""
    own = _of(trials, knob)
    best = min(own.values(), key=lambda trial: trial.median)
    return best.option if best.median <= FASTER * own[MODEL].median else MODEL
