"""`attnc doctor`: what this machine has, what plans are costed with, measuring it, and kernels for other machines."""

from __future__ import annotations

import argparse
import platform

import torch

from attnc.compiler.planning.rates import ROWS, WIDTHS, Rates
from attnc.runtime.commands import console, doctor_targets
from attnc.runtime.cpu import calibration
from attnc.runtime.disk.machine_key import installed


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `doctor`."""
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine's rates (about three seconds) and keep them; refused where it is too busy",
    )
    doctor_targets.add(parser)


def run(args: argparse.Namespace) -> int:
    """Print versions, the machine and its rates; or with `--targets` what became of kernels. 1 where rates are lost."""
    if args.targets is not None:
        return doctor_targets.run(args)
    measured = calibration.measure() if args.measure else None
    kept = measured is None or calibration.save(measured)
    rates, file = measured or calibration.rates(), calibration.rates_file()
    facts = {
        "attnc": installed("attnc"),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "islpy": installed("islpy"),
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "rates": rates.source,
        "rates_file": None if file is None else str(file),
    }
    if args.json:
        console.print_json({**facts, "ns_per_score_element": _elements(rates)})
        return console.FINE if kept else console.FOUND
    for name, value in facts.items():
        print(f"{name:<12}{'none: attnc doctor --measure makes it' if value is None else value}")
    print(f"\nns for a score element, by head dimension and rows ({', '.join(map(str, ROWS))}):")
    for dtype, by_width in _elements(rates).items():
        for width, row in by_width.items():
            print(f"  {dtype:<10}{width:>4}  {'  '.join(f'{x:5.2f}' for x in row)}")
    if not kept:
        print("\nwhat was measured is not kept: no folder takes it (ATTNC_CACHE_DIR says another one)")
    return console.FINE if kept else console.FOUND


def _elements(rates: Rates) -> dict[str, dict[str, list[float]]]:
    return {
        dtype: {str(width): [round(x, 3) for x in row] for width, row in zip(WIDTHS, table, strict=True)}
        for dtype, table in rates.elements.items()
    }
