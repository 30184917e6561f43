"""The simulations that a command line of `attnc simulate` requests."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from attnc.compiler.growth.growth import Growth
from attnc.compiler.ir import Pattern
from attnc.compiler.simulation.machine import MachineError
from attnc.compiler.simulation.recurrent.recurrence_call import own_sizes
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.compiler.simulation.simulation import PASSES, Baseline, Simulation
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.commands import console
from attnc.runtime.commands.call_arguments import check_heads, dtype_named
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import (
    analysed,
    given_inputs,
    grid_params,
    has_free_length,
    length_of,
    whole_number,
)
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.pictures.branch_views import has_states
from attnc.runtime.simulate.simulating import Floor, break_even, differs
from attnc.spec.errors import AttncError

LENGTH = 16384
"""The number of queries where neither the arguments nor the pattern give one."""

HEADS = 8

LARGEST_SWEEP = 64
"""The maximum number of simulations in a sweep."""

Even = int | str | None
"""The length from which the pattern beats its rival; None if there is none; a text says why it was not computed."""

Swept = list[tuple[str, Simulation]]
"""Pairs of a swept value, as in `window=64`, and its simulation."""


@dataclass(frozen=True)
class SimulateCases:
    """A pattern at a length, on devices and against baselines, and the patterns that it is compared with.

    `dtype`, `tile` and `sizes` (of states) are read from the arguments `args`, which hold all else as it is.
    `examples`: descriptions of the inputs that got example values.
    """

    args: argparse.Namespace
    dtype: str | None
    tile: tuple[int, int] | None
    sizes: Mapping[str, int]
    attention: PatternAnalysis
    n: int
    devices: Sequence[str]
    baselines: Sequence[Baseline | None]
    examples: dict[str, str] = field(default_factory=dict)

    @cached_property
    def main(self) -> Simulation:
        """The simulation on the first device against the first baseline."""
        return self.at()

    @cached_property
    def growth(self) -> Growth | None:
        """The law of growth; None for patterns with states: a recurrence's simulation has its own."""
        return None if has_states(self.attention) else self.attention.growth(heads=self.main.shape.heads)

    def simulate_all(self) -> None:
        """Make all requested simulations, so that `examples` describe the inputs of every one."""
        for result in ("growth", "main", "even", "floors", "others", "swept"):
            getattr(self, result)

    def at(
        self,
        n: int | None = None,
        attention: PatternAnalysis | None = None,
        device: str | None = None,
        baseline: Baseline | None = None,
    ) -> Simulation:
        """Simulate this case, with the arguments given here in place of its own."""
        args = self.args
        n = self.n if n is None else n
        attention = attention or self.attention
        n_q, n_k = (min(n, 1), args.n_k or n) if args.stage == "decode" else (n, args.n_k or n)
        heads = args.heads or head_count(attention.bound) or HEADS
        check_heads(heads, args.kv_heads)
        return attention._simulated(
            n_q,
            n_k,
            self._inputs(attention, n_q, n_k, heads),
            heads=heads,
            kv_heads=args.kv_heads,
            batch=args.batch,
            head_dim=args.head_dim,
            dtype=self.dtype,
            device=device or self.devices[0],
            stage=args.stage,
            baseline=baseline or self.baselines[0],
            tile=self.tile,
            order=args.order,
        )

    def changed(self, name: str, value: int) -> PatternAnalysis:
        """Return the pattern with another value of a parameter."""
        grid = [] if self.args.grid is None else grid_params(self.args.spec, self.args.grid)
        unchanged = [text for text in (*grid, *self.args.params) if text.partition("=")[0].strip() != name]
        params = [*unchanged, f"{name}={value}"]
        return analysed(argparse.Namespace(spec=self.args.spec, params=params, preset=self.args.preset))

    def _inputs(self, attention: PatternAnalysis, n_q: int, n_k: int, heads: int) -> dict[str, Any]:
        """Return the inputs given, examples of the others that the relation reads, and the sizes of the states."""
        state_sizes = _sizes_of(attention.pattern)
        sizes = {name: value for name, value in self.sizes.items() if name in state_sizes}
        if attention.is_recurrence:
            return sizes
        inputs = given_inputs(attention.bound, self.args.inputs, n_q, n_k)
        examples = example_inputs(
            attention.bound,
            n_q,
            n_k,
            inputs,
            batch=self.args.batch,
            heads=heads,
            sizes={"heads": heads, "dk": self.args.head_dim, "dv": self.args.head_dim},
            names=attention.relation_inputs,
        )
        for name, example in examples.items():
            self.examples.setdefault(name, example.words)
        return {**sizes, **inputs, **attention._arrays_of(examples)}

    @cached_property
    def floors(self) -> tuple[Floor, ...]:
        """The sparsity that the pattern can reach by its real parameters."""
        if self.args.stage == "decode" or has_states(self.attention):
            return ()
        n_k = self.args.n_k or self.n
        inputs: dict[str, Any] = {**self._inputs(self.attention, self.n, n_k, 1)}
        return self.attention.floors(self.n, n_k, **inputs)

    @cached_property
    def rivals(self) -> dict[Baseline, Simulation | None]:
        """The simulations against full and against causal attention, or None where one is not simulated.

        Causal attention is no rival of a pattern that shows keys after their queries; full attention is none of a
        recurrence.
        """
        main = self.main
        result: dict[Baseline, Simulation | None] = {"full": None, "causal": None}
        for baseline in result:
            if baseline == main.baseline:
                result[baseline] = main
            elif main.causal and not isinstance(main, RecurrenceSimulation):
                result[baseline] = self.at(baseline=baseline)
        return result

    @cached_property
    def others(self) -> list[Simulation]:
        """The simulations against other baselines, on other devices, and of compared patterns on all devices."""
        result = [self.at(baseline=baseline) for baseline in self.baselines[1:]]
        result += [self.at(device=device) for device in self.devices[1:]]
        for spec in self.args.compare:
            other = analysed(argparse.Namespace(spec=spec, params=self.args.other_params, preset=None))
            result += [self.at(attention=other, device=device) for device in self.devices]
        return result

    @cached_property
    def swept(self) -> Swept:
        """The simulations of `--sweep`."""
        if self.args.sweep is None:
            return []
        name, values = sweep_of(self.args.sweep)
        if name == "len" and not has_free_length(self.attention.bound):
            raise UsageError(
                f"--sweep {self.args.sweep}: the length of `{self.attention.name}` is fixed by its parameters"
            )
        result: Swept = []
        with console.progress("simulate", len(values)) as step:
            for value in values:
                step(f"{name}={value}")
                simulation = self.at(value) if name == "len" else self.at(attention=self.changed(name, value))
                result.append((f"{name}={value:,}", simulation))
        return result

    @cached_property
    def even(self) -> Even:
        """The length from which the pattern beats its rival."""
        if self.attention.bound.program.segments:
            return "its tokens are a grid, whose extents fix the length"
        if self.args.n_k is not None:
            return "--keys fixes the number of keys"
        if any(text.partition("=")[2].strip().startswith("[") for text in self.args.inputs):
            return "its inputs are given for one length"
        try:
            even = break_even(self.at, self.n)
            if even is None and not differs(self.main):
                return f"at this length it has the same visible pairs as its rival, {rival_text(self.main)}"
            return even
        except (AttncError, MachineError) as error:
            return str(error).splitlines()[0]


