"""A table of the kernels that library calls start: missing rows are compiled, judged and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import kernel_verdicts
import provenance
import timing

from attnc.runtime.toolchain.compiling import CompiledBinary, Outcome, compile_all
from attnc.runtime.toolchain.kernel_gate import GateCase

Row = dict[str, Any]

EVERY = 5
"""Number of rows after which finished rows are written."""

KEYS = ("target", "dtype", "head_dim", "pattern", "kernel", "digest")


@dataclass(frozen=True)
class Asked:
    """Targets, head dimensions and a dtype; rows outside this scope are kept unchanged."""

    targets: frozenset[str]
    head_dims: frozenset[int]
    dtype: str

    def has(self, row: Row) -> bool:
        """Return whether a row is in scope."""
        return row["target"] in self.targets and row["head_dim"] in self.head_dims and row["dtype"] == self.dtype


def read_library(
    kind: str, cases: Iterable[GateCase], scope: Asked, judge: Callable[[GateCase, Outcome], list[str]], processes: int
) -> int:
    """Write results/kernels-<kind>-triton-*.json; return 1 if one of its kernels fails its checks.

    Rows of unchanged kernels stay; other rows in scope are dropped.
    """
    name = f"kernels-{kind}-triton-{version('triton')}"
    path = timing.RESULTS / f"{name}.json"
    old = kernel_verdicts.read(path)
    wanted = {(case.target, case.source.digest): case for case in cases}
    kept = [row for row in old if (row["target"], row["digest"]) in wanted or not scope.has(row)]
    rows = {(row["target"], row["digest"]): row for row in kept}
    todo = [case for key, case in wanted.items() if key not in rows]
    provenance.refuse_uncommitted()  # before anything is compiled
    facts = provenance.header()
    for done, (i, outcome) in enumerate(compile_all([(case.source, case.target) for case in todo], processes)):
        reasons = judge(todo[i], outcome)
        rows[todo[i].target, todo[i].source.digest] = _row(todo[i], reasons)
        print(line(todo[i], outcome, reasons), flush=True)
        if not done % EVERY:
            _save(name, rows, facts)
    _save(name, rows, facts)
    failed = sum(row["verdict"] == "fail" for row in rows.values())
    print(f"{len(rows)} kernels, {failed} failed")
    return int(failed > 0)


def _save(name: str, rows: Mapping[Any, Row], facts: Mapping[str, object]) -> None:
    sorted_rows = sorted(rows.values(), key=lambda row: [str(row[key]) for key in KEYS])
    kernel_verdicts.save(name, sorted_rows, facts)


def _row(case: GateCase, reasons: list[str]) -> Row:
    return {
        "pattern": case.pattern,
        "kernel": case.source.function,
        "target": case.target,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "digest": case.source.digest,
        "verdict": "fail" if reasons else "pass",
        "reasons": reasons,
    }


def line(case: GateCase, outcome: Outcome, reasons: list[str]) -> str:
    """Return a row of the table as a line."""
    tiles = case.source.tiles
    start = f"{case.target:7}{case.head_dim:4}  {case.pattern:24}{case.stage:13}{tiles.k_tile:3} columns"
    facts = ""
    if isinstance(outcome, CompiledBinary):
        code = outcome.code
        products = " ".join(f"{name} {count}" for name, count in code.products.items()) or "no products"
        loops = " ".join(str(loop.instructions) for loop in code.loops)
        facts = (
            f" {tiles.warps} warps {code.registers:4} registers {code.stack:4} stack {code.spilled:3} spilled "
            f"{outcome.shared / 1024:6.1f} KiB  {products}  loops of {loops or '-'}"
        )
    return start + facts + (f"  !! {'; '.join(reasons)}" if reasons else "")
