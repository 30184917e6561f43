"""`attnc doctor --targets`: kernels compiled for GPUs that need not be there, and what their machine code says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.simulation.gpu_clocks import BYTES
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.gpu import routing_gate
from attnc.runtime.gpu.compiling import CompiledBinary, Outcome, compile_all
from attnc.runtime.gpu.kernel_gate import GateCase
from attnc.runtime.gpu.machine_code import Loop
from attnc.runtime.gpu.selection import SELECTION, NoKernels, PatternRequest, cases, named, whole_library
from attnc.runtime.library import routing_names
from attnc.spec.suggest import did_you_mean

Row = dict[str, object]

WHOLE = "library"
"""The name of all patterns of the library."""


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `doctor` that are about kernels."""
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--targets",
        metavar="NAMES",
        help=f"compile kernels for these ({','.join(TARGETS)}), read their machine code",
    )
    kernels.add_argument(
        "--patterns", metavar="NAMES", help=f"library patterns, or `{WHOLE}` (one of each kind that kernels have)"
    )
    kernels.add_argument("--head-dims", metavar="NUMBERS", default="64,128", help="widths of heads (64,128)")
    kernels.add_argument("--dtypes", metavar="NAMES", default="bfloat16", help=f"{','.join(BYTES)} (bfloat16)")
    kernels.add_argument("--processes", metavar="N", type=int, default=2, help="compilers at once (2)")


def run(args: argparse.Namespace) -> int:
    """1 where a kernel may not go out."""
    found = chosen(args)
    total = sum(isinstance(case, GateCase) for case in found)
    done: list[Row] = []
    with console.progress("kernels", total) as step:
        for row in rows(found, args.processes):
            done.append(row)
            if row["verdict"] != "none":
                step(f"{row['pattern']} {row['kernel']} {row['target']}")
            if not args.json:
                print(line(row), flush=True)
    failed = sum(row["verdict"] == "fail" for row in done)
    if args.json:
        console.print_json({"agrees": not failed, "kernels": done})
    else:
        print(f"\n{console.counted(total, 'kernel')}, {failed or 'none'} of them may not go out")
    return console.FOUND if failed else console.FINE


def chosen(args: argparse.Namespace) -> list[GateCase | NoKernels]:
    """The kernels that the arguments name. Raises UsageError, PatternNotFoundError."""
    if find_spec("triton") is None:
        raise UsageError("--targets: triton is not installed; `pip install 'attnc[gpu]'` installs it")
    if args.processes < 1:
        raise UsageError(f"--processes {args.processes}: give a whole number, at least 1")
    targets = _known(args.targets, "--targets", tuple(TARGETS))
    dtypes = _known(args.dtypes, "--dtypes", tuple(BYTES))
    widths, asked = _widths(args.head_dims), wanted(args.patterns)
    by_calls = [one.name for one in asked if one.name in routing_names()]
    found = list(cases([one for one in asked if one.name not in by_calls], targets, widths, dtypes))
    return found + [case for dtype in dtypes for case in routing_gate.cases(by_calls, targets, widths, dtype)]


def wanted(patterns: str | None) -> Sequence[PatternRequest]:
    """The patterns that `--patterns` names."""
    if patterns is None:
        return SELECTION
    return whole_library() if patterns == WHOLE else named(_words(patterns, "--patterns"))


def rows(found: Sequence[GateCase | NoKernels], processes: int) -> Iterator[Row]:
    """Yield a row for every kernel as its compilation ends; patterns without kernels come first."""
    yield from (_none(one) for one in found if isinstance(one, NoKernels))
    kernels = [one for one in found if isinstance(one, GateCase)]
    jobs = [(case.source, case.target) for case in kernels]
    for i, outcome in compile_all(jobs, processes):
        yield row_of(kernels[i], outcome)


def row_of(case: GateCase, outcome: Outcome) -> Row:
    """A kernel as it is reported."""
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


def _none(one: NoKernels) -> Row:
    return {
        "pattern": one.pattern,
        "kernel": None,
        "target": one.target,
        "head_dim": one.head_dim,
        "dtype": one.dtype,
        "verdict": "none",
        "reasons": [one.reason],
    }


def line(row: Row) -> str:
    """A row for people."""
    start = f"{row['verdict']!s:<5} {row['target']!s:<7} {row['dtype']!s:<9} {row['head_dim']!s:>4} "
    if row["verdict"] == "none":
        return f"{start}{row['pattern']}: {_reasons(row)}"
    start += f"{row['kernel']!s:<8} {row['tiles']!s:<8} {row['warps']} warps {row['stages']} stages"
    if "registers" in row:
        start += f"  {row['registers']!s:>3} registers {row['shared_kib']!s:>6} KiB  {_loops(row)}"
    return f"{start}  {row['pattern']}{': ' if row['reasons'] else ''}{_reasons(row)}"


def _loops(row: Row) -> str:
    """Instructions, exponentials and those under products of every loop."""
    loops: list[dict[str, object]] = row["loops"]  # type: ignore[assignment]  # made by row_of
    return " ".join(f"[{x['instructions']}, ex2 {x['ex2']}, {x['ex2_under_products']} under]" for x in loops)


def _reasons(row: Row) -> str:
    return "; ".join(map(str, row["reasons"]))  # type: ignore[call-overload]  # made by row_of and _none


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} {text}: write names with commas between them")
    return list(dict.fromkeys(words))


def _known(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    words, listed = _words(text, option), f"there are {', '.join(known)}"
    for word in words:
        if word not in known:
            raise UsageError(f"{option} {word}: {did_you_mean(word, known, listed)}")
    return words


def _widths(text: str) -> list[int]:
    words = _words(text, "--head-dims")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--head-dims {text}: write whole numbers with commas between them, as in 64,128")
    return [int(word) for word in words]
