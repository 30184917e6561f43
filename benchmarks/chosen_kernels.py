"""What the machine code of kernels for chosen places says, without a GPU: `python benchmarks/chosen_kernels.py`."""

from __future__ import annotations

import argparse

from recurrent_kernels import line

from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.gpu.chosen_gate import SELECTION, cases, judge
from attnc.runtime.gpu.compiling import compile_all


def main() -> int:
    """Compile, judge and print; 1 where a kernel may not go out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--like", nargs="+", choices=list(SELECTION), default=list(SELECTION))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    likes = {name: SELECTION[name] for name in options.like}
    found = list(cases(options.targets, options.head_dims, options.dtype, likes))
    failed = 0
    for i, outcome in compile_all([(case.source, case.target) for case in found], options.processes):
        reasons = judge(found[i], outcome)
        failed += bool(reasons)
        print(line(found[i], outcome, reasons), flush=True)
    print(f"{len(found)} kernels, {failed} may not go out")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
