"""Whether the runtime holds: many processes on one cold cache, processes killed while they write, and thousands of
calls of random shapes. `python benchmarks/soak.py`, see --help; results/soak.json. Status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, object]

PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding_window": {"window": 40, "sinks": 2},
    "dilated_window": {"window": 8, "dilation": 4},
    "strided": {"stride": 16, "local": 24},
    "power": {"window": 2, "block": 16},
    "blocked": {"block": 24},
    "streaming": {"sinks": 4, "window": 48},
    "neighborhood_1d": {"window": 17},
    "alibi": {},
    "prefix_lm": {},
    "document": {},
    "log_sparse": {"segment": 16, "window": 64},
    "combiner": {"segment": 16},
    "moba": {"block": 16, "topk": 3},
    "retention": {},
    "softcap": {},
}
"""Windows, strides, blocks, scores, documents, branches, a choice by content, a recurrence."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    processes: int
    patterns: int
    rounds: int
    kills: int
    calls: int
    of_patterns: int
    longest: int
    launches: int


WHOLE = Size(processes=16, patterns=16, rounds=20, kills=500, calls=10_000, of_patterns=16, longest=700, launches=1_000)
SMALL = Size(processes=3, patterns=5, rounds=2, kills=40, calls=600, of_patterns=4, longest=200, launches=60)
"""What `make test` does."""

TIME = "10s"
"""What a process may measure in, for each bucket that nobody has tuned yet; twenty-five rounds are the most."""


