"""The command: draw cases until the time is up; exit 1 at the first mismatch of each part."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]


def main() -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(prog="hunting", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case (default: 0)")
    parser.add_argument("--cases", type=int, default=None, help="stop after this number of cases of each part")
    parser.add_argument("--part", action="append", help="cpu, triton, hostile or plans; may be repeated (default: all)")
    parser.add_argument("--go-on", action="store_true", help="print mismatches and go on")
    options = parser.parse_args()
    os.environ.setdefault("ATTNC_VERIFY_IR", "1")
    if options.part == ["triton"] or not options.part:
        os.environ["TRITON_INTERPRET"] = "1"
    from hunting import hunt

    parts = options.part or list(hunt.PARTS)
    unknown = set(parts) - set(hunt.PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: the parts are {', '.join(hunt.PARTS)}")
    started = time.monotonic()
    return hunt.run(parts, options.seed, started + options.seconds, options.cases, options.go_on)


if __name__ == "__main__":
    sys.exit(main())
