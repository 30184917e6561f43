"""Recurrences on a GPU: are they right, and how fast beside flash-linear-attention on the shapes of its README?

    python benchmarks/gpu_recurrence.py correct|forward|training|lengths|step|split|tokens [--toy]

Each part takes less than nine minutes and writes `results/gpu-recurrence-<part>.json`. `fla` is timed where the package
is there (OWED.md says how it is carried), after its results were held against ours. Contenders take turns, and every
run begins with an L2 that holds nothing of it. `whole` is a call of `compile_attention`, `kernels` the linear
recurrence alone with rows made before. Above 1 attnc is faster. On a CPU, `TRITON_INTERPRET=1` and `--toy` run every
line of ours at toy sizes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from gpu_parts import L2_BYTES, TOLERANCE
from part import Setting
from torch import Tensor

from attnc import compile_attention
from attnc.compiler import simulation
from attnc.runtime.disk.machine import installed
from attnc.runtime.gpu.recurrent.linear import linear_recurrence
from attnc.runtime.recurrent.linear import Delta
from attnc.runtime.tuning.timer import Timing

Row = dict[str, Any]

ROUNDS, WARM_UP = 15, 3
SHAPES = (
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 1024, 8, 64),
    (8, 2048, 32, 256),
)
"""Batch, tokens, heads, width: flash-linear-attention's README, 22 August 2026."""
APART = SHAPES[-1]
"""Whose gradient takes flash-linear-attention seconds in place of milliseconds: no part of the mean."""
MACHINES = {"H100": "h100-sxm.json", "H200": "h200.json", "B200": "b200.json", "A100": "a100-80.json"}
LENGTHS = (8192, 16384, 32768, 65536, 131072)

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class System:
    """A recurrence of the library; `inputs`: of (B, T, H, D), as flash-linear-attention lays tensors out."""

    name: str
    gates: str
    delta: bool
    module: str
    function: str

    def draw(self, setting: Setting, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensors:
        """q, k, v and inputs (B, T, H, …) that want gradients; keys of length 1, as delta rules need them."""
        batch, tokens, heads, width = shape

        def normal(*sizes: int) -> Tensor:
            return torch.randn(batch, tokens, heads, *sizes, device=setting.device)

        found = {"q": normal(width), "k": F.normalize(normal(width), dim=-1), "v": normal(width)}
        found = {name: x.to(dtype) for name, x in found.items()}
        if self.gates:
            found["g"] = F.logsigmoid(normal(*([width] if self.gates == "rows" else []))) / 16
        if self.delta:
            found["beta"] = normal().sigmoid()
        return {name: x.requires_grad_() for name, x in found.items()}

    def whole(self) -> Run:
        """A call of the library's recurrence."""
        return _called(compile_attention(self.name, backend="triton"))

    def kernels(self, given: Tensors, segments: int | None = None) -> Run:
        """The kernels alone: the scale is multiplied to q before, and a constant gate made."""
        heads, width = given["q"].shape[2:]
        constant = (1 - 2.0 ** (-5 - torch.arange(heads, device=given["q"].device))).log()

        def run(given: Tensors) -> Tensor:
            q, k, v = (given[name].transpose(1, 2) for name in ("q", "k", "v"))
            gate = given["g"].transpose(1, 2) if self.gates else constant
            correction = Delta(given["beta"].transpose(1, 2)) if self.delta else None
            more: dict[str, Any] = {"gate": gate, "correction": correction, "segments": segments}
            return linear_recurrence(q * width**-0.5, k, v, **more)[0].transpose(1, 2)

        return run

    def theirs(self) -> Run | None:
        """flash-linear-attention's, where it is there."""
        try:
            function = getattr(importlib.import_module(self.module), self.function)
        except ImportError:
            return None

        def run(given: Tensors) -> Tensor:
            out: Tensor = function(**given, scale=given["q"].shape[-1] ** -0.5)[0]
            return out

        return run


SYSTEMS = (
    System("retention", "", False, "fla.ops.retention", "chunk_retention"),
    System("gla", "rows", False, "fla.ops.gla", "chunk_gla"),
    System("gated_delta_net", "scalar", True, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    System("kimi_delta", "rows", True, "fla.ops.kda", "chunk_kda"),
)


def main() -> int:
    """Run one part; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="toy sizes, for Triton's interpreter")
    parser.add_argument("--systems", nargs="+", choices=[system.name for system in SYSTEMS])
    parser.add_argument("--out", type=Path, default=None, help="the result file")
    options = parser.parse_args()
    setting = Setting("cuda" if torch.cuda.is_available() and not options.toy else "cpu", options.toy)
    if not (setting.cuda or setting.toy):
        parser.error("there is no GPU: pass --toy, with TRITON_INTERPRET=1")
    torch.manual_seed(0)
    facts = timing.header()
    if setting.cuda:
        facts["device"] = torch.cuda.get_device_name()
    facts["fla"] = installed("fla-core")
    out = options.out or timing.RESULTS / f"gpu-recurrence-{'toy-' if setting.toy else ''}{options.part}.json"
    done: list[Row] = []
    systems = [one for one in SYSTEMS if not options.systems or one.name in options.systems]
    plain = [System("yaad_linear", "", False, "", "")]
    for system in plain if options.part in ALONE else systems:
        for row in PARTS[options.part](setting, system):
            done.append({"system": system.name, **row})
            print(done[-1], flush=True)
            out.parent.mkdir(exist_ok=True)
            whole = {**facts, "means": means(done), "rows": done}
            out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in done if not row.get("ok", True)]
    print(f"{len(done)} rows, {len(wrong)} wrong; means {means(done)}; written to {out}")
    return 1 if wrong else 0


def means(rows: list[Row]) -> dict[str, float]:
    """The geometric mean of each system's ratios to flash-linear-attention, and of all; what stands apart left out."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratio = row.get("fla_over_kernels")
        if isinstance(ratio, float) and tuple(row["shape"]) != APART:
            for name in (str(row["system"]), "all"):
                ratios.setdefault(name, []).append(ratio)
    return {name: round(math.exp(statistics.fmean(map(math.log, found))), 4) for name, found in ratios.items()}


# --- results ---------------------------------------------------------------------------------------------------------


def correct(setting: Setting, system: System) -> Iterator[Row]:
    """Outputs and gradients against the token loop in 64 bits: whole calls and kernels alone, two widths."""
    for dtype in [torch.float32] if setting.toy else list(TOLERANCE):
        for shape in [(1, 19, 2, 16)] if setting.toy else [(2, 200, 4, 64), (1, 333, 4, 128)]:
            given = system.draw(setting, shape, dtype)
            grad = torch.randn(given["v"].shape, device=setting.device)
            wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
            true = _results(_called(compile_attention(system.name, backend="reference")), wide, grad)
            for what, run in {"whole": system.whole(), "kernels": system.kernels(given)}.items():
                found = _errors(_results(run, given, grad), true)
                ok = max(found.values()) <= TOLERANCE[dtype]
                yield {"shape": shape, "dtype": str(dtype), "what": what, "errors": found, "ok": ok}


def _results(run: Run, given: Tensors, grad: Tensor) -> Tensors:
    out = run(given)
    found = torch.autograd.grad(out, list(given.values()), grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": x for name, x in zip(given, found, strict=True)}}


def _errors(ours: Tensors, true: Tensors) -> dict[str, float]:
    """By name, relative to the largest true entry or to 1; infinite for NaN."""
    found = {}
    for name, x in true.items():
        gap = float((ours[name].double() - x).abs().max() / x.abs().max().clamp(min=1))
        found[name] = math.inf if math.isnan(gap) else gap
    return found


# --- timings ---------------------------------------------------------------------------------------------------------


def forward(setting: Setting, system: System) -> Iterator[Row]:
    """Forward alone, nothing recorded."""
    return _timings(setting, system, training=False)


def training(setting: Setting, system: System) -> Iterator[Row]:
    """Forward and backward together."""
    return _timings(setting, system, training=True)


def _timings(setting: Setting, system: System, *, training: bool) -> Iterator[Row]:
    for shape in [(1, 19, 1, 16)] if setting.toy else SHAPES:
        given = system.draw(setting, shape, torch.float32 if setting.toy else torch.bfloat16)
        yield {**_timing(setting, system, given, training=training), "shape": shape}


def _timing(setting: Setting, system: System, given: Tensors, *, training: bool) -> Row:
    runs = {"kernels": system.kernels(given), "whole": system.whole()}
    theirs = system.theirs() if setting.cuda else None
    row: Row = {"training": training}
    if theirs is not None:
        row["difference"] = _errors({"out": theirs(given)}, {"out": runs["kernels"](given).double()})["out"]
        row["ok"] = row["difference"] < 2 * TOLERANCE[torch.bfloat16]
        runs["fla"] = theirs
    moved = sum(given[name].numel() * given[name].element_size() for name in given)
    moved += given["v"].numel() * given["v"].element_size()
    found = _interleaved(setting, runs, given, training=training, copied=moved)
    row |= {name: timing.as_json(one) for name, one in found.items()}
    if "fla" in found:
        row |= {f"fla_over_{name}": found["fla"].median / found[name].median for name in ("kernels", "whole")}
    if not training and given["q"].shape[1] >= 8192:
        row["share_of_copy_speed"] = found["copy"].median / found["kernels"].median
        if setting.cuda and (speed := published_bytes_per_ms(torch.cuda.get_device_name())) is not None:
            row["share_of_hbm"] = moved / speed / found["kernels"].median
    return row


def published_bytes_per_ms(device: str) -> float | None:
    """What the data sheet says of the memory of a GPU that the simulator knows."""
    machine = next((file for word, file in MACHINES.items() if word in device), None)
    if machine is None:
        return None
    text = (Path(simulation.__file__).parent / "machines" / machine).read_text(encoding="utf-8")
    return float(json.loads(text)["figures"]["hbm_tb_per_s"]["value"]) * 1e9


def _interleaved(
    setting: Setting, runs: Mapping[str, Run], given: Tensors, *, training: bool, copied: int
) -> dict[str, Timing]:
    """Milliseconds by CUDA events; `copy` moves so many bytes in all, half of them read."""
    half = torch.empty(copied // 2, dtype=torch.int8, device=setting.device)
    leaves, grad = list(given.values()), torch.randn(given["v"].shape, device=setting.device, dtype=given["v"].dtype)

    def trained(run: Run) -> object:
        return torch.autograd.grad(run(given), leaves, grad)

    def alone(run: Run) -> object:
        with torch.no_grad():
            return run(given)

    steps: dict[str, Callable[[], object]] = {
        name: partial(trained if training else alone, run) for name, run in runs.items()
    }
    steps["copy"] = half.clone
    if not setting.cuda:
        return timing.interleaved(steps, rounds=1, warm_up=0)
    return timing.interleaved_on_gpu(steps, ROUNDS, WARM_UP, L2_BYTES)


def lengths(setting: Setting, system: System) -> Iterator[Row]:
    """Whether tokens per second hold as sequences grow."""
    for tokens in (24, 40) if setting.toy else LENGTHS:
        shape = (1, tokens, 1, 16) if setting.toy else (1, tokens, 16, 128)
        given = system.draw(setting, shape, torch.float32 if setting.toy else torch.bfloat16)
        row = _timing(setting, system, given, training=False)
        per_second = tokens / row["kernels"]["median"] * 1e3
        yield {**row, "shape": shape, "tokens_per_second": per_second}


def step(setting: Setting, system: System) -> Iterator[Row]:
    """A step of generation, one token a sequence: what share of the time a copy of the states takes."""
    for batch in (1,) if setting.toy else (1, 8, 64):
        shape = (batch, 1, 1, 16) if setting.toy else (batch, 1, 32, 128)
        given = system.draw(setting, shape, torch.float32 if setting.toy else torch.bfloat16)
        states = 2 * 4 * batch * shape[2] * shape[3] ** 2
        runs = {"kernels": system.kernels(given), "whole": system.whole()}
        found = _interleaved(setting, runs, given, training=False, copied=states)
        row: Row = {name: timing.as_json(one) for name, one in found.items()}
        yield {**row, "shape": shape, "share_of_copy_speed": found["copy"].median / found["kernels"].median}


def split(setting: Setting, system: System) -> Iterator[Row]:
    """Few heads and a long sequence: as the rule splits it, whole, and in other numbers of segments."""
    for heads in (1,) if setting.toy else (1, 4, 16):
        shape = (1, 200, heads, 16) if setting.toy else (1, 32768, heads, 128)
        given = system.draw(setting, shape, torch.float32 if setting.toy else torch.bfloat16)
        counts = {"rule": None, "whole": 1, **{f"in {n}": n for n in ((2,) if setting.toy else (4, 8, 16))}}
        runs = {name: system.kernels(given, segments) for name, segments in counts.items()}
        whole = {"out": runs["whole"](given).double()}
        gaps = {name: _errors({"out": run(given)}, whole)["out"] for name, run in runs.items()}
        moved = 2 * sum(x.numel() * x.element_size() for x in given.values())
        for training in (False, True):
            found = _interleaved(setting, runs, given, training=training, copied=moved)
            row: Row = {name: timing.as_json(one) for name, one in found.items()}
            ok = max(gaps.values()) <= TOLERANCE[given["q"].dtype]
            yield {**row, "shape": shape, "training": training, "differences": gaps, "ok": ok}


def tokens(setting: Setting, system: System) -> Iterator[Row]:
    """A step equation that has no chunks, by its kernel: right, and how long a token takes."""
    attend, reference = (compile_attention(system.name, backend=backend) for backend in ("triton", "reference"))
    for shape in (
        [(1, 19, 2, 16)] if setting.toy else [(2, 200, 4, 64), (1, 333, 4, 128), (2, 4096, 64, 64), (2, 4096, 64, 128)]
    ):
        given = system.draw(setting, shape, torch.float32) | {
            each: torch.rand(shape[:3], device=setting.device).requires_grad_() for each in ("rate", "hold", "delta")
        }
        runs = {"kernels": _called(attend)}
        row: Row = {"shape": shape}
        if shape[1] < 1000:
            grad = torch.randn(given["v"].shape, device=setting.device)
            wide = {each: x.detach().double().requires_grad_() for each, x in given.items()}
            found = _errors(_results(runs["kernels"], given, grad), _results(_called(reference), wide, grad))
            row |= {"errors": found, "ok": max(found.values()) <= TOLERANCE[torch.float32]}
        for training in (False, True):
            took = _interleaved(setting, runs, given, training=training, copied=1 << 20)["kernels"]
            row["training" if training else "forward"] = timing.as_json(took)
            row["us_a_token" + ("_training" if training else "")] = took.median * 1e3 / shape[1]
        yield row


def _called(attend: Any) -> Run:
    def run(given: Tensors) -> Tensor:
        rest = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
        out: Tensor = attend(*(given[name].transpose(1, 2) for name in ("q", "k", "v")), **rest)
        return out.transpose(1, 2)

    return run


PARTS: Mapping[str, Callable[[Setting, System], Iterator[Row]]] = {
    "correct": correct,
    "forward": forward,
    "training": training,
    "lengths": lengths,
    "step": step,
    "split": split,
    "tokens": tokens,
}
ALONE = frozenset({"tokens"})
"""Parts of a recurrence of their own: run once, whatever systems there are."""

if __name__ == "__main__":
    raise SystemExit(main())
