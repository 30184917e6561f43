"""The report of `attnc simulate`: what its page shows, and the simulations that its sliders reach."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from attnc.compiler.growth.growth import Growth
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.runtime.call_errors import TorchMissingError, needing_torch
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import given_inputs, has_free_length
from attnc.runtime.commands.simulate_cases import SimulateAnswer, SimulateCases, has_states, sweep_of
from attnc.runtime.pattern_analysis import PatternAnalysis
from attnc.runtime.pictures.draw import make_drawing
from attnc.runtime.pictures.drawing import Drawing
from attnc.runtime.report.page import report_html
from attnc.runtime.report.point import ReportPoint
from attnc.runtime.report.states_page import states_html
from attnc.runtime.simulating import find_device
from attnc.spec.errors import AttncError, SpecError
from attnc.spec.program import ParameterRead

DRAWN, MOST_DRAWN = 2048, 8192
"""Tokens of a sequence that are drawn, and of a grid, which cannot be cut."""

DRAWN_WITH_STATES = 64
"""Tokens of a picture of branches with a state."""

FACTORS = (Fraction(1, 2), Fraction(1), Fraction(2))
"""Factors of the length and of the parameter at the stops of the sliders."""


def report(cases: SimulateCases, answer: SimulateAnswer, even: str, slider: str | None) -> str:
    """The page. `even` says the break-even length, `slider` which parameter the second slider moves.

    Raises UsageError for a slider that the pattern has no parameter for.
    """
    if has_states(cases.attention.pattern):
        return _of_states(cases, answer, even)
    name = _slider(cases.attention, slider)
    swept = None if cases.args.sweep is None else sweep_of(cases.args.sweep)[0]
    device = find_device(cases.devices[0])
    return report_html(
        answer.main,
        _drawn(cases, cases.attention, cases.n),
        [one for _, one in answer.sweep],
        list(_points(cases, name)),
        answer.others,
        _growth(answer.growth),
        break_even_text=even,
        parameter=name,
        swept=None if swept == "len" else swept,
        machine=device if isinstance(device, Machine) else None,
    )


def _of_states(cases: SimulateCases, answer: SimulateAnswer, even: str) -> str:
    """The page of a pattern with states. Its picture is of few tokens, where its length is free."""
    with needing_torch(f"a report of `{cases.attention.name}`, whose states are measured,"):
        from attnc.runtime.pictures.branches import make_branches
    main = answer.main
    n = min(cases.n, DRAWN_WITH_STATES) if has_free_length(cases.attention.bound) else cases.n
    inputs = given_inputs(cases.attention.bound, cases.asked.inputs, n, n)
    growth = main.growth if isinstance(main, RecurrenceSimulation) else "not known, as a branch has a state"
    return states_html(main, make_branches(cases.attention, n, n, inputs), growth, even)


def _growth(growth: Growth | None) -> str:
    assert growth is not None  # a pattern with states has a page of its own
    reason = growth.law.removeprefix("no law: ")
    known = f"The visible pairs grow as {growth.law}"
    sentences = [known if reason == growth.law else f"No law of growth is known: {reason}"]
    if growth.pairs is not None:
        sentences.append(f"Of n tokens the visible pairs are {growth.pairs}")
    if growth.tiles is not None:
        sentences.append(f"The live tiles of {growth.tile} × {growth.tile} pairs are {growth.tiles}")
    # A word begins a sentence with a capital, a variable such as n stays what it is.
    sentences += [f"{line[:1].upper()}{line[1:]}" if line[1:2].isalpha() else line for line in growth.derivation]
    return " ".join(sentence if sentence.endswith(".") else f"{sentence}." for sentence in sentences)


def _slider(attention: PatternAnalysis, wanted: str | None) -> str | None:
    """The parameter of the second slider: the first whole number that is no extent of a grid."""
    known = [name for name, value in attention.parameters.items() if type(value) is int and value > 1]
    if wanted is None:
        axes = [axis.extent for segment in attention.bound.program.segments for axis in segment.axes]
        extents = {extent.name for extent in axes if isinstance(extent, ParameterRead)}
        return next((name for name in known if name not in extents), None)
    if wanted not in known:
        listed = f"its whole numbers are {', '.join(known)}" if known else "it has no whole number"
        raise UsageError(f"--slider {wanted}: `{attention.name}` has none of that name; {listed}")
    return wanted


def _points(cases: SimulateCases, name: str | None) -> Iterator[ReportPoint]:
    """Half, once and twice the length and the parameter; what `require` refuses is no stop of a slider."""
    attention, n = cases.attention, cases.n
    lengths = [n] if attention.bound.program.segments else sorted({int(n * factor) or 1 for factor in FACTORS})
    own = None if name is None else attention.parameters[name]
    values = sorted({int(own * factor) or 1 for factor in FACTORS}) if isinstance(own, int) else [None]
    jobs = [(length, value) for length in lengths for value in values]
    with console.progress("report", len(jobs)) as step:
        for length, value in jobs:
            step(f"{length} tokens" + ("" if value is None else f", {name}={value}"))
            try:
                changed = attention if value is None or value == own else cases.changed(str(name), value)
                here = (length, value) == (n, own)
                one = cases.main if here else cases.at(length, changed)
                yield ReportPoint(length, value, one, _drawn(cases, changed, length))
            except SpecError:
                continue


def _drawn(cases: SimulateCases, attention: PatternAnalysis, n: int) -> Drawing | None:
    """The picture, of the first tokens where there are many; None where there is none to draw.

    Raises TorchMissingError for a pattern that selects keys, where torch is not installed.
    """
    short = min(n, DRAWN) if has_free_length(attention.bound) else n
    if not attention.has_mask or short > MOST_DRAWN:
        return None
    try:
        return make_drawing(attention, short, short, given_inputs(attention.bound, cases.asked.inputs, short, short))
    except TorchMissingError:
        raise
    except (AttncError, UsageError):
        return None
