"""The parts of the benchmarks: each measures rows in its own process and keeps them in a file.

The file is written after every row, completely or not at all, so that a stopped part keeps its rows; started again
on the same machine with the same sources and versions, the part continues after them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import provenance
import timing
import torch

from attnc.runtime.disk.machine_key import installed

Row = dict[str, Any]
"""The record of one measurement: `key` names it, `ok` is false where its result is wrong, `ms` holds its timings."""

FINE, WRONG = 0, 1

RIVALS = (
    "fla-core",
    "lightning_attn",
    "mamba_ssm",
    "natten",
    "flash-attn",
    "flash-attn-3",
    "flashinfer-python",
    "native-sparse-attention-triton",
)
"""Packages of rivals that are measured if installed; torch contains the others."""

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("spec", "compiler", "runtime", "stdlib_patterns", "benchmarks")
TELLING = (
    "run",
    "goals",
    "all_goals",
    "part",
    "measures",
    "causes",
    "reading",
    "plots",
    "document",
    "report",
    "charts",
)
"""Name prefixes of modules that start or report measurements but measure nothing."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs, at which sizes, and the keys of its finished rows."""

    device: str
    toy: bool
    done: frozenset[str] = frozenset()

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Part:
    """A process of a suite: `source` is `module:function`, `minutes` its maximum time."""

    name: str
    suite: str
    description: str
    source: str
    minutes: float

    def file(self, toy: bool) -> Path:
        """Return the result file; toy sizes have their own folder, which git ignores."""
        return (timing.RESULTS / "toy" if toy else timing.RESULTS) / f"{self.name}.json"

    def rows(self, setting: Setting) -> Iterator[Row]:
        """Yield the rows that are not in `setting.done`; the module is imported on the first call."""
        module, function = self.source.split(":")
        run_part: Callable[[Setting], Iterator[Row]] = getattr(importlib.import_module(module), function)
        return run_part(setting)


class KeyTwiceError(Exception):
    """Two rows of a part have one key, or a row has none, so that a stopped part could not continue."""


def run(part: Part, setting: Setting, out: Path, *, fresh: bool = False) -> int:
    """Run a part, or the rest of it, and write its file after every row; return 1 if a row is wrong.

    Raise UncommittedError if the file is in `timing.RESULTS` and sources have changes.
    """
    if out.parent == timing.RESULTS:
        provenance.refuse_uncommitted()
    facts = header(part, setting)
    done = [] if fresh else kept(out, facts)
    begun = time.monotonic()
    for row in part.rows(Setting(setting.device, setting.toy, frozenset(row["key"] for row in done))):
        key = row.get("key")
        if not key or any(key == other["key"] for other in done):
            raise KeyTwiceError(f"{part.name}: the key {key!r} is missing or occurs twice")
        done.append(row)
        write(out, facts | {"complete": False, "rows": done})
        print(f"{time.monotonic() - begun:6.0f} s  {line(row)}", flush=True)
    if not done:
        raise ValueError(f"{part.name} has no rows")
    write(out, facts | {"complete": True, "rows": done})
    return WRONG if any(is_wrong(row) for row in done) else FINE


def is_wrong(row: Row) -> bool:
    """Return whether the result of a row is wrong."""
    return not row.get("ok", True)


def header(part: Part, setting: Setting) -> Row:
    """Return the header of a result: machine, versions, sources, and the part."""
    facts: Row = provenance.header()
    if setting.cuda:
        facts["device"] = torch.cuda.get_device_name()
    facts["threads"] = torch.get_num_threads()
    facts["rivals"] = {name: version for name in RIVALS if (version := installed(name)) != "not installed"}
    return facts | {"sources": sources(), "part": part.name, "suite": part.suite, "toy": setting.toy}


SAME = ("torch", "triton", "python", "device", "threads", "rivals", "sources", "part", "toy")
"""The facts that must agree for a part to continue after the rows of its file."""


def kept(out: Path, facts: Mapping[str, Any]) -> list[Row]:
    """Return the correct rows of an earlier run under the same facts; wrong rows are measured again."""
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    if any(content.get(key) != facts[key] for key in SAME):
        return []
    return [row for row in content["rows"] if not is_wrong(row)]


def is_complete(part: Part, setting: Setting, out: Path) -> bool:
    """Return whether a file holds every row of its part, all correct, under the current facts."""
    facts = header(part, setting)
    rows = kept(out, facts)
    content = json.loads(out.read_text(encoding="utf-8")) if rows else {}
    return bool(content.get("complete")) and len(rows) == len(content["rows"])


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Write a file completely or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def sources() -> str:
    """Return a digest of the measured and the measuring sources."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            reporting = folder == "benchmarks" and (path.suffix == ".json" or path.stem.startswith(TELLING))
            if path.suffix in (".py", ".attn", ".lark", ".json") and not reporting:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def line(row: Row) -> str:
    """Return a row for the terminal: the rivals' times next to attnc's, or whether its result is correct."""
    if is_wrong(row):
        return f"WRONG {row['key']}: {row.get('errors', '')}"
    times = row.get("ms", {})
    ours = times.get("attnc", {}).get("median")
    if ours is None:
        return str(row["key"])
    ratios = [f"{name} {time['median'] / ours:.2f}×" for name, time in times.items() if name != "attnc"]
    return f"{row['key']}: {ours:.3f} ms  {'  '.join(ratios)}"


def setting_of(where: str, toy: bool) -> Setting:
    """Return the setting of a part for `cpu` or `gpu`. Raise NoDeviceError for a GPU's real sizes without a GPU."""
    if where == "cpu":
        return Setting("cpu", toy)
    if toy:
        return Setting("cpu", toy=True)
    if not torch.cuda.is_available():
        raise NoDeviceError("there is no GPU: pass --toy for toy sizes in Triton's interpreter")
    return Setting("cuda", toy=False)


class NoDeviceError(Exception):
    """A part for a GPU was started without a GPU."""
