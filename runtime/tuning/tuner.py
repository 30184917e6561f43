"""Measuring the first few schedules of a call in turn, and keeping the fastest.

One knob after another, each with what was found for those before: the model's choice first, then others until the time
is over. What is tried has planners of its own, so that no other call of the process runs by it.
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

from attnc.runtime.disk.store import store
from attnc.runtime.plans import Planner
from attnc.runtime.tensor_checks import check_tensors
from attnc.runtime.tuning.choice_keys import Executor, bucket_of
from attnc.runtime.tuning.choice_source import Choices
from attnc.runtime.tuning.records import MODEL, KnobTrial, Record, Stage
from attnc.runtime.tuning.timer import LEAST, LOOKED_AT, Clock, Timing, compared, is_faster
from attnc.runtime.tuning.tune_request import TuneRequest
from attnc.runtime.tuning.tuned import MEASURING, Tuned

if TYPE_CHECKING:
    from attnc.runtime.tuning.knobs import Knob

_log = logging.getLogger(__name__)

FASTER = 0.97
"""What an option takes at most of the model's choice, to be taken in its place."""

NOTHING = "there is nothing to tune: what it computes leaves no choice, or content decides it"

PATIENCE = 10.0
"""How long another process is waited for that measures on this machine, in times of what it may take, and a second."""

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far results of two schedules may be apart, of the largest entry: far more than orders of summation differ by."""

Results = tuple["Tensor | None", ...]


@dataclass(frozen=True)
class Untuned:
    """A call of which nothing is decided by measuring, and why. `expected`: there is nothing to choose in it."""

    reason: str
    expected: bool = False

    def __str__(self) -> str:
        return self.reason


Told = Callable[[str], None]
Compute = Callable[[Choices, Tensor, Tensor, Tensor, Mapping[str, object]], Tensor]
"""(choices, q, k, v, inputs) → output of a call by these choices."""


@dataclass(frozen=True)
class TunedCall:
    """A call to be tuned; `planners` are those of its attentions. `name`: the pattern's."""

    name: str
    compute: Compute
    planners: Callable[[TuneRequest], Sequence[Planner]]
    tensors: tuple[Tensor, Tensor, Tensor]
    inputs: Mapping[str, object]
    by_kernels: bool

    @property
    def stage(self) -> Stage:
        """What is measured."""
        return stage_of((*self.tensors, *self.inputs.values()))

    @property
    def asked(self) -> TuneRequest:
        """What its schedule depends on."""
        q, k, v = self.tensors
        return TuneRequest(check_tensors(q, k, v), self.inputs, self.stage, q.device, self.by_kernels)

    def own(self) -> Callable[[Choices], Results]:
        """The call on tensors that nothing else hangs on: its output, and gradients of ones where these are wanted.

        Hooks of the caller on what autograd keeps are not called: checkpoints count that.
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


def stage_of(given: Iterable[object]) -> Stage:
    """What is measured of a call on such tensors: a gradient too, where one is wanted."""
    recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    return "training" if recorded else "forward"


def _fresh(x: object) -> object:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def tune(
    call: TunedCall, tuned: Tuned, seconds: float, told: Told = lambda text: None, *, again: bool = False
) -> Record | Untuned:
    """The record of a call: what is known of it, or what is measured now in so many seconds, and kept; or why not.

    `again`: measured although it is known. Raises what the call raises.
    """
    known = None if again else _known(call, tuned)
    if known is not None:
        return known
    with MEASURING.held(), store().alone(PATIENCE * (seconds + 1)):
        tuned.look_again()  # another process may have measured meanwhile
        known = None if again else _known(call, tuned)
        if known is not None:
            return known
        run = call.own()
        begun = time.perf_counter()
        wanted = run(())
        once = time.perf_counter() - begun
        if not all(one is None or bool(torch.isfinite(one).all()) for one in wanted):
            return Untuned("results hold what is no number, so that schedules cannot be held against each other")
        try:
            return _tuned(call, tuned, run, wanted, seconds, once, told)
        except Exception as error:  # the call itself runs: what tries others must not stop it
            return Untuned(f"what was tried failed: {type(error).__name__}: {error}")


def _known(call: TunedCall, tuned: Tuned) -> Record | None:
    asked = call.asked
    known = tuned.record(asked.sizes, _executor(call), asked.device)
    return known if known is not None and (known.stage == "training" or asked.stage == "forward") else None


def _executor(call: TunedCall) -> Executor:
    return "triton" if call.by_kernels else "cpu"


def _tuned(
    call: TunedCall,
    tuned: Tuned,
    run: Callable[[Choices], Results],
    wanted: Results,
    seconds: float,
    once: float,
    told: Told,
) -> Record | Untuned:
    """The record of what is measured now, kept. `once`: seconds that one run took."""
    from attnc.runtime.tuning.knobs import knobs_of

    begun, asked = time.perf_counter(), call.asked
    knobs = knobs_of(call.planners(asked), asked, begun + seconds / 3)
    if not knobs and time.perf_counter() <= begun + seconds / 3:
        return Untuned(NOTHING, expected=True)
    trials, choices = _measured(call, knobs, run, wanted, begun + seconds, told)
    if not choices:
        reason = f"{seconds:g} s are too short to measure {LEAST} rounds of two schedules, by {asked.stage}"
        return Untuned(f"{reason}; give it {_enough(seconds, once, max(len(knobs), 1))}")
    key = tuned.key(asked.sizes, _executor(call), asked.device)
    record = Record(key, bucket_of(asked.sizes), asked.stage, choices, tuple(trials))
    tuned.keep(record)
    _log.info("tuned `%s` in %.2f s: %s", call.name, time.perf_counter() - begun, record)
    return record


def _enough(seconds: float, once: float, knobs: int) -> str:
    """A time in which every knob has two options measured, given the seconds of a first run; more than was too short.

    Each option runs once to warm up and `LEAST` times to be measured; the slower of the two may take twice as long, and
    a third of the time may go to finding options.
    """
    wanted = max(1.5 * knobs * 3 * (LEAST + 1) * once, 2 * seconds)
    if wanted < 1:
        return f"{math.ceil(1000 * wanted)}ms"
    step = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return f"{math.ceil(wanted / step) * step}s"


def _measured(
    call: TunedCall,
    knobs: Sequence[Knob],
    run: Callable[[Choices], Results],
    wanted: Results,
    until: float,
    told: Told,
) -> tuple[list[KnobTrial], dict[str, str]]:
    """Every option that was measured, knob by knob, and what to choose."""
    clock = Clock(call.tensors[0].device)
    chosen: dict[str, str] = {}
    trials: list[KnobTrial] = []
    for i, knob in enumerate(knobs):
        share = (until - time.perf_counter()) / (len(knobs) - i)
        if share <= 0:
            break
        runs = {name: partial(run, tuple(sorted({**chosen, knob.name: name}.items()))) for name in knob.options}
        warm, end = _Warm(call.name, knob, wanted), time.perf_counter() + share
        samples = compared(runs, clock, end, warm.agrees, partial(_tell, told, knob))
        enough = {name: own for name, own in samples.items() if name == MODEL or len(own) >= LOOKED_AT}
        decided = len(samples.get(MODEL, ())) >= LEAST or time.perf_counter() < end  # all others are far behind
        if decided and len(enough) > 1:
            chosen[knob.name] = _fastest(enough)
            trials += [_trial(knob, name, Timing.of(own)) for name, own in enough.items()]
    return trials, chosen


def _tell(told: Told, knob: Knob, text: str) -> None:
    told(f"{knob.name}: {text}" if knob.name else text)


@dataclass(frozen=True)
class _Warm:
    """The first runs of options, held against what the model's choice gives."""

    pattern: str
    knob: Knob
    wanted: Results

    def agrees(self, name: str, run: Callable[[], object]) -> bool:
        """Whether an option runs, and gives what the model's choice gives."""
        what = f"`{self.pattern}`, {self.knob.name} {name}"
        try:
            found = run()
            assert isinstance(found, tuple)
            if name == MODEL or all(_close(a, b) for a, b in zip(found, self.wanted, strict=True)):
                return True
        except Exception as error:  # whatever a compiler of kernels raises: it is no option then
            if name == MODEL:
                raise
            _log.info("%s does not run here: %s", what, error)
            return False
        _log.warning("%s gives other results than the model's choice and is not taken; please report it", what)
        return False


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results are alike but for the order of sums."""
    if a is None or b is None:
        return a is b
    if not a.numel():
        return True
    largest = float(b.abs().max())
    return float((a.double() - b.double()).abs().max()) <= ALLOWED[a.dtype] * max(largest, 1e-30)


def _trial(knob: Knob, name: str, timing: Timing) -> KnobTrial:
    return KnobTrial(knob.name, name, knob.options[name], timing.median, timing.low, timing.high, timing.rounds)


def _fastest(samples: Mapping[str, Sequence[float]]) -> str:
    """The option to take; the model's where no other is faster, by more than two measurements of one thing differ."""
    model = samples[MODEL]
    medians = {name: statistics.median(own) for name, own in samples.items()}
    better = [
        name
        for name, own in samples.items()
        if name != MODEL and medians[name] <= FASTER * medians[MODEL] and is_faster(own, model)
    ]
    return min(better, key=medians.__getitem__, default=MODEL)