def main() -> int:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="processes, kills, shapes (all)")
    parser.add_argument("--small", action="store_true", help="a hundredth of it, and no result file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SMALL if options.small else WHOLE
    if options.worker is not None:
        return _work(options.worker, size)
    parts = {"processes": processes, "kills": kills, "shapes": shapes}
    if unknown := set(options.part) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    rows = []
    for name in options.part or parts:
        begun = time.perf_counter()
        row = {"part": name, **parts[name](size), "seconds": round(time.perf_counter() - begun, 1)}
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    if not options.small:
        import timing

        timing.save("soak", rows, {**timing.header(), "size": asdict(size)})
    failed = [row["part"] for row in rows if row["failures"]]
    print(f"failed: {', '.join(map(str, failed))}" if failed else "everything held", file=sys.stderr)
    return 1 if failed else 0


# --- many processes on one cold cache --------------------------------------------------------------------------------


def processes(size: Size) -> Row:
    """So many processes at once on empty caches, attnc's and Triton's: each calls every pattern, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(folder)
        command = [sys.executable, __file__, *(["--small"] if size is SMALL else [])]
        begun = [
            subprocess.Popen(
                [*command, "--worker", str(i)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(size.processes)
        ]
        said = [process.communicate() for process in begun]
        failures = [
            f"process {i}: {err[-2000:]}"
            for i, (p, (_, err)) in enumerate(zip(begun, said, strict=True))
            if p.returncode
        ]
        told = [json.loads(out.splitlines()[-1]) for out, _ in said if out.strip()]
        again = subprocess.run(
            [*command, "--worker", "0"], env=environment, capture_output=True, text=True, check=False
        )
        warm = json.loads(again.stdout.splitlines()[-1]) if again.returncode == 0 else {"tuned": None}
        state = _state(folder)
    if warm["tuned"] != 0:
        failures.append(f"a process on the warm cache tuned {warm['tuned']} times: {again.stderr[-2000:]}")
    failures += [f"the entry {name} is damaged" for name in state["damaged"]]
    return {
        "processes": size.processes,
        "calls": sum(int(one["calls"]) for one in told),
        "tuned": sum(int(one["tuned"]) for one in told),
        "tuned_by_a_process_on_the_warm_cache": warm["tuned"],
        "entries": state["entries"],
        "left_over": state["parts"],
        "kernels_in_tritons_cache": state["kernels"],
        "failures": failures,
    }


def _environment(folder: str) -> dict[str, str]:
    own = {"ATTNC_CACHE_DIR": f"{folder}/attnc", "TRITON_CACHE_DIR": f"{folder}/triton", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _state(folder: str) -> dict[str, Any]:
    from attnc.runtime.disk.store import Store

    own = Store(Path(folder) / "attnc" / "v1")
    entries = own.entries()
    triton = Path(folder) / "triton"
    return {
        "entries": len(entries),
        "damaged": [entry.name for entry in entries if entry.payload is None],
        "parts": len(list((Path(folder) / "attnc" / "v1").glob(".part-*"))),
        "kernels": len(list(triton.glob("*/*.cubin"))),
    }


def _work(number: int, size: Size) -> int:
    """A process: every pattern, round by round, forward and backward, held against the same without tuning."""
    import logging

    import torch

    from attnc import compile_attention

    tuned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: tuned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("attnc.runtime.tuning.tune")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    draw = random.Random(number)
    torch.manual_seed(number)
    calls = 0
    names = list(PATTERNS)[: size.patterns]
    for turn in range(size.rounds):
        draw.shuffle(names)
        for name in names:
            attend = compile_attention(name, tune=TIME, **PATTERNS[name])
            plain = compile_attention(name, **PATTERNS[name])
            n = draw.choice((96, 112, 128))
            q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
            inputs = _inputs(attend, n, 2)
            out, want = attend(q, k, v, **inputs), plain(q, k, v, **inputs)
            assert torch.allclose(out, want, atol=1e-4), name
            (gradient,), (wanted,) = torch.autograd.grad(out.sum(), (q,)), torch.autograd.grad(want.sum(), (q,))
            assert torch.allclose(gradient, wanted, atol=1e-3), name
            calls += 1
        if turn == 0:
            _compile_kernels(number)
    count = sum(text.startswith("tuned ") for text in tuned)
    print(json.dumps({"calls": calls, "tuned": count}))
    return 0


def _compile_kernels(number: int) -> None:
    """A kernel that all processes want, and one that some do, into Triton's cache, which all of them share."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return
    from attnc import compile_attention
    from attnc.compiler.kernels.kernels import Heads
    from attnc.compiler.kernels.targets import TARGETS
    from attnc.runtime.gpu.compiling import compile_here

    for attention in (compile_attention("causal"), compile_attention("sliding_window", window=40 + number % 2)):
        kernels = attention._planner.gpu.kernels(Heads(64, 64, "float16"), TARGETS["sm_90"], square=True)
        compile_here(kernels.forward, "sm_90")


def _inputs(attention: Any, n: int, heads: int) -> dict[str, Any]:
    from attnc.runtime.example_inputs import example_inputs

    made = example_inputs(attention.bound, n, n, {}, heads=heads, sizes={"dk": 16, "dv": 16})
    return {name: one.tensor.float() if one.tensor.is_floating_point() else one.tensor for name, one in made.items()}


# --- killed while they write -----------------------------------------------------------------------------------------


def kills(size: Size) -> Row:
    """A process that writes entries, and holds the lock, is killed at a random moment; then all is read. And again.

    Every other one is killed inside of a write: after some of its bytes, or around the renaming.
    """
    from attnc.runtime.disk.store import Store

    draw = random.Random(0)
    failures: list[str] = []
    served = cut_short = 0
    with tempfile.TemporaryDirectory() as folder:
        own = Store(Path(folder) / "v1")
        for i in range(size.kills):
            child = os.fork()
            if child == 0:
                if i % 2:
                    _die_inside(random.Random(i))
                _write_for_ever(own, i)
            if not i % 2:
                time.sleep(draw.uniform(0.002, 0.03))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            for name in NAMES:
                found = own.read("tuned", name)
                served += found is not None
                if found is not None and found["sum"] != _sum(found["text"]):
                    failures.append(f"kill {i}: {name} was served damaged")
            failures += [f"kill {i}: {entry.name}: {entry.damage}" for entry in own.entries() if entry.damage]
            with own.alone(1.0) as alone:
                if not alone:
                    failures.append(f"kill {i}: the lock of a dead process holds")
        assert own.folder is not None
        cut_short = len(list(own.folder.glob(".part-*")))
        if not own.write("tuned", NAMES[0], _payload(0)) or own.read("tuned", NAMES[0]) != _payload(0):
            failures.append("the cache cannot be written any more")
        own.clear()
        left = [path.name for path in own.folder.iterdir() if path.name != ".lock"]
        failures += [f"clear left {name}" for name in left]
    if not (served and cut_short):
        failures.append(f"nothing was tried: {served} entries served, {cut_short} writes cut short")
    return {"kills": size.kills, "entries_served": served, "writes_cut_short": cut_short, "failures": failures[:20]}


NAMES = ("a", "b", "c", "d")


def _write_for_ever(own: Any, seed: int) -> None:
    draw = random.Random(seed)
    while True:
        with own.alone(0.0):
            own.write("tuned", draw.choice(NAMES), _payload(draw.randrange(1 << 30)))


def _die_inside(draw: random.Random) -> None:
    """Let this process be killed in one of its next writes."""
    left, share, where = draw.randrange(3), draw.random(), draw.choice(("bytes", "before", "after"))
    real_open, real_replace = os.fdopen, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Cut:
        """A file that ends in the middle."""

        def __init__(self, handle: int) -> None:
            self.file = real_open(handle, "wb", buffering=0)

        def __enter__(self) -> Cut:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            nonlocal left
            left -= 1
            self.file.write(data[: int(share * len(data))] if left < 0 and where == "bytes" else data)
            if left < 0 and where == "bytes":
                die()

    def replace(part: str, path: str) -> None:
        if left < 0 and where == "before":
            die()
        real_replace(part, path)
        if left < 0 and where == "after":
            die()

    os.fdopen = lambda handle, mode: Cut(handle) if mode == "wb" else real_open(handle, mode)  # type: ignore[assignment]
    os.replace = replace  # type: ignore[assignment]


def _payload(number: int) -> dict[str, str]:
    text = str(number) * random.Random(number).randrange(1, 40_000)
    return {"text": text, "sum": _sum(text)}


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- random shapes ---------------------------------------------------------------------------------------------------

SETTLED = 0.4
"""The share of the calls after which memory must not grow any more."""

ALLOWED_MIB = 48.0
"""What it may grow all the same: the allocator's own unevenness, a fraction of what is kept."""

SHORTEST = 20


def shapes(size: Size) -> Row:
    """Calls of random patterns, lengths, heads and dtypes, forward and backward, and launches of kernels for a GPU."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ["ATTNC_CACHE_DIR"] = folder
        stack.callback(os.environ.pop, "ATTNC_CACHE_DIR", None)
        attends = _attends(size.of_patterns)
        resident = list(_calls(attends, size))
        kernels, binaries = _launched(size)
        kept = _kept(attends)
    settled = [mib for at, mib in resident if at >= SETTLED * size.calls]
    growth = max(settled[-1], settled[len(settled) // 2]) - settled[0]
    failures = []
    if growth > ALLOWED_MIB:
        failures.append(f"memory grew by {growth:.0f} MiB after the first {SETTLED:.0%} of the calls")
    failures += [f"{name}: {count} are kept, {most} may be" for name, (count, most) in kept.items() if count > most]
    if binaries > kernels:
        failures.append(f"{binaries} binaries for {kernels} kernels")
    return {
        "calls": size.calls,
        "resident_mib": [(at, round(mib, 1)) for at, mib in resident],
        "growth_mib_after_settling": round(growth, 1),
        "launches": size.launches,
        "kernels_launched": kernels,
        "variants_launched": binaries,
        "kept": {name: count for name, (count, _) in kept.items()},
        "failures": failures,
    }


def _attends(count: int) -> dict[str, Any]:
    from attnc import compile_attention

    return {name: compile_attention(name, **params) for name, params in list(PATTERNS.items())[:count]}


def _calls(attends: dict[str, Any], size: Size) -> Iterator[tuple[int, float]]:
    """Make calls; the number of calls and the resident memory in MiB, now and then.

    Not in bf16: there torch itself grows with every new shape, in its own attention as in ours (oneDNN keeps a kernel
    for each).
    """
    import torch

    from attnc import compile_attention

    draw = random.Random(0)
    torch.manual_seed(0)
    count = size.calls
    for i in range(count):
        name = draw.choice(list(attends))
        if draw.random() < 0.05:  # patterns come and go
            attends[name] = compile_attention(name, **PATTERNS[name])
        attend, n = attends[name], draw.randrange(SHORTEST, size.longest)
        heads = 2 * draw.randrange(1, 4)
        dtype = draw.choice((torch.float32, torch.float32, torch.float64))
        recorded = draw.random() < 0.5
        batch, dk = draw.randrange(1, 3), draw.choice((8, 16, 24))
        q, k, v = (torch.randn(batch, heads, n, dk, dtype=dtype, requires_grad=recorded) for _ in range(3))
        made = _inputs_of(attend, n, heads, batch, dk, dtype)
        out = attend(q, k, v, **made)
        if recorded:
            out.sum().backward()
        if i % max(count // 40, 1) == 0 or i == count - 1:
            gc.collect()
            yield i + 1, _resident_mib()


def _inputs_of(attend: Any, n: int, heads: int, batch: int, dk: int, dtype: Any) -> dict[str, Any]:
    from attnc.runtime.example_inputs import example_inputs

    made = example_inputs(attend.bound, n, n, {}, batch=batch, heads=heads, sizes={"dk": dk, "dv": dk})
    return {name: x.tensor.to(dtype) if x.tensor.is_floating_point() else x.tensor for name, x in made.items()}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _launched(size: Size) -> tuple[int, int]:
    """Launches of kernels for a GPU that is not there, of random shapes: how many texts, and how many variants of them.

    A variant is what Triton would compile anew: another text, or another type or divisibility of an argument.
    """
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return 0, 0
    import torch

    from attnc import compile_attention
    from attnc.compiler.kernels.targets import TARGETS
    from attnc.runtime.gpu.launch import started_by
    from attnc.runtime.gpu.targets import pretending

    texts: set[str] = set()
    variants: set[tuple[object, ...]] = set()

    def keep(source: Any, grid: object, arguments: Sequence[Any]) -> None:
        texts.add(source.digest)
        told = [_variant(argument, value) for argument, value in zip(source.arguments, arguments, strict=True)]
        variants.add((source.digest, *told))

    draw = random.Random(1)
    names = ("causal", "sliding_window", "blocked", "power", "document", "alibi", "strided")
    attends = {name: compile_attention(name, backend="triton", **PATTERNS[name]) for name in names}
    with pretending(TARGETS["sm_90"]), started_by(keep):
        for _ in range(size.launches):
            attend, n = attends[draw.choice(names)], draw.randrange(SHORTEST, size.longest)
            heads, batch = 2 * draw.randrange(1, 9), draw.randrange(1, 5)
            q, k, v = (torch.zeros(batch, heads, n, 64, dtype=torch.float16, requires_grad=True) for _ in range(3))
            out = attend(q, k, v, **_inputs_of(attend, n, heads, batch, 64, torch.float32))
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return len(texts), len(variants)


def _variant(argument: Any, value: Any) -> object:
    """What Triton compiles anew for: the type of a pointer, and whether it is aligned; of numbers their type alone."""
    if argument.is_number:
        return argument.type
    if hasattr(value, "data_ptr"):
        return str(value.dtype), value.data_ptr() % 16 == 0
    return type(value).__name__, str(getattr(value, "block_shape", ""))


def _kept(attends: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """What is kept in this process, and the most that may be."""
    from attnc.runtime.cpu import program
    from attnc.runtime.gpu import modules
    from attnc.runtime.settings import SETTINGS

    plans = max(len(attend._planner._by_shape) for attend in attends.values())
    held: dict[str, Sized] = {"programs": program._PROGRAMS, "masks": program._MASKS, "layouts": program._LAYOUTS}
    most = {"programs": SETTINGS.plans, "masks": SETTINGS.masks, "layouts": SETTINGS.layouts}
    return {
        "plans of one pattern, at most": (plans, SETTINGS.plans),
        **{name: (len(kept), most[name]) for name, kept in held.items()},
        "bytes of masks": (program._MASKS.weight, SETTINGS.mask_bytes),
        "kernel functions": (len(modules._FUNCTIONS), SETTINGS.kernels),
    }


if __name__ == "__main__":
    raise SystemExit(main())
