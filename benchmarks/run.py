"""Benchmarks of this machine: `python benchmarks/run.py cpu`. Results go to benchmarks/results/*.json."""

from __future__ import annotations

import argparse
import sys

import timing
import torch


def main() -> int:
    """Run a suite and print its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=["cpu"])
    parser.add_argument("--len", dest="lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default=None, help="name of the result file (the suite's)")
    options = parser.parse_args()
    from cpu import rows

    facts = timing.header()
    done: list[dict[str, object]] = []
    for row in rows(options.lengths, options.head_dim, [getattr(torch, d) for d in options.dtype], options.rounds):
        done.append(row)
        print(_line(row), flush=True)
        timing.save(options.name or options.suite, done, facts)  # what is done is kept, wherever the run ends
    print("written to", timing.RESULTS, file=sys.stderr)
    return 0


def _line(row: dict[str, object]) -> str:
    ratios = "  ".join(
        f"{key.removesuffix('_over_attnc')} {value:.2f}×" for key, value in row.items() if "_over_" in key
    )
    ours = row["attnc_ms"]["median"]  # type: ignore[index]  # made by cpu.rows
    return (
        f"{row['pattern']!s:22} n={row['n']!s:6} d={row['head_dim']!s:4} {row['dtype']!s:9} "
        f"{row['direction']!s:17} attnc {ours:9.2f} ms   {ratios}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
