"""What stands before the first call: importing attnc, checking a file of the library, compiling it; and the first call
itself, with cold caches and with warm ones, beside FlexAttention's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

from timing import as_json, interleaved, once

from attnc.compiler.lowering.lower import lower
from attnc.runtime.library import ModuleLoader, library_files, library_names
from attnc.runtime.tuning.timer import Timing
from attnc.spec.load import check_source, load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.reading.text import decode

Row = dict[str, Any]

CHECK_MS, IMPORT_MS = 50.0, 300.0

NEEDED: dict[str, dict[str, object]] = {
    "combiner": {"segment": 64},
    "combiner_axial": {"width": 64},
    "combiner_mixture": {"width": 64},
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
    """The imports, first calls, the first check, in which the parser is built, then a row for each file."""
    yield _imports(rounds)
    yield from _first_calls(max(rounds // 2, 1))
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


# --- first calls -----------------------------------------------------------------------------------------------------

TIMED = """
import logging, time, torch
logging.getLogger("attnc.runtime.tuning.tune").setLevel(logging.INFO)
tuned = []
handler = logging.Handler()
handler.emit = lambda record: tuned.append(record.getMessage().startswith("tuned "))
logging.getLogger("attnc.runtime.tuning.tune").addHandler(handler)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4, 4096, 64) for _ in range(3))
{imports}
begun = time.perf_counter()
{first}
first = time.perf_counter()
again = {call}
print((first - begun) * 1e3, (time.perf_counter() - first) * 1e3, sum(tuned))
"""
"""A process that imports first: what is timed is all that a new pattern costs up to its result, then the next call."""

OURS = "from attnc import compile_attention; from attnc.runtime import attention"
FLEX = (
    "from torch.nn.attention.flex_attention import create_block_mask, flex_attention; import torch._inductor.compile_fx"
)

FIRSTS: dict[str, tuple[str, str, str]] = {
    "attnc": (OURS, "attend = compile_attention('sliding_window', window=512); attend(q, k, v)", "attend(q, k, v)"),
    'attnc, tune="1s"': (
        OURS,
        "attend = compile_attention('sliding_window', window=512, tune='1s'); attend(q, k, v)",
        "attend(q, k, v)",
    ),
    "flex": (
        FLEX,
        "mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 512), None, None, 4096, 4096, device='cpu'); "
        "attend = torch.compile(flex_attention); attend(q, k, v, block_mask=mask)",
        "attend(q, k, v, block_mask=mask)",
    ),
}
"""What is imported, what is timed as the first call, and the next one."""


def _first_calls(rounds: int) -> Iterator[Row]:
    """A causal window of 512 at 4,096 tokens, 4 heads of 64, fp32, forward: cold caches, then those that were left."""
    for name, (imports, first, call) in FIRSTS.items():
        text = TIMED.format(imports=imports, first=first, call=call)
        told = [_cold_and_warm(text) for _ in range(rounds)]
        yield {
            "what": f"first call, {name}",
            "cold_ms": as_json(Timing.of([cold[0] for cold, _ in told])),
            "warm_ms": as_json(Timing.of([warm[0] for _, warm in told])),
            "next_ms": as_json(Timing.of([warm[1] for _, warm in told])),
            "tuning_runs": {"cold": int(told[0][0][2]), "warm": int(max(warm[2] for _, warm in told))},
            "verdict": "no target",
        }


def _cold_and_warm(text: str) -> tuple[list[float], list[float]]:
    """What a process prints on empty caches, and then on those that it left."""
    with tempfile.TemporaryDirectory() as folder:
        caches = ("ATTNC_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        environment = {**os.environ, **{name: f"{folder}/{name}" for name in caches}}
        found = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", text], check=True, env=environment, capture_output=True, text=True
            )
            found.append([float(word) for word in done.stdout.split()[-3:]])
    return found[0], found[1]


def _process(text: str) -> None:
    subprocess.run([sys.executable, "-c", text], check=True)


def line(row: Row) -> str:
    """A row as it is printed."""
    if "attnc_adds_ms" in row:
        adds = f"{row['attnc_adds_ms']} ms to torch's, with its first use {row['use_adds_ms']} ms"
        return f"import attnc adds {adds}  {row['verdict']}"
    if "cold_ms" in row:
        times = ", ".join(f"{what} {row[f'{what}_ms']['median']:.0f} ms" for what in ("cold", "warm", "next"))
        return f"{row['what']}: {times}; tuning runs {row['tuning_runs']}"
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
    firsts = {str(row["what"]).removeprefix("first call, "): row for row in done if "cold_ms" in row}
    beside = {
        f"flex's first call over ours, {kind}": round(
            firsts["flex"][f"{kind}_ms"]["median"] / firsts["attnc"][f"{kind}_ms"]["median"], 1
        )
        for kind in ("cold", "warm")
        if {"flex", "attnc"} <= set(firsts)
    }
    return {
        "summary": {
            **beside,
            f"slowest file's check, ms, median of its rounds (target {CHECK_MS:g})": max(medians),
            "slowest single check, ms": max(highest),
            "median check, ms": round(statistics.median(medians), 2),
            "files behind": [row["what"] for row in done if row["verdict"] == "behind"],
        }
    }
