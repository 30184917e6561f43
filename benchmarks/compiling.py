"""Costs before the first call: importing attnc, checking a file of the library, compiling it; and the first call, with
cold caches and with warm ones, and calls of new shapes, next to FlexAttention's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from benchmark_part import Row, Setting
from timing import as_json, interleaved, once

from attnc.compiler.lowering.lower import lower
from attnc.runtime.texts.library import ModuleLoader, library_files, library_names
from attnc.runtime.toolchain import library_gate, routing_gate, selection
from attnc.runtime.tuning.timer import Timing
from attnc.spec.load import check_source, load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.reading.source_text import decode

ROUNDS = 5

NEEDED: Mapping[str, Mapping[str, object]] = {
    **selection.PARAMETERS,
    **routing_gate.PARAMETERS,
    **library_gate.PARAMETERS,
}
"""Values of parameters without defaults, for every kind of pattern, as the gate of kernels uses them."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield imports, first calls, new shapes, the first check, which builds the parser, then a row for each file."""
    rounds = 1 if setting.toy else ROUNDS
    todo: list[tuple[str, Callable[[], Row]]] = [("import attnc", partial(_imports, rounds))]
    for direction in ("forward", "forward+backward"):
        todo += [(f"first call {direction}, {name}", partial(_first, name, direction, rounds)) for name in FIRSTS]
    todo += [(f"new shapes, {name}", partial(_new_shapes, name)) for name in SHAPED]
    todo += [("first check, with the parser built", _first_check)]
    names = sorted(library_files())
    todo += [(f"check of {name}", partial(_file, name, rounds)) for name in (names[:2] if setting.toy else names)]
    for key, make in todo:
        if key not in setting.done and not (setting.toy and key.startswith(LONG)):
            yield {"key": key} | make()


LONG = ("first call forward+backward", "first call forward, flex", "first call forward, attnc, tune", "new shapes")
"""Rows that toy runs leave out, as they would not be shorter."""


def _first_check() -> Row:
    first = library_files()["causal"]
    built = once(lambda: check_source(decode(first.read_bytes(), first.name), ModuleLoader(None)))
    return {"ms": {"attnc": as_json(Timing.of([built]))}}


def _file(name: str, rounds: int) -> Row:
    path = library_files()[name]

    def check() -> object:
        return check_source(decode(path.read_bytes(), path.name), ModuleLoader(None))

    def compiled() -> object:
        program = load_program(decode(path.read_bytes(), path.name), ModuleLoader(None), name)
        return lower(bind(program, NEEDED.get(name, {})))

    runs: dict[str, Callable[[], object]] = {"attnc": check}
    if name in library_names():
        runs["attnc, compiled"] = compiled
    return {"pattern": name, "ms": {what: as_json(time) for what, time in interleaved(runs, rounds, 1).items()}}


def _imports(rounds: int) -> Row:
    """Measure the time that `import attnc` adds to torch's own import, in alternating processes.

    `use_adds` also counts the first use, which imports the remaining modules.
    """
    used = "import torch, attnc; attnc.compile_attention"
    texts = {"torch": "import torch", "attnc": "import torch, attnc", "attnc, used": used}
    times = interleaved({name: partial(_process, text) for name, text in texts.items()}, rounds, min(rounds - 1, 1))
    adds = {name: round(times[name].median - times["torch"].median, 1) for name in ("attnc", "attnc, used")}
    return {"ms": {name: as_json(time) for name, time in times.items()}, "adds_ms": adds}


# --- first calls -----------------------------------------------------------------------------------------------------

TIMED = """
import logging, time, torch
logging.getLogger("attnc.runtime.tuning.tuner").setLevel(logging.INFO)
tuned = []
handler = logging.Handler()
handler.emit = lambda record: tuned.append(record.getMessage().startswith("tuned "))
logging.getLogger("attnc.runtime.tuning.tuner").addHandler(handler)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4, 4096, 64, requires_grad={trains}) for _ in range(3))
{imports}
def run():
    out = attend(q, k, v, **given)
    if {trains}: torch.autograd.grad(out.sum(), (q, k, v))
begun = time.perf_counter()
{first}
run()
first = time.perf_counter()
run()
print((first - begun) * 1e3, (time.perf_counter() - first) * 1e3, sum(tuned))
"""
"""A process that imports first, then times the full cost of a new pattern up to its result, and the next call."""

OURS = "from attnc import compile_attention; from attnc.runtime.api import attention; given = {}"
FLEX = (
    "from torch.nn.attention.flex_attention import create_block_mask, flex_attention; import torch._inductor.compile_fx"
)
WINDOW = "attend = compile_attention('sliding_window', window=512"

