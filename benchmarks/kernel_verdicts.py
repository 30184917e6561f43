"""Files with the verdict on each kernel and the digest of its text, one line per pattern.

`{"kernels": {"sm_90 bfloat16 64": {"causal": [["forward", "pass", "ec1a73…", "128x64", 8, 3], …]}}}`: the name of the
kernel, its verdict, the digest of its text, its tile, warps, stages and, if it fails, the reasons.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import provenance
import timing

Row = dict[str, Any]

GROUP = ("target", "dtype", "head_dim")
FIELDS = ("kernel", "verdict", "digest", "tiles", "warps", "stages", "reasons")
"""The fields of a kernel in the file, in order; absent fields at the end are left out."""


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if it does not exist; a row has the fields of `GROUP`, a pattern, `FIELDS`."""
    if not path.exists():
        return []
    groups = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return [
        dict(zip(GROUP, (target, dtype, int(head_dim)), strict=True)) | {"pattern": pattern} | _unpacked(kernel)
        for group, patterns in groups.items()
        for target, dtype, head_dim in [group.split()]
        for pattern, kernels in patterns.items()
        for kernel in kernels
    ]


def save(name: str, rows: Iterable[Row], facts: Mapping[str, object]) -> Path:
    """Write `results/<name>.json` from rows in order. Raise UncommittedError if sources have changes."""
    provenance.refuse_uncommitted()
    path = timing.RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    head = json.dumps(dict(facts), indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{head},\n "kernels": {_object(_lines(rows), 1)}\n}}\n', encoding="utf-8")
    return path


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    groups: dict[str, dict[str, list[list[object]]]] = {}
    for row in rows:
        patterns = groups.setdefault(" ".join(str(row[field]) for field in GROUP), {})
        patterns.setdefault(row["pattern"], []).append(_packed(row))
    for group, patterns in groups.items():
        lines = [f"   {json.dumps(name)}: {json.dumps(kernels)}" for name, kernels in patterns.items()]
        yield f"  {json.dumps(group)}: {_object(lines, 2)}"


def _object(lines: Iterable[str], indent: int) -> str:
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def _packed(row: Row) -> list[object]:
    values = [row.get(field) for field in FIELDS]
    while not values[-1]:
        values.pop()
    return values


def _unpacked(kernel: list[object]) -> Row:
    row = {field: value for field, value in zip(FIELDS, kernel, strict=False) if value is not None or field == "kernel"}
    return {"reasons": [], **row}
