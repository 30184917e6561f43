"""What the machine code of kernels says, without a GPU: `python benchmarks/kernels.py`; results/kernels-triton-*.json.

Everything: the library for heads of 64 and 128 in bf16 on every target, and one pattern of each kind for heads of 96
and 256 too, and in fp16. `--selection`: one pattern of each kind for heads of 64 and 128 in bf16.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timing

from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.simulation import seen_kernels
from attnc.runtime.commands import console
from attnc.runtime.commands.gate import Row, line, rows
from attnc.runtime.gpu.gate import Case
from attnc.runtime.gpu.selection import SELECTION, NoKernels, cases, whole_library

EVERY = 5
"""Rows after which what is done is written."""


def main() -> int:
    """Compile, judge and write; 1 where a kernel may not go out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--selection", action="store_true", help="one pattern of each kind, bf16, heads of 64 and 128")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--facts", action="store_true", help="write what the simulator is told, from the last table")
    options = parser.parse_args()
    if options.facts:
        return _write_facts()
    facts = timing.header()
    found = _chosen(options)
    done: list[Row] = []
    total = sum(isinstance(one, Case) for one in found)
    with console.progress("kernels", total) as step:
        for row in rows(found, options.processes):
            done.append(row)
            if row["verdict"] != "none":
                step(f"{row['pattern']} {row['kernel']} {row['target']}")
            if row["verdict"] != "pass":
                print(line(row), flush=True)
            if not len(done) % EVERY:  # what is done is kept, wherever the run ends
                _save(facts | {"asked": len(found), "done": len(done)}, options.targets, done)
    _save(facts | {"asked": len(found), "done": len(done)}, options.targets, done)
    return int(any(row["verdict"] == "fail" for row in done))


def _save(facts: dict[str, Any], targets: list[str], done: list[Row]) -> None:
    """Write, and keep what another run found for other targets."""
    name = f"kernels-triton-{version('triton')}"
    path = timing.RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "rows": []}
    runs = {target: run for target, run in old["runs"].items() if target not in targets}
    kept = [row for row in old["rows"] if row["target"] not in targets]
    whole = _sorted([*kept, *done])
    runs |= dict.fromkeys(targets, facts)
    timing.save(name, whole, {**facts, "runs": dict(sorted(runs.items())), "summary": summary(whole)})


def _write_facts() -> int:
    """What the simulator is told of the kernels of causal attention (`compiler/simulation/seen_kernels.py`)."""
    source = f"kernels-triton-{version('triton')}.json"
    table = json.loads((timing.RESULTS / source).read_text(encoding="utf-8"))
    found = [_fact(row) for row in table["rows"] if row["pattern"] == "causal" and row.get("loops")]
    path = Path(seen_kernels.__file__).with_suffix(".json")
    lines = ",\n".join(f"  {json.dumps(one)}" for one in found)
    path.write_text(f'{{"from": "{source}", "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    return 0


def _fact(row: Row) -> dict[str, object]:
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


def summary(done: list[Row]) -> dict[str, dict[str, int]]:
    """Verdicts by target."""
    found = {target: Counter(str(row["verdict"]) for row in done if row["target"] == target) for target in TARGETS}
    return {target: dict(sorted(counts.items())) for target, counts in found.items() if counts}


def _chosen(options: argparse.Namespace) -> list[Case | NoKernels]:
    targets, widths = options.targets, options.head_dims
    if options.selection:
        return list(cases(SELECTION, targets, widths, ["bfloat16"]))
    found = [*cases(whole_library(), targets, widths, ["bfloat16"])]
    found += cases(SELECTION, targets, [96, 256], ["bfloat16"])
    found += cases(SELECTION, targets, widths, ["float16"])
    return found


def _sorted(done: list[Row]) -> list[Row]:
    keys = ("target", "dtype", "head_dim", "pattern", "kernel")
    return sorted(done, key=lambda row: [str(row[key]) for key in keys])


if __name__ == "__main__":
    raise SystemExit(main())
