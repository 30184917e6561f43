"""What the machine code of recurrences' kernels says, without a GPU: `python benchmarks/recurrent_kernels.py`."""

from __future__ import annotations

import argparse

from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.gpu.compiling import Compiled, Outcome, compile_all
from attnc.runtime.gpu.gate import Case
from attnc.runtime.gpu.recurrent.gate import SELECTION, cases, judge


def main() -> int:
    """Compile, judge and print; 1 where a kernel may not go out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--classes", nargs="+", choices=list(SELECTION), default=list(SELECTION))
    parser.add_argument("--stages", nargs="+", help="of the kernels; all where it is not given")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    forms = [SELECTION[name] for name in options.classes]
    found = list(cases(options.targets, options.head_dims, options.dtype, forms))
    found = [case for case in found if not options.stages or case.stage in options.stages]
    failed = 0
    for i, outcome in compile_all([(case.source, case.target) for case in found], options.processes):
        reasons = judge(found[i], outcome)
        failed += bool(reasons)
        print(line(found[i], outcome, reasons), flush=True)
    print(f"{len(found)} kernels, {failed} may not go out")
    return int(failed > 0)


def line(case: Case, outcome: Outcome, reasons: list[str]) -> str:
    """A row of the table."""
    tiles = case.source.tiles
    start = f"{case.target:7}{case.head_dim:4}  {case.pattern:24}{case.stage:13}{tiles.k_tile:3} columns"
    facts = ""
    if isinstance(outcome, Compiled):
        code = outcome.code
        products = " ".join(f"{name} {count}" for name, count in code.products.items()) or "no products"
        loops = " ".join(str(loop.instructions) for loop in code.loops)
        facts = (
            f" {tiles.warps} warps {code.registers:4} registers {code.stack:4} stack {code.spilled:3} spilled "
            f"{outcome.shared / 1024:6.1f} KiB  {products}  loops of {loops or '-'}"
        )
    return start + facts + (f"  !! {'; '.join(reasons)}" if reasons else "")


if __name__ == "__main__":
    raise SystemExit(main())
