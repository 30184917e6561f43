"""`attnc doctor`: show versions, the machine and its rates; measure the rates; compile kernels for other machines."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch

from attnc.compiler.kernels.kernel_source import BYTES
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.planning.rates import ROWS, WIDTHS, Rates
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.disk.machine_key import installed
from attnc.runtime.measuring import calibration
from attnc.runtime.planning import stored_rates
from attnc.runtime.texts.library import routing_names
from attnc.runtime.toolchain import routing_gate
from attnc.runtime.toolchain.compiling import CompiledBinary, Outcome, compile_all
from attnc.runtime.toolchain.kernel_gate import GateCase
from attnc.runtime.toolchain.machine_code import Loop
from attnc.runtime.toolchain.selection import SELECTION, NoKernels, PatternRequest, cases, named, whole_library
from attnc.spec.suggest import did_you_mean


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine's rates (about three seconds) and store them; refused while the machine is too busy",
    )
    _add_kernels(parser)


def run(args: argparse.Namespace) -> int:
    """Print versions, the machine and its rates, or check kernels.

    Return 1 if new rates could not be stored or if a kernel is rejected.
    """
    if args.targets is not None:
        return _check_kernels(args)
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


# --- kernels for other machines --------------------------------------------------------------------------------------


Row = dict[str, object]

ALL_PATTERNS = "library"
"""The value of `--patterns` that stands for all patterns of the library."""


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about kernels."""
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--targets",
        metavar="NAMES",
        help=f"compile kernels for these GPU architectures and check their machine code ({','.join(TARGETS)})",
    )
    kernels.add_argument(
        "--patterns",
        metavar="NAMES",
        help=f"library patterns, or `{ALL_PATTERNS}` for all (default: one pattern for each kind of kernel)",
    )
    kernels.add_argument("--head-dims", metavar="NUMBERS", default="64,128", help="head dimensions (default 64,128)")
    kernels.add_argument("--dtypes", metavar="NAMES", default="bfloat16", help=f"{','.join(BYTES)} (default bfloat16)")
    kernels.add_argument("--processes", metavar="N", type=int, default=2, help="compilers that run at once (default 2)")


def _check_kernels(args: argparse.Namespace) -> int:
    """Compile and check the kernels; return 1 if a kernel is rejected."""
    kernel_cases = selected_cases(args)
    total = sum(isinstance(case, GateCase) for case in kernel_cases)
    reported: list[Row] = []
    with console.progress("kernels", total) as step:
        for row in rows(kernel_cases, args.processes):
            reported.append(row)
            if row["verdict"] != "none":
                step(f"{row['pattern']} {row['kernel']} {row['target']}")
            if not args.json:
                print(line(row), flush=True)
    failed = sum(row["verdict"] == "fail" for row in reported)
    if args.json:
        console.print_json({"agrees": not failed, "kernels": reported})
    else:
        print(f"\n{console.counted(total, 'kernel')}, {failed or 'none'} rejected")
    return console.FOUND if failed else console.FINE


def selected_cases(args: argparse.Namespace) -> list[GateCase | NoKernels]:
    """Return the kernels that the arguments select. Raises UsageError, PatternNotFoundError."""
    if find_spec("triton") is None:
        raise UsageError("--targets: triton is not installed; `pip install 'attnc[gpu]'` installs it")
    if args.processes < 1:
        raise UsageError(f"--processes {args.processes}: give a whole number, at least 1")
    targets = _names_among(args.targets, "--targets", tuple(TARGETS))
    dtypes = _names_among(args.dtypes, "--dtypes", tuple(BYTES))
    widths, requests = _widths(args.head_dims), pattern_requests(args.patterns)
    routing = [request.name for request in requests if request.name in routing_names()]
    kernel_cases = list(
        cases([request for request in requests if request.name not in routing], targets, widths, dtypes)
    )
    return kernel_cases + [case for dtype in dtypes for case in routing_gate.cases(routing, targets, widths, dtype)]


def pattern_requests(patterns: str | None) -> Sequence[PatternRequest]:
    """Return the patterns that `--patterns` names."""
    if patterns is None:
        return SELECTION
    return whole_library() if patterns == ALL_PATTERNS else named(_words(patterns, "--patterns"))


