"""Recurrences on a GPU: results against the token loop, and speed against flash-linear-attention and others.

`attnc` is a call of `compile_attention`, `attnc_kernels` the linear recurrence alone with prepared rows. Rivals are
compared with attnc's results first. A copy of the bytes read and written is timed in the same run, and `of_hbm` is the
share of the memory's published speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from baselines import fla, lightning, mamba, published
from baselines.fla import Run
from baselines.rival import Absent, Attend
from benchmark_part import Row, Setting
from gpu_parts import TOLERANCE, fits, gap, median, refusal, rows, simulated_device, timed, word
from torch import Tensor

from attnc import compile_attention
from attnc.compiler import simulation
from attnc.runtime.executors.recurrent.linear_inputs import Delta
from attnc.runtime.executors.triton.recurrent.linear_on_gpu import linear_recurrence

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
"""A shape for which flash-linear-attention's gradient takes seconds, left out of the mean."""
LENGTHS = (8192, 16384, 32768, 65536, 131072)
LIGHTNING = ((4, 8192, 32, 128), (4, 32768, 32, 128))
"""The shapes in Lightning Attention-2's README."""
SSD = ((8, 4096, 64, 64), (1, 32768, 64, 64))

Shape = tuple[int, int, int, int]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class System:
    """A recurrence of the library; `gates`: "rows", "scalar" or "", a constant decay; `delta`: it has a delta rule."""

    name: str
    gates: str = ""
    delta: bool = False
    stepped: bool = False
    """Whether the recurrence has a step size, as SSD has."""

    def draw(self, setting: Setting, shape: Shape, dtype: torch.dtype) -> Tensors:
        """Draw q, k, v and inputs (B, T, H, …), which require gradients; keys have length 1, as delta rules need."""
        batch, tokens, heads, width = shape

        def normal(*sizes: int) -> Tensor:
            return torch.randn(batch, tokens, heads, *sizes, device=setting.device)

        tensors = {"q": normal(width), "k": F.normalize(normal(width), dim=-1), "v": normal(width)}
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
        if self.stepped:
            tensors["dt"] = F.softplus(normal() - 3)
        elif self.gates:
            tensors["g"] = F.logsigmoid(normal(*([width] if self.gates == "rows" else []))) / 16
        if self.delta:
            tensors["beta"] = normal().sigmoid()
        return {name: x.requires_grad_() for name, x in tensors.items()}

    def decay(self, heads: int, device: str) -> Tensor:
        """Return constant log-decays by head: the retention's, the library's for Lightning, and A of SSD."""
        place = torch.arange(heads, device=device)
        if self.name == "retention":
            return (1 - 2.0 ** (-5 - place)).log()
        if self.stepped:
            return -(1 + place / heads)
        if heads & (heads - 1):
            raise ValueError(f"{heads} heads: ALiBi's slopes are written here for powers of two")
        return -(2.0 ** (-8 * (place + 1) / heads)) * (1 + 1e-5)

    def called(self, backend: Any = "triton") -> Run:
        """Return a call of the library's recurrence."""
        return partial(_called, self, compile_attention(self.name, backend=backend))

    def kernels(self, tensors: Mapping[str, Tensor], segments: int | None = None) -> Run:
        """Return a call of the kernels alone: the scale is multiplied into q, and a constant gate is prepared."""
        heads, width = tensors["q"].shape[2:]
        constant = self.decay(heads, str(tensors["q"].device))

        def run(tensors: Mapping[str, Tensor]) -> Tensor:
            q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
            gate = tensors["g"].transpose(1, 2) if self.gates else constant
            correction = Delta(tensors["beta"].transpose(1, 2)) if self.delta else None
            more: dict[str, Any] = {"gate": gate, "correction": correction, "segments": segments}
            out: Tensor = linear_recurrence(q * width**-0.5, k, v, **more)[0]
            return out.transpose(1, 2)

        return run

    def rivals(self, tensors: Mapping[str, Tensor]) -> dict[str, Run | Absent]:
        """Return flash-linear-attention, and the authors' own kernels."""
        decay = self.decay(tensors["q"].shape[2], str(tensors["q"].device)).float()
        if self.name == "lightning":
            authors_call = lightning.attend(decay, tensors["q"].device.type)
            authors = authors_call if isinstance(authors_call, Absent) else partial(heads_first, authors_call)
            return {"fla": fla.recurrence(self.name, scale=1.0, decay=decay), "lightning": authors}
        if self.stepped:
            return {"fla": _with_gate(fla.recurrence(self.name, scale=1.0), decay), "mamba": mamba.recurrence(decay)}
        return {"fla": fla.recurrence(self.name)}


