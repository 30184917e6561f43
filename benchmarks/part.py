"""Run one part of the benchmarks: `python benchmarks/part.py NAME`, see --help.

The result file is written after every row, completely or not at all: a stopped part keeps its rows and continues after
them when it is started again on the same machine with the same sources and versions.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import suites
import torch
from benchmark_part import ROOT, NoDeviceError, run, setting_of

import attnc


def _end(*_: object) -> NoReturn:
    """Exit with child processes; exit again in five seconds, as callbacks of weak references swallow an exit."""
    signal.alarm(5)
    sys.exit(128 + signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=[part.name for parts in suites.PARTS.values() for part in parts], metavar="NAME"
    )
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes, in seconds; GPU parts run in Triton's interpreter"
    )
    parser.add_argument("--out", type=Path, default=None, help="the result file (results/NAME.json)")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args(arguments)
    where, part = suites.find(options.part)
    if not Path(attnc.__file__).resolve().is_relative_to(ROOT):
        parser.error(f"attnc is imported from {attnc.__file__}, not from {ROOT}: set PYTHONPATH={ROOT / 'src'}")
    try:
        setting = setting_of(where, options.toy)
    except NoDeviceError as error:
        parser.error(str(error))
    if where == "gpu" and options.toy and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
        os.execv(sys.executable, [sys.executable, *sys.argv])
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _end)
    if where == "cpu" and options.toy:
        torch.compiler.set_stance("force_eager")  # compiling takes seconds, and toy figures mean nothing
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    return run(part, setting, options.out or part.file(options.toy), fresh=options.fresh)


if __name__ == "__main__":
    raise SystemExit(main())
