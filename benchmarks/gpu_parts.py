"""Helpers of the parts for a GPU: rows by key, operands, errors, times and graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import timing
import torch
from benchmark_part import Row, Setting
from torch import Tensor

TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Allowed errors, relative to the largest true entry, or to 1 if a check says so."""

L2_BYTES = 256 << 20
"""Bytes written between timed runs, so that each starts without its tensors in the L2 cache."""

MOST_ROUNDS, LEAST_ROUNDS, WARM_UP = 50, 7, 10
SECONDS = 6.0
"""Approximate seconds of a row's timed rounds: slow calls have fewer rounds."""

GRAPHS_BELOW = 1.0
"""Milliseconds below which a timing would measure the host's work instead of the kernels."""

MACHINES = {"H100": "h100", "H200": "h200", "B200": "b200", "A100": "a100"}
"""The simulator's name of a device, by a word in torch's name."""

Run = Callable[[], object]
Todo = Iterable[tuple[str, Callable[[], Row]]]
"""The rows to measure, by key."""


def rows(setting: Setting, todo: Todo) -> Iterator[Row]:
    """Yield the rows that are not measured yet."""
    for key, make in todo:
        if key not in setting.done:
            yield {"key": key, **make()}


def word(dtype: torch.dtype) -> str:
    """Return a dtype as rows name it."""
    return str(dtype).removeprefix("torch.")


def simulated_device(setting: Setting) -> str | None:
    """Return the simulator's name of the device, None if it has none; toy sizes use an H100."""
    if not setting.cuda:
        return "h100"
    name = torch.cuda.get_device_name()
    return next((machine for key, machine in MACHINES.items() if key in name), None)


# --- operands and errors ---------------------------------------------------------------------------------------------


def operands(
    setting: Setting, n: int, dtype: torch.dtype, *, batch: int = 1, heads: tuple[int, int] = (4, 2), d: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v, which require gradients."""
    sizes = (heads[0], heads[1], heads[1])
    q, k, v = (torch.randn(batch, h, n, d, device=setting.device).to(dtype).requires_grad_() for h in sizes)
    return q, k, v


def results(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor, **inputs: Tensor
) -> list[Tensor]:
    """Return out, dq, dk and dv."""
    out = function(*leaves, **inputs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


NAMES = ("out", "dq", "dk", "dv")


def errors(ours: Iterable[Tensor], true: Iterable[Tensor]) -> dict[str, float]:
    """Return the errors of out, dq, dk and dv, relative to the largest true entry or to 1."""
    return {name: gap(x, y, least=1.0) for name, x, y in zip(NAMES, ours, true, strict=False)}


def gap(ours: Tensor, true: Tensor, *, least: float = 1e-30) -> float:
    """Return the largest difference over the largest true entry, or over `least`; infinite for NaN."""
    error = float((ours.detach().double() - true).abs().max() / true.abs().max().clamp(min=least))
    return math.inf if math.isnan(error) else error


def fits(error_by_name: Mapping[str, float], dtype: torch.dtype) -> bool:
    """Return whether errors are within the tolerance of the dtype."""
    return bool(error_by_name) and max(error_by_name.values()) <= TOLERANCE[dtype]


def refusal(run: Callable[[], object]) -> str | None:
    """Return why a rival does not run, in its library's own words; None if it runs."""
    try:
        run()
    except Exception as error:  # libraries raise their own types; the message goes into the row
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


# --- times -----------------------------------------------------------------------------------------------------------


def timed(setting: Setting, runs: Mapping[str, Run], *, graphs: bool = False) -> Row:
    """Time runs in turn: `ms` holds medians with their spread; without CUDA one round.

    `graphs`: short runs may be captured, and `captured` lists them.
    """
    if not setting.cuda:
        return {"ms": {name: timing.as_json(t) for name, t in timing.interleaved(runs, rounds=1, warm_up=0).items()}}
    first = timing.interleaved_on_gpu(runs, 1, 1, L2_BYTES)
    row: Row = {}
    if graphs and min(one.median for one in first.values()) < GRAPHS_BELOW:
        replays = {name: _replayed(run) for name, run in runs.items()}
        row["captured"] = sorted(name for name, run in replays.items() if run is not None)
        runs = {name: replays[name] or run for name, run in runs.items()}
    rounds = rounds_for(sum(one.median for one in first.values()))
    warm_up = WARM_UP if rounds == MOST_ROUNDS else 2
    times = timing.interleaved_on_gpu(runs, rounds, warm_up, L2_BYTES)
    return {"ms": {name: timing.as_json(one) for name, one in times.items()}, **row}


def rounds_for(ms: float) -> int:
    """Return the number of rounds of this duration for which `SECONDS` have time."""
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS * 1e3 / max(ms, 1e-3))))


def median(row: Row, name: str = "attnc") -> float:
    """Return a median of a row."""
    return float(row["ms"][name]["median"])


def ratio(row: Row, name: str) -> float:
    """Return a rival's time divided by attnc's."""
    return median(row, name) / median(row)


def _replayed(run: Run) -> Run | None:
    """Return a replay of a run, None if it cannot be captured."""
    try:
        return captured(run)[0]
    except RuntimeError:  # torch raises this if a capture does not allow an operation
        torch.cuda.synchronize()
        return None


def captured(run: Callable[[], Any], *, warm_up: int = 3) -> tuple[Run, Any]:
    """Return a CUDA graph's replay of a run, and the run's results: the same tensors after every replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no type for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        result = run()
    return recorded.replay, result


def replaying(setting: Setting, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Return the tensors of a run, by a graph; without CUDA by a call."""
    if not setting.cuda:
        return run
    replay, outputs = captured(run)

    def replayed() -> list[Tensor]:
        replay()
        tensors: list[Tensor] = outputs
        return tensors

    return replayed