FIRSTS: dict[str, tuple[str, str]] = {
    "attnc": (OURS, f"{WINDOW})"),
    'attnc, tune="1s"': (OURS, f"{WINDOW}, tune='1s')"),
    "flex": (
        FLEX,
        "mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 512), None, None, 4096, 4096, device='cpu'); "
        "attend = torch.compile(flex_attention); given = {'block_mask': mask}",
    ),
}
"""The imports, and the code that is timed with the first call."""


def _first(name: str, direction: str, rounds: int) -> Row:
    """Measure a causal window of 512 at 4,096 tokens, 4 heads of 64, fp32: on cold caches, then on warm ones."""
    trains = direction != "forward"
    row: Row = {"pattern": "window 512", "n": 4096, "d": 64, "dtype": "float32", "direction": direction}
    if trains and name == "flex":
        return row | {"absent": {"flex": "FlexAttention has no gradient on a CPU"}}
    imports, first = FIRSTS[name]
    text = TIMED.format(imports=imports, first=first, trains=trains)
    timed = [_cold_and_warm(text) for _ in range(max(rounds // 2, 1))]
    times = {"cold": [cold[0] for cold, _ in timed], "warm": [warm[0] for _, warm in timed]}
    times |= {"next": [warm[1] for _, warm in timed]}
    tuning = {"cold": int(timed[0][0][2]), "warm": int(max(warm[2] for _, warm in timed))}
    return row | {"first_ms": {what: as_json(Timing.of(x)) for what, x in times.items()}, "tuning_runs": tuning}


SHAPES = ((1, 4096), (1, 4160), (1, 5000), (2, 4096), (3, 3000), (1, 4160))
"""Batch and tokens of successive calls; the last shape occurs for the second time."""

SHAPED = ("attnc", "flex")

NEW_SHAPES = """
import time, torch
from torch._dynamo.utils import counters
{imports}
{first}
timed = []
for batch, n in {shapes}:
    q, k, v = (torch.randn(batch, 4, n, 64) for _ in range(3))
    {given}
    begun = time.perf_counter()
    attend(q, k, v, **given)
    took, begun = time.perf_counter() - begun, time.perf_counter()
    attend(q, k, v, **given)
    timed.append((took * 1e3, (time.perf_counter() - begun) * 1e3, counters["stats"]["unique_graphs"]))
print(*(x for one in timed for x in one))
"""
"""A process that times the first and second call of each shape, and counts the graphs compiled so far."""


def _new_shapes(name: str) -> Row:
    """Measure new lengths and batches in one process, on cold caches; recompiles are graphs past the first call's."""
    imports = FIRSTS[name][0]
    first = f"{WINDOW})" if name == "attnc" else "attend = torch.compile(flex_attention)"
    window = "(q >= k) & (q - k < 512)"
    mask = f"create_block_mask(lambda b, h, q, k: {window}, None, None, n, n, device='cpu')"
    attnc_inputs = "given = {}" if name == "attnc" else f"given = {{'block_mask': {mask}}}"
    text = NEW_SHAPES.format(imports=imports, first=first, shapes=SHAPES, given=attnc_inputs)
    with tempfile.TemporaryDirectory() as folder:
        numbers = _said(text, folder)
    calls = [
        {"batch": batch, "n": n, "first_ms": round(numbers[3 * i], 2), "second_ms": round(numbers[3 * i + 1], 2)}
        for i, (batch, n) in enumerate(SHAPES)
    ]
    return {"pattern": "window 512", "calls": calls, "recompiles": int(numbers[-1] - numbers[2])}


def _cold_and_warm(text: str) -> tuple[list[float], list[float]]:
    """Return the numbers that a process prints on empty caches, and then on the caches that it left."""
    with tempfile.TemporaryDirectory() as folder:
        return _said(text, folder), _said(text, folder)


def _said(text: str, folder: str) -> list[float]:
    """Return the numbers in the last line of a process whose caches are in a folder."""
    caches = ("ATTNC_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {**_environment(), **{name: f"{folder}/{name}" for name in caches}}
    done = subprocess.run([sys.executable, "-c", text], check=True, env=environment, capture_output=True, text=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def _process(text: str) -> None:
    subprocess.run([sys.executable, "-c", text], check=True, env=_environment())


def _environment() -> dict[str, str]:
    """Return a user's environment, in which modules are compiled once even if bytecode may not be written here."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
