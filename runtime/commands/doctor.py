"""`attnc doctor`: show versions, the machine and its rates; measure the rates; compile kernels for other machines."""

from __future__ import annotations

import argparse
import platform

import torch

from attnc.compiler.planning.rates import ROWS, WIDTHS, Rates
from attnc.runtime.commands import console, doctor_targets
from attnc.runtime.disk.machine_key import installed
from attnc.runtime.measuring import calibration
from attnc.runtime.planning import stored_rates


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine's rates (about three seconds) and store them; refused while the machine is too busy",
    )
    doctor_targets.add(parser)


def run(args: argparse.Namespace) -> int:
    """Print versions, the machine and its rates, or check kernels.

    Return 1 if new rates could not be stored or if a kernel is rejected.
    """
    if args.targets is not None:
        return doctor_targets.run(args)
    measured = calibration.measure() if args.measure else None
    kept = measured is None or stored_rates.save(measured)
    rates, file = measured or stored_rates.rates(), stored_rates.rates_file()
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
        print(f"{name:<12}{'none; `attnc doctor --measure` writes it' if value is None else value}")
    print(f"\nns for a score element, by head dimension and rows ({', '.join(map(str, ROWS))}):")
    for dtype, by_width in _elements(rates).items():
        for width, row in by_width.items():
            print(f"  {dtype:<10}{width:>4}  {'  '.join(f'{x:5.2f}' for x in row)}")
    if not kept:
        print(
            "\nthe measured rates are not stored: no cache folder can be written; set ATTNC_CACHE_DIR to one that can"
        )
    return console.FINE if kept else console.FOUND


def _elements(rates: Rates) -> dict[str, dict[str, list[float]]]:
    return {
        dtype: {str(width): [round(x, 3) for x in row] for width, row in zip(WIDTHS, table, strict=True)}
        for dtype, table in rates.elements.items()
    }
