"""What the machine code of recurrences' kernels says, without a GPU: `python benchmarks/recurrent_kernels.py`.

`--library`, into results/kernels-recurrences-triton-*.json: not classes, but the kernels that calls of the library's
recurrences start. What the file tells of kernels as they are now stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import timing

from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.gpu.compiling import Compiled, Outcome, compile_all
from attnc.runtime.gpu.gate import Case
from attnc.runtime.gpu.recurrent import library_gate
from attnc.runtime.gpu.recurrent.gate import SELECTION, cases, judge

Row = dict[str, Any]


def main() -> int:
    """Compile, judge and print; 1 where a kernel may not go out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--classes", nargs="+", choices=list(SELECTION), default=list(SELECTION))
    parser.add_argument("--stages", nargs="+", help="of the kernels; all where it is not given")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--library", action="store_true", help="of the library's recurrences, into a table")
    options = parser.parse_args()
    if options.library:
        return read_library(options.targets, options.head_dims, options.dtype, options.processes)
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


EVERY = 5
"""Rows after which what is done is written."""


def read_library(targets: Sequence[str], head_dims: Sequence[int], dtype: str, processes: int) -> int:
    """Compile what the table has not, judge and write; 1 where a kernel may not go out."""
    name = f"kernels-recurrences-triton-{version('triton')}"
    path = timing.RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    wanted = {
        (one.target, one.source.digest): one
        for one in library_gate.cases(library_gate.whole_library(), targets, head_dims, dtype)
    }
    asked = (set(targets), set(head_dims), dtype)
    kept = [row for row in old if (row["target"], row["digest"]) in wanted or not _within(row, *asked)]
    rows = {(row["target"], row["digest"]): row for row in kept}
    todo = [one for key, one in wanted.items() if key not in rows]
    facts = timing.header()
    for done, (i, outcome) in enumerate(compile_all([(one.source, one.target) for one in todo], processes)):
        reasons = judge(todo[i], outcome)
        rows[todo[i].target, todo[i].source.digest] = _row(todo[i], outcome, reasons)
        print(line(todo[i], outcome, reasons), flush=True)
        if not done % EVERY:
            _save(name, rows, facts)
    _save(name, rows, facts)
    return int(any(row["verdict"] == "fail" for row in rows.values()))


def _within(row: Row, targets: set[str], head_dims: set[int], dtype: str) -> bool:
    return row["target"] in targets and row["head_dim"] in head_dims and row["dtype"] == dtype


def _save(name: str, rows: Mapping[Any, Row], facts: Mapping[str, object]) -> None:
    found = sorted(rows.values(), key=lambda row: [str(row[key]) for key in KEYS])
    timing.save(name, found, dict(facts))


KEYS = ("target", "dtype", "head_dim", "pattern", "kernel")


def _row(case: Case, outcome: Outcome, reasons: list[str]) -> Row:
    row: Row = {
        "pattern": case.pattern,
        "kernel": case.source.function,
        "target": case.target,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "digest": case.source.digest,
        "verdict": "fail" if reasons else "pass",
        "reasons": reasons,
    }
    if isinstance(outcome, Compiled):
        code = outcome.code
        row |= {
            "registers": code.registers,
            "stack": code.stack,
            "spilled": code.spilled,
            "shared_kib": round(outcome.shared / 1024, 1),
            "products": dict(code.products),
        }
    return row


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