# --- from the command line -------------------------------------------------------------------------------------------


def cases_of(args: argparse.Namespace) -> SimulateCases:
    """Return the cases that a command line requests. Raises UsageError, and the errors of `compile_attention`."""
    _check(args)
    dtype, tile = None if args.dtype is None else dtype_named(args.dtype), _tile(args.tile)
    sizes = _sizes(args.sizes)
    attention = analysed(args)
    n = length_of(attention.bound, args.n_q, LENGTH)
    _check_kind(args, sizes, attention)
    devices = [name for text in args.devices for name in text.split(",") if name] or ["h100"]
    return SimulateCases(args, dtype, tile, sizes, attention, n, devices, _baselines(args.baseline))


def _check(args: argparse.Namespace) -> None:
    lengths = ("--len", args.n_q), ("--keys", args.n_k)
    counts = ("--heads", args.heads), ("--kv-heads", args.kv_heads), ("--batch", args.batch)
    console.check_at_least(1, *lengths, *counts, ("--head-dim", args.head_dim))
    if args.stage not in PASSES:
        raise UsageError(f"--pass {args.stage}: use one of {', '.join(PASSES)}")
    if args.order not in (None, "natural", "bricks", "residues"):
        raise UsageError(f"--order {args.order}: use one of natural, bricks, residues")


