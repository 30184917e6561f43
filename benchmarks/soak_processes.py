"""A soak test of many processes at once on one cold cache."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from soak_sizes import PATTERNS, SMALL, TIME, CallSize, Row, inputs_of

SOAK = Path(__file__).with_name("soak.py")


def processes(size: CallSize) -> Row:
    """Run many processes at once on empty caches, attnc's and Triton's: each calls every pattern, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(folder)
        command = [sys.executable, str(SOAK), *(["--small"] if size is SMALL else [])]
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
        reports = [json.loads(out.splitlines()[-1]) for out, _ in said if out.strip()]
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
        "calls": sum(int(report["calls"]) for report in reports),
        "tuned": sum(int(report["tuned"]) for report in reports),
        "tuned_by_a_process_on_the_warm_cache": warm["tuned"],
        "entries": state["entries"],
        "left_over": state["parts"],
        "kernels_in_tritons_cache": state["kernels"],
        "failures": failures,
    }


def _environment(folder: str) -> dict[str, str]:
    variables = {"ATTNC_CACHE_DIR": f"{folder}/attnc", "TRITON_CACHE_DIR": f"{folder}/triton", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _state(folder: str) -> dict[str, Any]:
    from attnc.runtime.disk.store import Store

    store = Store(Path(folder) / "attnc" / "v1")
    entries = store.entries()
    triton = Path(folder) / "triton"
    return {
        "entries": len(entries),
        "damaged": [entry.name for entry in entries if entry.payload is None],
        "parts": len(list((Path(folder) / "attnc" / "v1").glob(".part-*"))),
        "kernels": len(list(triton.glob("*/*.cubin"))),
    }


def work(number: int, size: CallSize) -> int:
    """Call every pattern, round by round, forward and backward, and compare with an untuned call; runs in a process."""
    import logging

    import torch

    from attnc import compile_attention

    tuned: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tuned.append(record.getMessage())

    handler = Told()
    logger = logging.getLogger("attnc.runtime.tuning.tuner")
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
            inputs = inputs_of(attend, n, 2, 1, 16, torch.float32)
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
    """Compile a kernel that all processes need, and one that some need, into Triton's shared cache."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return
    from attnc import compile_attention
    from attnc.compiler.kernels.attention_kernels import HeadShape
    from attnc.compiler.kernels.targets import TARGETS
    from attnc.runtime.executors.triton.planner import gpu_planner
    from attnc.runtime.toolchain.compiling import compile_here

    for attention in (compile_attention("causal"), compile_attention("sliding_window", window=40 + number % 2)):
        kernels = gpu_planner(attention._core.planner).kernels(
            HeadShape(64, 64, "float16"), TARGETS["sm_90"], square=True
        )
        compile_here(kernels.forward, "sm_90")
