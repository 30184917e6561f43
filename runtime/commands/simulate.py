"""`attnc simulate`: how fast a pattern can be on a machine, before anything runs."""

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
from attnc.runtime.commands.patterns import add_grid, add_inputs, add_pattern, whole_number
from attnc.runtime.commands.simulate_cases import HEADS, LENGTH, SimulateAnswer, cases_of, rival_text
from attnc.runtime.commands.simulate_json import answer_json
from attnc.runtime.commands.simulate_report import report
from attnc.runtime.report.page import write_report


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `simulate`."""
    add_pattern(parser)
    parser.add_argument(
        "--len",
        dest="n_q",
        metavar="N",
        type=whole_number,
        help=f"queries, as in 16384 or 16k (default {LENGTH}, or the grid's)",
    )
    parser.add_argument("--keys", dest="n_k", metavar="N", type=whole_number, help="keys (default: as many as queries)")
    add_grid(parser)
    parser.add_argument("--heads", metavar="H", type=int, help=f"query heads (default {HEADS})")
    parser.add_argument("--kv-heads", metavar="H", type=int, help="key and value heads (default: as many)")
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--head-dim", metavar="D", type=int, default=128, help="numbers of a head (default 128)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="bfloat16, float16, float32 (default bfloat16; fp32 on the CPU)"
    )
    parser.add_argument(
        "--device",
        dest="devices",
        metavar="NAME",
        action="append",
        default=[],
        help="a100, h100, h200, b200, cpu (this one), or a file NAME.json that describes a machine; may be repeated "
        "(default h100)",
    )
    parser.add_argument("--pass", dest="stage", metavar="NAME", default="forward", help=f"{', '.join(PASSES)}")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the dense rival: full, causal, or both (default: causal where the pattern shows no key behind its query)",
    )
    parser.add_argument("--tile", metavar="QxK", help="only these tiles, as in 128x64")
    parser.add_argument("--order", metavar="NAME", help="only this order of tokens: natural, bricks, residues")
    parser.add_argument(
        "--compare", metavar="SPEC", action="append", default=[], help="another pattern; may be repeated"
    )
    parser.add_argument(
        "-q",
        dest="other_params",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a parameter of the patterns compared",
    )
    parser.add_argument(
        "--sweep", metavar="NAME=LOW..HIGH", help="doubling: len=1k..1m, or a parameter as in window=64..8k"
    )
    parser.add_argument(
        "-o",
        dest="out",
        metavar="FILE.html",
        type=Path,
        help="write a report: one page that needs nothing else, with sliders over lengths and a parameter",
    )
    parser.add_argument(
        "--slider",
        metavar="NAME",
        help="the parameter of the report's second slider (default: the first integer one, such as a window)",
    )
    add_inputs(parser)
    parser.add_argument(
        "--size",
        dest="sizes",
        metavar="NAME=N",
        action="append",
        default=[],
        help="a size of a recurrence's own, as in --size slots=64; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate."""
    if args.out is not None and args.out.suffix != ".html":
        raise UsageError(f"-o {args.out}: the report is a page; give a name that ends in .html")
    cases = cases_of(args)
    answer = cases.answer()
    if args.out is not None:
        write_report(args.out, report(cases, answer, _even_in_words(answer), args.slider))
    if args.json:
        console.print_json(answer_json(answer))
    elif args.out is not None:
        main = answer.main
        print(f"{args.out}: {main.pattern}, {times(main.speedup)} as fast as {rival_text(main)} on {main.title}")
    else:
        print(_in_words(answer))
    return console.FINE


def _in_words(answer: SimulateAnswer) -> str:
    lines = [_printed(answer.main), f"growth    {_growth(answer)}"]
    lines += [f"floor     {floor}" for floor in answer.floors]
    lines.append(f"break-even {_even_in_words(answer)}")
    lines += [f"input     {name}: {words}" for name, words in answer.examples.items()]
    if answer.others:
        beside = [answer.main, *answer.others]
        lines += ["", _table([(_name(one), one) for one in beside])]
    if answer.sweep:
        lines += ["", _table(answer.sweep)]
    return "\n".join(lines)


def _printed(simulation: Simulation) -> str:
    unicode = console.has_unicode(sys.stdout)
    if isinstance(simulation, RecurrenceSimulation):
        return print_found(simulation, unicode=unicode)
    return print_simulation(simulation, unicode=unicode)


def _growth(answer: SimulateAnswer) -> str:
    growth = answer.growth
    if growth is None:
        return (
            answer.main.growth
            if isinstance(answer.main, RecurrenceSimulation)
            else "not known, as a branch has a state"
        )
    return growth.law + ("" if growth.pairs is None else f"; visible pairs {growth.pairs}")


def _even_in_words(answer: SimulateAnswer) -> str:
    even = answer.even
    if isinstance(even, str):
        return f"not asked: {even}"
    return "never, up to this length" if even is None else f"from {even:,} tokens on it beats {rival_text(answer.main)}"


def _name(one: Simulation) -> str:
    causal = one.baseline == "causal" and not isinstance(one, RecurrenceSimulation)
    return f"{one.pattern} on {one.device}" + (", against causal" if causal else "")


def _table(found: Sequence[tuple[str, Simulation]]) -> str:
    """A line a simulation; without its rungs, where those of others have other names."""
    ladders = {tuple(rung.name for rung in one.rungs) for _, one in found}
    names = next(iter(ladders)) if len(ladders) == 1 else ()
    head = ["", *names, "time", "dense", "as fast", "schedule"]
    rows = [head]
    for name, one in found:
        rungs = [times(rung.speedup) for rung in one.rungs] if names else []
        rows.append([name, *rungs, ms(one.predicted_ms), ms(one.dense_ms), times(one.speedup), _short(one)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(widths[i + 1]) for i, cell in enumerate(row[1:-1])), row[-1]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(one: Simulation) -> str:
    if isinstance(one, RecurrenceSimulation):
        return "; ".join(dict.fromkeys(map(str, one.passes)))
    choice = one.choices[0]
    return f"{choice.q_tile}×{choice.k_tile}, {choice.order}"
