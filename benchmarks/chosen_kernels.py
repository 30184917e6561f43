"""Read the machine code of kernels for selected blocks without a GPU: `python benchmarks/chosen_kernels.py`.

`--library` reads, instead of one kernel per class, the kernels that calls of the library's routing patterns start,
and writes results/kernels-routing-triton-*.json. Rows of unchanged kernels stay in the file.
"""

from __future__ import annotations

import argparse

from library_table import Asked, line, read_library

from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.texts.library import routing_names
from attnc.runtime.toolchain import routing_gate
from attnc.runtime.toolchain.compiling import compile_all
from attnc.runtime.toolchain.selected_gate import SELECTION, cases, judge


def main() -> int:
    """Compile, judge and print; return 1 if a kernel fails its checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--like", nargs="+", choices=list(SELECTION), default=list(SELECTION))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--library", action="store_true", help="the kernels of the library's routing patterns, into a table"
    )
    options = parser.parse_args()
    if options.library:
        scope = Asked(frozenset(options.targets), frozenset(options.head_dims), options.dtype)
        wanted = routing_gate.cases(routing_names(), options.targets, options.head_dims, options.dtype)
        return read_library("routing", wanted, scope, routing_gate.judge, options.processes)
    likes = {name: SELECTION[name] for name in options.like}
    kernels = list(cases(options.targets, options.head_dims, options.dtype, likes))
    failed = 0
    for i, outcome in compile_all([(case.source, case.target) for case in kernels], options.processes):
        reasons = judge(kernels[i], outcome)
        failed += bool(reasons)
        print(line(kernels[i], outcome, reasons), flush=True)
    print(f"{len(kernels)} kernels, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
