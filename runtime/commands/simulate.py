"""`attnc simulate`: predict how fast a pattern can be on a machine, without running it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attnc.compiler.simulation.print_simulation import ms, print_simulation, times
from attnc.compiler.simulation.recurrent.print_found import print_found
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.compiler.simulation.simulation import PASSES, Simulation
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import add_grid, add_inputs, add_lengths, add_pattern
from attnc.runtime.commands.simulate_cases import HEADS, LENGTH, SimulateCases, cases_of, rival_text
from attnc.runtime.commands.simulate_json import answer_json
from attnc.runtime.commands.simulate_report import report
from attnc.runtime.report.page import write_report


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate`."""
    add_pattern(parser)
    add_lengths(parser, f" (default {LENGTH}, or the pattern's length)", dest="n_q")
    add_grid(parser)
    parser.add_argument(
        "--heads", metavar="H", type=int, help=f"query heads (default: what the parameters say, else {HEADS})"
    )
    parser.add_argument("--kv-heads", metavar="H", type=int, help="kv heads (default: the number of query heads)")
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="batch size (default 1)")
    parser.add_argument("--head-dim", metavar="D", type=int, default=128, help="head dimension (default 128)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="bfloat16, float16 or float32 (default: float32 on the CPU, else bfloat16)"
    )
    text = "a100, h100, h200, b200, cpu (this machine's), or a file NAME.json that describes a machine; may be "
    console.add_repeated(parser, "--device", "devices", "NAME", f"{text}repeated (default h100)")
    parser.add_argument(
        "--pass", dest="stage", metavar="NAME", default="forward", help=f"{', '.join(PASSES)} (default forward)"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the dense attention to compare with: full, causal or both (default: causal if the relation is "
        "causal, else full)",
    )
    parser.add_argument("--tile", metavar="QxK", help="only this tile size, as in 128x64")
    parser.add_argument("--order", metavar="NAME", help="only this order of tokens: natural, bricks, residues")
    console.add_repeated(parser, "--compare", "compare", "SPEC", "also simulate this pattern; may be repeated")
    text = "a parameter of the patterns of --compare; may be repeated"
    console.add_repeated(parser, "-q", "other_params", "NAME=VALUE", text)
    parser.add_argument(
        "--sweep",
        metavar="NAME=LOW..HIGH",
        help="simulate doubling values: len=1k..1m, or a parameter, as in window=64..8k",
    )
    parser.add_argument(
        "-o",
        dest="out",
        metavar="FILE.html",
        type=Path,
        help="write a report: one self-contained page with sliders for the length and a parameter",
    )
    parser.add_argument(
        "--slider",
        metavar="NAME",
        help="the parameter of the report's second slider (default: the first integer parameter, such as a window)",
    )
    add_inputs(parser)
    text = "a size of a recurrence's states, as in --size slots=64; may be repeated"
    console.add_repeated(parser, "--size", "sizes", "NAME=N", text)


def run(args: argparse.Namespace) -> int:
    """Simulate, write the report if a file is named, print the answer, and return the exit status."""
    if args.out is not None and args.out.suffix != ".html":
        raise UsageError(f"-o {args.out}: the report is an HTML page; its name must end in .html")
    cases = cases_of(args)
    cases.simulate_all()
    if args.out is not None:
        write_report(args.out, report(cases, _even_in_words(cases), args.slider))
    if args.json:
        console.print_json(answer_json(cases))
    elif args.out is not None:
        main = cases.main
        print(f"{args.out}: {main.pattern}, {times(main.speedup)} as fast as {rival_text(main)} on {main.title}")
    else:
        print(_in_words(cases))
    return console.FINE


def _in_words(cases: SimulateCases) -> str:
    lines = [_printed(cases.main), f"growth    {_growth(cases)}"]
    lines += [f"floor     {floor}" for floor in cases.floors]
    lines.append(f"break-even {_even_in_words(cases)}")
    lines += [f"input     {name}: {words}" for name, words in cases.examples.items()]
    if cases.others:
        simulations = [cases.main, *cases.others]
        lines += ["", _table([(_simulation_name(simulation), simulation) for simulation in simulations])]
    if cases.swept:
        lines += ["", _table(cases.swept)]
    return "\n".join(lines)


def _printed(simulation: Simulation) -> str:
    unicode = console.has_unicode(sys.stdout)
    if isinstance(simulation, RecurrenceSimulation):
        return print_found(simulation, unicode=unicode)
    return print_simulation(simulation, unicode=unicode)


def _growth(cases: SimulateCases) -> str:
    growth = cases.growth
    if growth is None:
        return (
            cases.main.growth if isinstance(cases.main, RecurrenceSimulation) else "not known, as a branch has a state"
        )
    return growth.law + ("" if growth.pairs is None else f"; visible pairs {growth.pairs}")


def _even_in_words(cases: SimulateCases) -> str:
    even = cases.even
    if isinstance(even, str):
        return f"not computed: {even}"
    return "never, up to this length" if even is None else f"from {even:,} tokens on it beats {rival_text(cases.main)}"


def _simulation_name(simulation: Simulation) -> str:
    causal = simulation.baseline == "causal" and not isinstance(simulation, RecurrenceSimulation)
    return f"{simulation.pattern} on {simulation.device}" + (", against causal" if causal else "")


def _table(simulations: Sequence[tuple[str, Simulation]]) -> str:
    """Return a line for each simulation; columns for rungs are omitted where simulations have different rungs."""
    ladders = {tuple(rung.name for rung in simulation.rungs) for _, simulation in simulations}
    names = next(iter(ladders)) if len(ladders) == 1 else ()
    head = ["", *names, "time", "dense", "as fast", "schedule"]
    rows = [head]
    for name, simulation in simulations:
        rungs = [times(rung.speedup) for rung in simulation.rungs] if names else []
        rows.append(
            [
                name,
                *rungs,
                ms(simulation.predicted_ms),
                ms(simulation.dense_ms),
                times(simulation.speedup),
                _schedule_text(simulation),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(widths[i + 1]) for i, cell in enumerate(row[1:-1])), row[-1]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _schedule_text(simulation: Simulation) -> str:
    if isinstance(simulation, RecurrenceSimulation):
        return "; ".join(dict.fromkeys(map(str, simulation.passes)))
    choice = simulation.choices[0]
    return f"{choice.q_tile}×{choice.k_tile}, {choice.order}"