def rows(kernel_cases: Sequence[GateCase | NoKernels], processes: int) -> Iterator[Row]:
    """Yield a row for every kernel as its compilation ends; patterns without kernels come first."""
    yield from (_row_without_kernels(case) for case in kernel_cases if isinstance(case, NoKernels))
    kernels = [case for case in kernel_cases if isinstance(case, GateCase)]
    jobs = [(case.source, case.target) for case in kernels]
    for i, outcome in compile_all(jobs, processes):
        yield row_of(kernels[i], outcome)


def row_of(case: GateCase, outcome: Outcome) -> Row:
    """Return the report row of a compiled kernel."""
    reasons = routing_gate.judge(case, outcome)
    tiles = case.source.tiles
    row: Row = {
        "pattern": case.pattern,
        "kernel": case.title,
        "target": case.target,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "tiles": f"{tiles.q_tile}x{tiles.k_tile}",
        "warps": tiles.warps,
        "stages": tiles.stages,
        "digest": case.source.digest,
        "verdict": "fail" if reasons else "pass",
        "reasons": reasons,
    }
    if isinstance(outcome, CompiledBinary):
        row |= {
            "registers": outcome.code.registers,
            "stack": outcome.code.stack,
            "spilled": outcome.code.spilled,
            "shared_kib": round(outcome.shared / 1024, 1),
            "tensor_memory": outcome.tensor_memory,
            "products": dict(outcome.code.products),
            "loops": [_loop(loop) for loop in outcome.code.loops],
            "seconds": round(outcome.seconds, 1),
        }
    return row


def _loop(loop: Loop) -> dict[str, object]:
    return {
        "instructions": loop.instructions,
        "products": dict(loop.products),
        "async_copies": loop.copies,
        "bytes_through_registers": loop.copied,
        "bytes_gathered": loop.gathered,
        "waits": loop.waits,
        "barriers": loop.barriers,
        "local_loads": loop.local_loads,
        "local_stores": loop.local_stores,
        "ex2": loop.exponentials,
        "ex2_under_products": loop.overlapped,
        "mix": dict(loop.mix),
    }


def _row_without_kernels(missing: NoKernels) -> Row:
    return {
        "pattern": missing.pattern,
        "kernel": None,
        "target": missing.target,
        "head_dim": missing.head_dim,
        "dtype": missing.dtype,
        "verdict": "none",
        "reasons": [missing.reason],
    }


def line(row: Row) -> str:
    """Return the text line of a row."""
    start = f"{row['verdict']!s:<5} {row['target']!s:<7} {row['dtype']!s:<9} {row['head_dim']!s:>4} "
    if row["verdict"] == "none":
        return f"{start}{row['pattern']}: {_reasons(row)}"
    start += f"{row['kernel']!s:<8} {row['tiles']!s:<8} {row['warps']} warps {row['stages']} stages"
    if "registers" in row:
        start += f"  {row['registers']!s:>3} registers {row['shared_kib']!s:>6} KiB  {_loops(row)}"
    return f"{start}  {row['pattern']}{': ' if row['reasons'] else ''}{_reasons(row)}"


def _loops(row: Row) -> str:
    """Return the instructions of every loop, its exponentials, and how many of these run under products."""
    loops: list[dict[str, object]] = row["loops"]  # type: ignore[assignment]  # made by row_of
    return " ".join(f"[{x['instructions']}, ex2 {x['ex2']}, {x['ex2_under_products']} under]" for x in loops)


def _reasons(row: Row) -> str:
    return "; ".join(map(str, row["reasons"]))  # type: ignore[call-overload]  # made by row_of and _none


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} {text}: write names separated by commas")
    return list(dict.fromkeys(words))


def _names_among(text: str, option: str, allowed: tuple[str, ...]) -> list[str]:
    words, listed = _words(text, option), f"use {', '.join(allowed)}"
    for word in words:
        if word not in allowed:
            raise UsageError(f"{option} {word}: {did_you_mean(word, allowed, listed)}")
    return words


def _widths(text: str) -> list[int]:
    words = _words(text, "--head-dims")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--head-dims {text}: write whole numbers separated by commas, as in 64,128")
    return [int(word) for word in words]
