"""The table of what machine code says is of the kernels as they are: `python benchmarks/kernels.py --selection`."""

from __future__ import annotations

import json
from pathlib import Path

from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.gpu.gate import Case
from attnc.runtime.gpu.selection import SELECTION, cases

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
TABLE = RESULTS / "kernels-triton-3.7.1.json"


def test_the_table_has_every_kernel_with_its_tiles_and_all_pass() -> None:
    """`--selection --changed` reads those again that differ."""
    told = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]:
        if row["kernel"] is not None:
            place = row["target"], row["head_dim"], row["pattern"], row["kernel"]
            told[place] = row["tiles"], row["warps"], row["stages"], row["verdict"]
    found = {}
    for case in cases(SELECTION, list(TARGETS), (64, 128), ("bfloat16",)):
        if isinstance(case, Case):
            shape = case.source.tiles
            place = case.target, case.head_dim, case.pattern, case.title
            found[place] = f"{shape.q_tile}x{shape.k_tile}", shape.warps, shape.stages, "pass"
    assert told == found
