"""Soak test of the runtime: many processes on one cold cache, processes killed while they write, and thousands of calls
of random shapes. `python benchmarks/soak.py`, see --help; results/soak.json. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

import provenance
from soak_kills import kills
from soak_processes import processes, work
from soak_shapes import shapes
from soak_sizes import SMALL, WHOLE


def main() -> int:
    """Run the parts and write their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="processes, kills, shapes (default: all)")
    parser.add_argument("--small", action="store_true", help="a hundredth of the work, without a result file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SMALL if options.small else WHOLE
    if options.worker is not None:
        return work(options.worker, size)
    parts = {"processes": processes, "kills": kills, "shapes": shapes}
    if unknown := set(options.part) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    if not options.small:
        provenance.refuse_uncommitted()  # before eight minutes of work
    rows = []
    for name in options.part or parts:
        begun = time.perf_counter()
        row = {"part": name, **parts[name](size), "seconds": round(time.perf_counter() - begun, 1)}
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    if not options.small:
        import timing

        timing.save("soak", rows, {**provenance.header(), "size": asdict(size)})
    failed = [row["part"] for row in rows if row["failures"]]
    print(f"failed: {', '.join(map(str, failed))}" if failed else "everything held", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
