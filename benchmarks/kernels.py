"""Read the machine code of kernels without a GPU: `python benchmarks/kernels.py`.

By default the library for heads of 64 and 128 in bf16 on every target, and one pattern of each kind for heads of 96
and 256 too, and in fp16; written to results/kernels-library-triton-*.json. `--selection`: one pattern of each kind for
heads of 64 and 128 in bf16; written to results/kernels-triton-*.json. `--changed`: only kernels whose row is missing
or has another digest; other rows stay.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kernel_verdicts
import provenance
import timing

from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.simulation import compiled_figures
from attnc.runtime.commands import console
from attnc.runtime.commands.doctor import Row, line, rows
from attnc.runtime.toolchain.kernel_gate import GateCase
from attnc.runtime.toolchain.selection import (
    SELECTION,
    NoKernels,
    cases,
    named,
    whole_library,
)

EVERY = 5
"""Number of rows after which finished rows are written."""


def main() -> int:
    """Compile, judge and write; return 1 if a kernel fails its checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--selection", action="store_true", help="one pattern of each kind, bf16, heads of 64 and 128")
    parser.add_argument("--changed", action="store_true", help="only kernels whose row is missing or out of date")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--facts", action="store_true", help="write the simulator's figures of causal attention")
    options = parser.parse_args()
    if options.facts:
        return _write_facts(options.processes)
    table = KernelTable(whole=not options.selection)
    kernels = _chosen(options)
    table.begin(options.targets, kernels, keep=options.changed)
    if options.changed:
        kernels = [case for case in kernels if isinstance(case, GateCase) and not table.has(case)]
    total = sum(isinstance(case, GateCase) for case in kernels)
    with console.progress("kernels", total) as step:
        for i, row in enumerate(rows(kernels, options.processes)):
            table.add(row)
            if row["verdict"] != "none":
                step(f"{row['pattern']} {row['kernel']} {row['target']}")
            if row["verdict"] != "pass":
                print(line(row), flush=True)
            if not i % EVERY:  # finished rows are kept if the run is stopped
                table.save()
    table.save()
    return int(table.has_failed)


class KernelTable:
    """A result file: the row of each kernel, and for each target where and when all of its rows were last read."""

    def __init__(self, *, whole: bool) -> None:
        self._name = name = f"kernels-{'library-' if whole else ''}triton-{version('triton')}"
        path = timing.RESULTS / f"{name}.json"
        self._rows: dict[Key, Row] = {_key(row): row for row in kernel_verdicts.read(path)}
        self._runs: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
        provenance.refuse_uncommitted()  # before anything is compiled
        self._facts = provenance.header()

    def begin(self, targets: Sequence[str], requested: Sequence[GateCase | NoKernels], *, keep: bool) -> None:
        """Drop the rows of these targets, except the requested kernels' if `keep` is set."""
        kept = set(map(_key_of, requested)) if keep else set()
        self._rows = {key: row for key, row in self._rows.items() if row["target"] not in targets or key in kept}
        if not keep:
            self._runs |= dict.fromkeys(targets, self._facts)

    def has(self, case: GateCase) -> bool:
        """Return whether a kernel with its current text has a row."""
        row = self._rows.get(_key_of(case))
        return row is not None and row.get("digest") == case.source.digest

    def add(self, row: Row) -> None:
        """Replace the kernel's row."""
        self._rows[_key(row)] = row

    @property
    def has_failed(self) -> bool:
        """Whether a kernel failed its checks."""
        return any(row["verdict"] == "fail" for row in self._rows.values())

    def save(self) -> None:
        """Write the file."""
        rows = [self._rows[key] for key in sorted(self._rows, key=lambda key: [*map(str, key)])]
        facts = {**self._facts, "runs": dict(sorted(self._runs.items())), "summary": summary(rows)}
        kernel_verdicts.save(self._name, rows, facts)


Key = tuple[object, ...]


def _key(row: Row) -> Key:
    return tuple(row[name] for name in ("target", "dtype", "head_dim", "pattern", "kernel"))


def _key_of(one: GateCase | NoKernels) -> Key:
    return one.target, one.dtype, one.head_dim, one.pattern, one.title if isinstance(one, GateCase) else None


def _write_facts(processes: int) -> int:
    """Compile causal attention; write its figures for the simulator (`compiler/simulation/compiled_figures.json`)."""
    jobs = [case for case in causal_kernels(TARGETS, (64, 128)) if case.stage not in ("decode", "merge")]
    compiled = sorted(rows(jobs, processes), key=lambda row: [*map(str, _key(row))])
    path = Path(compiled_figures.__file__).with_suffix(".json")
    lines = ",\n".join(f"  {json.dumps(figures_of(row))}" for row in compiled if row.get("loops"))
    path.write_text(f'{{"triton": "{version("triton")}", "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    return 0


def causal_kernels(targets: Iterable[str], head_dims: Sequence[int]) -> list[GateCase]:
    """Return the kernels of causal attention in bf16."""
    gate_cases = cases(named(["causal"]), list(targets), list(head_dims), ["bfloat16"])
    return [case for case in gate_cases if isinstance(case, GateCase)]


def figures_of(row: Row) -> dict[str, object]:
    """Return the figures of a compiled kernel: registers, shared memory, and the instructions of its shortest loop."""
    loops: Any = row["loops"]
    full = min(loops, key=lambda loop: loop["instructions"])
    q_tile, k_tile = map(int, str(row["tiles"]).split("x"))
    mix = full["mix"]
    return {
        "architecture": row["target"],
        "kernel": row["kernel"],
        "head_dim": row["head_dim"],
        "dtype": row["dtype"],
        "shape": [q_tile, k_tile, row["warps"], row["stages"]],
        "seen": {
            "registers": row["registers"],
            "shared_kib": row["shared_kib"],
            "issued": full["instructions"],
            "alu": mix.get("alu", 0),
            "fma": mix.get("fma", 0),
            "exps": mix.get("mufu", 0),
        },
    }


def summary(done: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Count the verdicts by target."""
    counts_by_target = {
        target: Counter(str(row["verdict"]) for row in done if row["target"] == target) for target in TARGETS
    }
    return {target: dict(sorted(counts.items())) for target, counts in counts_by_target.items() if counts}


def _chosen(options: argparse.Namespace) -> list[GateCase | NoKernels]:
    targets, widths = options.targets, options.head_dims
    if options.selection:
        return list(cases(SELECTION, targets, widths, ["bfloat16"]))
    gate_cases = [*cases(whole_library(), targets, widths, ["bfloat16"])]
    gate_cases += cases(SELECTION, targets, [96, 256], ["bfloat16"])
    gate_cases += cases(SELECTION, targets, widths, ["float16"])
    return gate_cases


if __name__ == "__main__":
    raise SystemExit(main())