def rival_text(simulation: Simulation) -> str:
    """Return the name of the dense attention that a simulation is compared with."""
    return "causal attention" if simulation.baseline == "causal" else "dense attention"


def _sizes_of(pattern: Pattern) -> frozenset[str]:
    """Return the names of the sizes that only the pattern's states have."""
    recurs = [*pattern.stateful, *([] if pattern.recur is None else [pattern.recur])]
    return frozenset[str]().union(*map(own_sizes, recurs))


def _check_kind(args: argparse.Namespace, sizes: Mapping[str, int], attention: PatternAnalysis) -> None:
    """Raise UsageError for options that do not apply to this pattern: some need states, others exclude them."""
    state_sizes = _sizes_of(attention.pattern)
    for name in sizes.keys() - state_sizes:
        listed = f"its states have {', '.join(sorted(state_sizes))}" if state_sizes else "no state has sizes of its own"
        raise UsageError(f"--size {name}: `{attention.name}` has no state with such a size; {listed}")
    if not has_states(attention):
        return
    kind = "is a recurrence" if attention.pattern.recur is not None else "has branches with a state"
    for option, value in (("--tile", args.tile), ("--order", args.order), ("--slider", args.slider)):
        if value is not None:
            raise UsageError(f"{option} {value}: only for patterns without states; `{attention.name}` {kind}")
    if args.inputs:
        raise UsageError(
            f"--input {args.inputs[0]}: the inputs of a pattern with states are not simulated, only their sizes; "
            f"use --size, as in --size slots=64"
        )
    if args.baseline == "both":
        raise UsageError(f"--baseline both: `{attention.name}` {kind}; it is compared with dense causal attention only")


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    result = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name.strip().isidentifier() and value.strip().isdigit() and int(value)):
            raise UsageError(f"--size {text}: write a name and a whole number, as in --size slots=64")
        result[name.strip()] = int(value)
    return result


def _tile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[x×,](\d+)", text)
    if match is None:
        raise UsageError(f"--tile {text}: write queries by keys, as in --tile 128x64")
    return int(match[1]), int(match[2])


def _baselines(text: str | None) -> list[Baseline | None]:
    if text is None:
        return [None]
    if text == "both":
        return ["full", "causal"]
    if text not in ("full", "causal"):
        raise UsageError(f"--baseline {text}: use one of full, causal, both")
    return [cast("Baseline", text)]


def sweep_of(text: str) -> tuple[str, list[int]]:
    """Return the name and the values of `--sweep`."""
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+[kKmM]?)\s*\.\.\s*(\d+[kKmM]?)\s*", text)
    if match is None:
        raise UsageError(f"--sweep {text}: write a name and a range, as in --sweep len=1k..1m")
    low, high = (whole_number(match[i]) for i in (2, 3))
    if not 1 <= low <= high:
        raise UsageError(f"--sweep {text}: the range must start at 1 or above and must not end below its start")
    values: list[int] = []
    while low <= high and len(values) < LARGEST_SWEEP:
        values.append(low)
        low *= 2
    return match[1], values
