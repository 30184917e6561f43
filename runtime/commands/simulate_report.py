"""The HTML report of `attnc simulate`, and the simulations at the stops of its sliders."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from attnc.compiler.growth.growth import Growth
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.runtime.call.call_errors import TorchMissingError, needing_torch
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import given_inputs, has_free_length
from attnc.runtime.commands.simulate_cases import SimulateCases, sweep_of
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.pictures.branch_views import has_states
from attnc.runtime.pictures.draw import make_drawing
from attnc.runtime.pictures.drawing import Drawing
from attnc.runtime.report.page import report_html, states_html
from attnc.runtime.report.point import ReportPoint
from attnc.runtime.simulate.simulating import find_device
from attnc.spec.errors import AttncError, SpecError
from attnc.spec.program import ParameterRead

DRAWN, MOST_DRAWN = 2048, 8192
"""The number of tokens drawn of a sequence; the largest grid that is drawn (a grid cannot be cut)."""

DRAWN_WITH_STATES = 64
"""The number of tokens drawn of a pattern with states."""

FACTORS = (Fraction(1, 2), Fraction(1), Fraction(2))
"""The stops of the sliders, as factors of the length and of the parameter."""


def report(cases: SimulateCases, even: str, slider: str | None) -> str:
    """Return the report as HTML.

    `even` describes the break-even length; `slider` names the parameter of the second slider. Raises UsageError for a
    slider that is not a whole-number parameter of the pattern.
    """
    if has_states(cases.attention):
        return _states_report(cases, even)
    name = _slider(cases.attention, slider)
    swept = None if cases.args.sweep is None else sweep_of(cases.args.sweep)[0]
    device = find_device(cases.devices[0])
    return report_html(
        cases.main,
        _drawing_of(cases, cases.attention, cases.n),
        [simulation for _, simulation in cases.swept],
        list(_slider_points(cases, name)),
        cases.others,
        _growth(cases.growth),
        break_even_text=even,
        parameter=name,
        swept=None if swept == "len" else swept,
        machine=device if isinstance(device, Machine) else None,
    )


def _states_report(cases: SimulateCases, even: str) -> str:
    """Return the report of a pattern with states; its picture shows few tokens where the length is free."""
    with needing_torch(f"a report of `{cases.attention.name}`, whose states are measured,"):
        from attnc.runtime.pictures.branches import make_branches  # only for pictures
    main = cases.main
    n = min(cases.n, DRAWN_WITH_STATES) if has_free_length(cases.attention.bound) else cases.n
    inputs = given_inputs(cases.attention.bound, cases.args.inputs, n, n)
    growth = main.growth if isinstance(main, RecurrenceSimulation) else "not known, as a branch has a state"
    return states_html(main, make_branches(cases.attention, n, n, inputs), growth, even)


def _growth(growth: Growth | None) -> str:
    assert growth is not None  # a pattern with states has a page of its own
    reason = growth.law.removeprefix("no law: ")
    law = f"The visible pairs grow as {growth.law}"
    sentences = [law if reason == growth.law else f"No law of growth is known: {reason}"]
    if growth.pairs is not None:
        sentences.append(f"The visible pairs of n tokens number {growth.pairs}")
    if growth.tiles is not None:
        sentences.append(f"The live tiles of {growth.tile} × {growth.tile} pairs number {growth.tiles}")
    # A sentence starts with a capital, unless it starts with a variable such as n.
    sentences += [f"{line[:1].upper()}{line[1:]}" if line[1:2].isalpha() else line for line in growth.derivation]
    return " ".join(sentence if sentence.endswith(".") else f"{sentence}." for sentence in sentences)


def _slider(attention: PatternAnalysis, requested: str | None) -> str | None:
    """Return the parameter of the second slider: by default the first whole number that is no extent of a grid."""
    candidates = [name for name, value in attention.parameters.items() if type(value) is int and value > 1]
    if requested is None:
        axes = [axis.extent for segment in attention.bound.program.segments for axis in segment.axes]
        extents = {extent.name for extent in axes if isinstance(extent, ParameterRead)}
        return next((name for name in candidates if name not in extents), None)
    if requested not in candidates:
        listed = f"use {', '.join(candidates)}" if candidates else "it has no whole-number parameter above 1"
        raise UsageError(
            f"--slider {requested}: `{attention.name}` has no whole-number parameter of that name; {listed}"
        )
    return requested


def _slider_points(cases: SimulateCases, name: str | None) -> Iterator[ReportPoint]:
    """Yield the simulations at half, once and twice the length and the parameter.

    Values that the pattern's `require` rejects are no stops of a slider.
    """
    attention, n = cases.attention, cases.n
    lengths = [n] if attention.bound.program.segments else sorted({int(n * factor) or 1 for factor in FACTORS})
    default = None if name is None else attention.parameters[name]
    values = sorted({int(default * factor) or 1 for factor in FACTORS}) if isinstance(default, int) else [None]
    jobs = [(length, value) for length in lengths for value in values]
    with console.progress("report", len(jobs)) as step:
        for length, value in jobs:
            step(f"{length} tokens" + ("" if value is None else f", {name}={value}"))
            try:
                changed = attention if value is None or value == default else cases.changed(str(name), value)
                is_main = (length, value) == (n, default)
                simulation = cases.main if is_main else cases.at(length, changed)
                yield ReportPoint(length, value, simulation, _drawing_of(cases, changed, length))
            except SpecError:
                continue


def _drawing_of(cases: SimulateCases, attention: PatternAnalysis, n: int) -> Drawing | None:
    """Return the picture, of the first tokens where there are many; None where no picture can be drawn.

    Raises TorchMissingError for a pattern that selects keys, where torch is not installed.
    """
    short = min(n, DRAWN) if has_free_length(attention.bound) else n
    if not attention.has_mask or short > MOST_DRAWN:
        return None
    try:
        return make_drawing(attention, short, short, given_inputs(attention.bound, cases.args.inputs, short, short))
    except TorchMissingError:
        raise
    except (AttncError, UsageError):
        return None