RETENTION, GLA = System("retention"), System("gla", "rows")
SYSTEMS = (RETENTION, GLA, System("gated_delta_net", "scalar", True), System("kimi_delta", "rows", True))
OWN = (System("lightning"), System("mamba2_ssd", "scalar", stepped=True))
"""Recurrences whose authors publish kernels."""


def _called(system: System, attend: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    rest = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    if system.stepped:
        heads, device = tensors["q"].shape[2], tensors["q"].device
        rest["g"] = rest["dt"] * system.decay(heads, str(device)).to(rest["dt"].dtype)
        rest["D"] = torch.zeros(heads, device=device, dtype=rest["dt"].dtype)
    out: Tensor = attend(*(tensors[name].transpose(1, 2) for name in ("q", "k", "v")), **rest)
    return out.transpose(1, 2)


def heads_first(run: Attend, tensors: Mapping[str, Tensor]) -> Tensor:
    """Pass rows as (batch, heads, tokens, width) to a kernel that takes this layout."""
    q, k, v = (tensors[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
    return run(q, k, v).transpose(1, 2)


def _with_gate(run: Run | Absent, decay: Tensor) -> Run | Absent:
    """Return a run with the log-decay of SSD, dt · A."""
    if isinstance(run, Absent):
        return run
    return lambda tensors: run({**tensors, "g": tensors["dt"] * decay})


# --- results ---------------------------------------------------------------------------------------------------------


def correct(setting: Setting) -> Iterator[Row]:
    """Yield outputs and gradients against the token loop in fp64: whole calls and kernels alone, two widths."""
    dtypes = [torch.float32] if setting.toy else list(TOLERANCE)
    shapes = [(1, 19, 2, 16)] if setting.toy else [(2, 200, 4, 64), (1, 333, 4, 128)]
    todo = {}
    for system, dtype, shape in product((*SYSTEMS, *OWN), dtypes, shapes):
        for what in ("attnc", "kernels") if system in SYSTEMS else ("attnc",):
            key = f"{system.name} {what} d={shape[3]} {word(dtype)}"
            todo[key] = partial(_correct, setting, system, what, shape, dtype)
    return rows(setting, todo.items())


def _correct(setting: Setting, system: System, what: str, shape: Shape, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    tensors = system.draw(setting, shape, dtype)
    grad = torch.randn(tensors["v"].shape, device=setting.device)
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    true = _results(system.called("reference"), wide, grad)
    run = system.called() if what == "attnc" else system.kernels(tensors)
    error_by_name = _errors(_results(run, tensors, grad), true)
    row: Row = {"system": system.name, "what": what, "shape": shape, "dtype": word(dtype)}
    return {**row, "errors": error_by_name, "ok": fits(error_by_name, dtype)}


def _results(run: Run, tensors: Tensors, grad: Tensor) -> Tensors:
    out = run(tensors)
    gradients = torch.autograd.grad(out, list(tensors.values()), grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": x for name, x in zip(tensors, gradients, strict=True)}}


def _errors(ours: Tensors, true: Tensors) -> dict[str, float]:
    return {name: gap(ours[name], x, least=1.0) for name, x in true.items()}


# --- timings ---------------------------------------------------------------------------------------------------------


def forward_gates(setting: Setting) -> Iterator[Row]:
    """Measure the forward without recording: retention and GLA."""
    return _timings(setting, SYSTEMS[:2], SHAPES, training=False)


def forward_delta(setting: Setting) -> Iterator[Row]:
    """Measure the forward of the delta rules."""
    return _timings(setting, SYSTEMS[2:], SHAPES, training=False)


def training_gates(setting: Setting) -> Iterator[Row]:
    """Measure forward and backward together: retention and GLA."""
    return _timings(setting, SYSTEMS[:2], SHAPES, training=True)


def training_delta(setting: Setting) -> Iterator[Row]:
    """Measure forward and backward of the delta rules."""
    return _timings(setting, SYSTEMS[2:], SHAPES, training=True)


def authors(setting: Setting) -> Iterator[Row]:
    """Measure Lightning attention and SSD against their authors' kernels, in both directions."""
    for system, shapes in zip(OWN, (LIGHTNING, SSD), strict=True):
        yield from _timings(setting, (system,), shapes, training=False)
        yield from _timings(setting, (system,), shapes, training=True)


def lengths(setting: Setting) -> Iterator[Row]:
    """Measure whether tokens per second hold as sequences grow."""
    return _timings(setting, (RETENTION, GLA), [(1, tokens, 16, 128) for tokens in LENGTHS], training=False)


def _timings(
    setting: Setting, systems: tuple[System, ...], shapes: tuple[Shape, ...] | list[Shape], *, training: bool
) -> Iterator[Row]:
    todo = {}
    for system, shape in product(systems, [(1, 19, 1, 16)] if setting.toy else shapes):
        size = "×".join(map(str, shape))
        key = f"{system.name} {size} {'forward+backward' if training else 'forward'}"
        todo[key] = partial(_timing, setting, system, shape, training=training)
    return rows(setting, todo.items())


def _timing(setting: Setting, system: System, shape: Shape, *, training: bool) -> Row:
    torch.manual_seed(0)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    tensors = system.draw(setting, shape, dtype)
    direction = "forward+backward" if training else "forward"
    name = system.name if system in OWN[:1] else f"{system.name} {'×'.join(map(str, shape))}"
    row: Row = {"case": name, "system": system.name, "shape": shape, "n": shape[1], "d": shape[3]}
    row |= {"dtype": word(dtype), "direction": direction, "apart": shape == APART}
    ours = system.called()
    runs: dict[str, Run] = (
        {"attnc": ours} if system in OWN else {"attnc": ours, "attnc_kernels": system.kernels(tensors)}
    )
    true = _alone(ours, tensors).double()
    error_by_run = {name: gap(_alone(run, tensors), true) for name, run in runs.items()}
    first = _first_tokens_error(system, tensors, true)
    row |= {
        "errors": {**error_by_run, "first tokens": first},
        "ok": fits({**error_by_run, "first tokens": first}, dtype),
    }
    if not row["ok"]:
        return row
    rivals, absent = _right(system, tensors, true, training=training)
    moved = _moved(tensors)
    steps = _steps({**runs, **rivals}, tensors, training=training)
    half = torch.empty(moved // 2, dtype=torch.int8, device=setting.device)
    row |= {"absent": absent, "moved_bytes": moved, **timed(setting, {**steps, "copy": half.clone})}
    row["published"] = [figure.row() for figure in published.figures(name, direction, shape[1])]
    return row | _rates(setting, row)


FIRST = 256
"""Tokens of the first batch entry that are compared with the token loop."""


def _first_tokens_error(system: System, tensors: Mapping[str, Tensor], true: Tensor) -> float:
    """Return the error of a call's first tokens, as a recurrence does not depend on the length of the sequence."""
    first = {name: x.detach()[:1, :FIRST].double() for name, x in tensors.items()}
    return gap(true[:1, :FIRST], _alone(system.called("reference"), first))


def _alone(run: Run, tensors: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return run(tensors)


def _right(system: System, tensors: Tensors, true: Tensor, *, training: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the rivals that run here and give equal results, and why the others do not."""
    here: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for name, run in system.rivals(tensors).items():
        if isinstance(run, Absent):
            absent[name] = run.reason
            continue
        if reason := _refusal(run, tensors, true, training=training):
            absent[name] = reason
        else:
            here[name] = run
    return here, absent


def _refusal(run: Run, tensors: Tensors, true: Tensor, *, training: bool) -> str | None:
    """Return why a rival is left out: it does not run, or its results differ from attnc's."""
    (step,) = _steps({"rival": run}, tensors, training=training).values()
    reason = refusal(step)
    if reason is not None:
        return reason
    error = gap(_alone(run, tensors), true)
    return None if error <= 2 * TOLERANCE[tensors["q"].dtype] else f"its results differ by {error}"


def _steps(runs: Mapping[str, Run], tensors: Tensors, *, training: bool) -> dict[str, Callable[[], object]]:
    leaves, grad = list(tensors.values()), torch.randn_like(tensors["v"])

    def trained(run: Run) -> object:
        return torch.autograd.grad(run(tensors), leaves, grad, allow_unused=True)

    return {name: partial(trained, run) if training else partial(_alone, run, tensors) for name, run in runs.items()}


def _moved(tensors: Mapping[str, Tensor]) -> int:
    """Return the minimum number of bytes that a forward reads and writes."""
    input_bytes = sum(x.numel() * x.element_size() for x in tensors.values())
    return input_bytes + tensors["v"].numel() * tensors["v"].element_size()


def _rates(setting: Setting, row: Row) -> Row:
    """Return tokens per second and, for the forward, the share of a copy's speed and of the memory's."""
    best = "attnc_kernels" if "attnc_kernels" in row["ms"] else "attnc"
    rates: Row = {"tokens_per_second": row["shape"][0] * row["n"] / median(row, best) * 1e3}
    if row["direction"] == "forward":
        rates["of_copy_speed"] = median(row, "copy") / median(row, best)
        if setting.cuda and (speed := published_bytes_per_ms(simulated_device(setting))) is not None:
            rates["of_hbm"] = row["moved_bytes"] / speed / median(row, best)
    return rates


FILES = {"h100": "h100-sxm.json", "h200": "h200.json", "b200": "b200.json", "a100": "a100-80.json"}


def published_bytes_per_ms(device: str | None) -> float | None:
    """Return the memory rate in the data sheet of a machine of the simulator; None for None."""
    if device is None:
        return None
    text = (Path(simulation.__file__).parent / "machines" / FILES[device]).read_text(encoding="utf-8")
    return float(json.loads(text)["figures"]["hbm_tb_per_s"]["value"]) * 1e9


# --- steps, splits and kernels of tokens -----------------------------------------------------------------------------


def step(setting: Setting) -> Iterator[Row]:
    """Measure a step of generation, one token per sequence, against a copy of the states."""
    batches = (1,) if setting.toy else (1, 8, 64)
    todo = {f"{system.name} step {b}": partial(_step, setting, system, b) for system, b in product(SYSTEMS, batches)}
    return rows(setting, todo.items())


def _step(setting: Setting, system: System, batch: int) -> Row:
    torch.manual_seed(0)
    shape = (batch, 1, 1, 16) if setting.toy else (batch, 1, 32, 128)
    tensors = system.draw(setting, shape, torch.float32 if setting.toy else torch.bfloat16)
    states = 2 * 4 * batch * shape[2] * shape[3] ** 2
    runs = {"attnc": system.called(), "attnc_kernels": system.kernels(tensors)}
    half = torch.empty(states // 2, dtype=torch.int8, device=setting.device)
    row: Row = {"case": f"{system.name} step", "system": system.name, "shape": shape, "direction": "forward"}
    row |= timed(setting, {**_steps(runs, tensors, training=False), "copy": half.clone}, graphs=True)
    return row | {"of_copy_speed": median(row, "copy") / median(row, "attnc_kernels")}


def split(setting: Setting) -> Iterator[Row]:
    """Measure few heads and a long sequence: split by the rule, unsplit, and in other numbers of segments."""
    todo = {}
    systems = SYSTEMS[:1] if setting.toy else SYSTEMS
    for system, heads, training in product(systems, (1,) if setting.toy else (1, 4, 16), (False, True)):
        shape = (1, 130, heads, 16) if setting.toy else (1, 32768, heads, 128)
        key = f"{system.name} {heads} heads {'forward+backward' if training else 'forward'}"
        todo[key] = partial(_split, setting, system, shape, training=training)
    return rows(setting, todo.items())


def _split(setting: Setting, system: System, shape: Shape, *, training: bool) -> Row:
    torch.manual_seed(0)
    tensors = system.draw(setting, shape, torch.float32 if setting.toy else torch.bfloat16)
    counts = {"attnc": None, "attnc_whole": 1, **{f"attnc_in_{n}": n for n in ((2,) if setting.toy else (4, 8, 16))}}
    runs = {name: system.kernels(tensors, segments) for name, segments in counts.items()}
    whole = _alone(runs["attnc_whole"], tensors).double()
    error_by_count = {name: gap(_alone(run, tensors), whole) for name, run in runs.items()}
    direction = "forward+backward" if training else "forward"
    row: Row = {"case": f"{system.name} split", "system": system.name, "shape": shape, "direction": direction}
    row |= {"errors": error_by_count, "ok": fits(error_by_count, tensors["q"].dtype)}
    return row | timed(setting, _steps(runs, tensors, training=training))


def tokens(setting: Setting) -> Iterator[Row]:
    """Measure a step equation without a chunk form by its kernel: results, and the time of a token."""
    small = [(1, 19, 2, 16)] if setting.toy else [(2, 200, 4, 64), (1, 333, 4, 128)]
    large = [] if setting.toy else [(2, 4096, 64, 64), (2, 4096, 64, 128)]
    todo = {f"yaad_linear {'×'.join(map(str, s))}": partial(_tokens, setting, s, s in small) for s in (*small, *large)}
    return rows(setting, todo.items())


def _tokens(setting: Setting, shape: Shape, held: bool) -> Row:
    torch.manual_seed(0)
    system = System("yaad_linear")
    tensors = system.draw(setting, shape, torch.float32) | {
        each: torch.rand(shape[:3], device=setting.device).requires_grad_() for each in ("rate", "hold", "delta")
    }
    row: Row = {"case": "yaad_linear", "shape": shape, "n": shape[1], "d": shape[3]}
    if held:
        grad = torch.randn(tensors["v"].shape, device=setting.device)
        wide = {each: x.detach().double().requires_grad_() for each, x in tensors.items()}
        error_by_name = _errors(
            _results(system.called(), tensors, grad), _results(system.called("reference"), wide, grad)
        )
        row |= {"errors": error_by_name, "ok": fits(error_by_name, torch.float32)}
    for training in (False, True):
        steps = _steps({"attnc": system.called()}, tensors, training=training)
        timing = timed(setting, steps)["ms"]["attnc"]
        row.setdefault("ms", {})["attnc_training" if training else "attnc"] = timing
    return row | {"us_a_token": {name: one["median"] * 1e3 / shape[1] for name, one in row["ms"].items()}}
