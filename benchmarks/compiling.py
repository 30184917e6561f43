"""What stands before the first call: importing attnc, checking a file of the library, compiling it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from timing import as_json, interleaved, once

from attnc.compiler.lowering.lower import lower
from attnc.runtime.library import ModuleLoader, library_files, library_names
from attnc.spec.load import check_source, load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.reading.text import decode

Row = dict[str, Any]

CHECK_MS, IMPORT_MS = 50.0, 300.0

NEEDED: dict[str, dict[str, object]] = {
    "combiner": {"segment": 64},
    "davit_window": {"height": 8, "width": 8},
    "freeswim": {"frames": 4, "height": 32, "width": 64},
    "halo": {"height": 8, "width": 8},
    "hierarchical": {"group": 64},
    "lingen_temporal": {"frames": 4, "height": 8, "width": 8},
    "log_sparse": {"segment": 16, "window": 64},
    "longformer": {"dilation": [1, 2]},
    "moa": {"alpha": [0, 64], "beta": [0.5, 0]},
    "monarch": {"rows": 16, "cols": 16},
    "monarch_rt": {"frames": 4, "height": 8, "width": 8},
    "neighborhood_2d": {"height": 8, "width": 8},
    "neighborhood_3d": {"frames": 4, "height": 8, "width": 8, "window": 3},
    "radial": {"frames": 4, "per_frame": 64},
    "sliding_tile": {"frames": 4, "height": 32, "width": 64, "tile": 4, "kernel": 4},
    "svg": {"frames": 4, "per_frame": 64},
    "videofactory": {"frames": 4, "height": 8, "width": 8},
}
"""Parameters without a default."""


def rows(rounds: int) -> Iterator[Row]:
    """The imports, the first check, in which the parser is built, then a row for each file."""
    yield _imports(rounds)
    loader = ModuleLoader(None)
    first = library_files()["causal"]
    built = once(lambda: check_source(decode(first.read_bytes(), first.name), loader))
    yield {"what": "first check, with the parser built", "ms": round(built, 1), "verdict": "no target"}
    for name in sorted(library_files()):
        yield _file(name, rounds)


def _file(name: str, rounds: int) -> Row:
    path = library_files()[name]

    def check() -> object:
        return check_source(decode(path.read_bytes(), path.name), ModuleLoader(None))

    def compiled() -> object:
        program = load_program(decode(path.read_bytes(), path.name), ModuleLoader(None), name)
        return lower(bind(program, NEEDED.get(name, {})))

    runs = {"check": check, "compile": compiled} if name in library_names() else {"check": check}
    times = interleaved({what: partial(run) for what, run in runs.items()}, rounds, 1)
    return {
        "what": name,
        **{f"{what}_ms": as_json(time) for what, time in times.items()},
        "target_ms": CHECK_MS,
        "verdict": "ahead" if times["check"].median < CHECK_MS else "behind",
    }


def _imports(rounds: int) -> Row:
    """What `import attnc` adds to torch's own import, each in a process of its own, in turn.

    `use_adds_ms`: and what the first use adds, which imports the rest; there is no target for it.
    """
    used = "import torch, attnc; attnc.compile_attention"
    texts = {"torch": "import torch", "attnc": "import torch, attnc", "used": used}
    times = interleaved({name: partial(_process, text) for name, text in texts.items()}, rounds, 1)
    added = {name: times[name].median - times["torch"].median for name in ("attnc", "used")}
    return {
        "what": "import attnc",
        **{f"{name}_ms": as_json(time) for name, time in times.items()},
        "attnc_adds_ms": round(added["attnc"], 1),
        "use_adds_ms": round(added["used"], 1),
        "target_ms": IMPORT_MS,
        "verdict": "ahead" if added["attnc"] < IMPORT_MS else "behind",
    }


def _process(text: str) -> None:
    subprocess.run([sys.executable, "-c", text], check=True)


def line(row: Row) -> str:
    """A row as it is printed."""
    if "attnc_adds_ms" in row:
        adds = f"{row['attnc_adds_ms']} ms to torch's, with its first use {row['use_adds_ms']} ms"
        return f"import attnc adds {adds}  {row['verdict']}"
    if "ms" in row:
        return f"{row['what']}: {row['ms']} ms"
    parts = [f"{what} {row[f'{what}_ms']['median']:6.1f} ms" for what in ("check", "compile") if f"{what}_ms" in row]
    return f"{row['what']!s:22} {'  '.join(parts)}  {row['verdict']}"


def summary(done: list[Row]) -> Row:
    """The slowest check, and the median."""
    checks = [row["check_ms"] for row in done if "check_ms" in row]
    highest = [float(time["high"]) for time in checks]
    medians = [float(time["median"]) for time in checks]
    if not checks:
        return {}
    return {
        "summary": {
            f"slowest file's check, ms, median of its rounds (target {CHECK_MS:g})": max(medians),
            "slowest single check, ms": max(highest),
            "median check, ms": round(statistics.median(medians), 2),
            "files behind": [row["what"] for row in done if row["verdict"] == "behind"],
        }
    }
