"""Read the machine code of recurrence kernels without a GPU: `python benchmarks/recurrent_kernels.py`.

`--library` reads, instead of one kernel per class, the kernels that calls of the library's recurrences start, and
writes results/kernels-recurrences-triton-*.json. Rows of unchanged kernels stay in the file.
"""

from __future__ import annotations

import argparse

from library_table import Asked, line, read_library

from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.toolchain import library_gate
from attnc.runtime.toolchain.compiling import compile_all
from attnc.runtime.toolchain.recurrence_gate import SELECTION, cases, judge


def main() -> int:
    """Compile, judge and print; return 1 if a kernel fails its checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--classes", nargs="+", choices=list(SELECTION), default=list(SELECTION))
    parser.add_argument("--stages", nargs="+", help="stages of the kernels (default: all)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--library", action="store_true", help="the kernels of the library's recurrences, into a table")
    options = parser.parse_args()
    if options.library:
        scope = Asked(frozenset(options.targets), frozenset(options.head_dims), options.dtype)
        wanted = library_gate.cases(library_gate.whole_library(), options.targets, options.head_dims, options.dtype)
        return read_library("recurrences", wanted, scope, judge, options.processes)
    forms = [SELECTION[name] for name in options.classes]
    kernels = list(cases(options.targets, options.head_dims, options.dtype, forms))
    kernels = [case for case in kernels if not options.stages or case.stage in options.stages]
    failed = 0
    for i, outcome in compile_all([(case.source, case.target) for case in kernels], options.processes):
        reasons = judge(kernels[i], outcome)
        failed += bool(reasons)
        print(line(kernels[i], outcome, reasons), flush=True)
    print(f"{len(kernels)} kernels, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
