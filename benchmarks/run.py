"""Benchmarks of this machine: `python benchmarks/run.py SUITE`, see --help; results/*.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator

import timing
import torch

Row = dict[str, object]


def main() -> int:
    """Run a suite and print its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "suite",
        choices=["cpu", "plan", "compile", "simulator", "weights", "decode", "recurrence", "routing", "block_masks"],
    )
    parser.add_argument("--len", dest="lengths", type=int, nargs="+", help="lengths (cpu: 1024 4096 16384; plan: 2^20)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pattern", nargs="+", default=None, help="cpu: patterns whose name contains one of these")
    parser.add_argument("--forward", action="store_true", help="cpu: without the backward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default=None, help="name of the result file (the suite's)")
    options = parser.parse_args()
    facts = timing.header()
    rows, line = _suite(options)
    done: list[Row] = []
    for row in rows:
        done.append(row)
        print(line(row), flush=True)
        facts |= _summary(options.suite, done)
        timing.save(options.name or options.suite, done, facts)  # what is done is kept, wherever the run ends
    print(json.dumps(_summary(options.suite, done), indent=1, ensure_ascii=False))
    print("written to", timing.RESULTS, file=sys.stderr)
    return 0


def _summary(suite: str, done: list[Row]) -> Row:
    """The suite's targets beside what was measured."""
    if suite in ("plan", "weights", "decode", "block_masks"):
        return {}
    if suite == "compile":
        import compiling

        return compiling.summary(done)
    if suite == "simulator":
        import simulator

        return {"summary": simulator.summary(done)}
    if suite == "routing":
        import routing

        return {"summary": routing.summary(done)}
    if suite == "recurrence":
        import recurrence

        return {"summary": recurrence.summary(done)}
    import cpu

    return {"summary": cpu.summary(done)}


def _suite(options: argparse.Namespace) -> tuple[Iterator[Row], Callable[[Row], str]]:
    """Rows and their printer; a suite is imported when it runs."""
    if options.suite == "plan":
        import plan

        return plan.rows(options.lengths or [1 << 20], options.rounds), plan.line
    if options.suite == "weights":
        import weights

        return weights.rows(options.lengths or [1024, 4096], options.rounds, options.pattern), weights.line
    if options.suite == "decode":
        import decode

        lengths = options.lengths or [1 << 14, 1 << 16, 1 << 18, 1 << 20]
        return decode.rows(lengths, options.rounds, options.pattern), decode.line
    if options.suite == "recurrence":
        import recurrence

        lengths = options.lengths or [8192, 65536]
        return recurrence.rows(lengths, options.rounds, options.pattern), recurrence.line
    if options.suite == "routing":
        import routing

        lengths = options.lengths or [2048, 4096, 8192, 16384, 32768]
        return routing.rows(lengths, options.rounds, options.pattern), routing.line
    if options.suite == "block_masks":
        import block_masks

        return block_masks.rows(options.lengths or [16384, 65536], options.rounds, options.pattern), block_masks.line
    if options.suite == "compile":
        import compiling

        return compiling.rows(options.rounds), compiling.line
    dtypes = [getattr(torch, name) for name in options.dtype]
    if options.suite == "simulator":
        import simulator

        lengths = options.lengths or [768, 1536, 3072]
        return simulator.rows(lengths, options.head_dim, dtypes, options.rounds), simulator.line
    import cpu

    lengths = options.lengths or [1024, 4096, 16384]
    rows = cpu.rows(lengths, options.head_dim, dtypes, options.rounds, options.pattern, backward=not options.forward)
    return rows, _cpu_line


def _cpu_line(row: Row) -> str:
    ratios = "  ".join(
        f"{key.removesuffix('_over_attnc')} {value:.2f}×" for key, value in row.items() if "_over_" in key
    )
    ours = row["attnc_ms"]["median"]  # type: ignore[index]  # made by cpu.rows
    if "flex_first_ms" in row:
        first = [float(str(row[f"{name}_first_ms"])) for name in ("attnc", "flex")]
        ratios += f"  first call {first[0]:.0f} ms, flex's {first[1]:.0f} ms"
    return (
        f"{row['pattern']!s:22} n={row['n']!s:6} d={row['head_dim']!s:4} {row['dtype']!s:9} "
        f"{row['direction']!s:17} attnc {ours:9.2f} ms   {ratios}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
