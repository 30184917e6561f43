"""Masks on a GPU against FlexAttention, dense attention, NATTEN and FlashAttention: results, then speed.

A row is timed once the results of attnc, and of each rival that has the mask, equal fp64 for some query rows: `out`
and `dq` of these rows, and `dk` and `dv` of all keys for gradients that only these rows have. `bound` is the number
of dense tiles per live tile, `of_bound` the share of it that is reached over attnc's own dense kernel,
`of_dense_rate` the useful work per second over the rate of that kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gpu_cases
import torch
from baselines import flash_attention, flex, natten, published, sdpa
from baselines.rival import Absent, Attend, Mask
from benchmark_part import Row, Setting
from gpu_cases import GpuCase
from gpu_parts import Run, fits, gap, operands, ratio, refusal, rows, simulated_device, timed, word
from torch import Tensor

from attnc import Attention

Direction = Literal["forward", "backward"]

SAMPLED = 48
"""Number of query rows whose results are compared with fp64."""


# --- parts -----------------------------------------------------------------------------------------------------------


def made(setting: Setting, cases: Sequence[GpuCase], direction: Direction) -> Iterator[Row]:
    """Yield a row for each case."""
    dtype = _dtype(setting)
    todo = {case.label(setting, word(dtype), direction): partial(_row, setting, case, direction) for case in cases}
    return rows(setting, todo.items())


def dense_128(setting: Setting) -> Iterator[Row]:
    """Measure dense attention with heads of 128."""
    return made(setting, gpu_cases.dense_cases(128, LENGTHS), "forward")


def dense_64(setting: Setting) -> Iterator[Row]:
    """Measure dense attention with heads of 64."""
    return made(setting, gpu_cases.dense_cases(64, LENGTHS), "forward")


def dense_256(setting: Setting) -> Iterator[Row]:
    """Measure dense attention with heads of 256."""
    return made(setting, gpu_cases.dense_cases(256, LENGTHS), "forward")


def dense_backward(setting: Setting) -> Iterator[Row]:
    """Measure gradients of full and causal attention."""
    cases = (*gpu_cases.dense_cases(128, LENGTHS[2:]), *gpu_cases.dense_cases(64, LENGTHS[2:3]))
    return made(setting, cases, "backward")


def windows_video(setting: Setting) -> Iterator[Row]:
    """Measure NATTEN's unstrided neighbourhoods."""
    return made(setting, gpu_cases.WINDOWS[:3], "forward")


def windows_text(setting: Setting) -> Iterator[Row]:
    """Measure causal windows, powers and documents."""
    return made(setting, gpu_cases.WINDOWS[3:], "forward")


def windows_backward_video(setting: Setting) -> Iterator[Row]:
    """Measure gradients of NATTEN's unstrided neighbourhoods."""
    return made(setting, gpu_cases.WINDOWS[:3], "backward")


def windows_backward_text(setting: Setting) -> Iterator[Row]:
    """Measure gradients of causal windows, powers and documents."""
    return made(setting, gpu_cases.WINDOWS[3:], "backward")


def blocks_video(setting: Setting) -> Iterator[Row]:
    """Measure NATTEN's strided neighbourhoods and sliding tiles."""
    return made(setting, gpu_cases.BLOCK_SPARSE[:5], "forward")


def blocks_other(setting: Setting) -> Iterator[Row]:
    """Measure columns, random blocks and Radial Attention."""
    return made(setting, gpu_cases.BLOCK_SPARSE[5:], "forward")


def blocks_backward_video(setting: Setting) -> Iterator[Row]:
    """Measure gradients of NATTEN's strided neighbourhoods and sliding tiles."""
    return made(setting, gpu_cases.BLOCK_SPARSE[:5], "backward")


def blocks_backward_other(setting: Setting) -> Iterator[Row]:
    """Measure gradients of columns, random blocks and Radial Attention."""
    return made(setting, gpu_cases.BLOCK_SPARSE[5:], "backward")


LENGTHS = (1024, 2048, 4096, 8192)


def _dtype(setting: Setting) -> torch.dtype:
    return torch.float32 if setting.toy else torch.bfloat16


# --- a row -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskRace:
    """The calls of a comparison: `ours` and `alike` give equal results, `dense` is attention without the pattern."""

    ours: Attend
    alike: Mapping[str, Attend]
    dense: Mapping[str, Attend]
    absent: Mapping[str, str]


def _row(setting: Setting, case: GpuCase, direction: Direction) -> Row:
    torch.manual_seed(0)
    flex.forget()
    shape, dtype = case.shape(setting), _dtype(setting)
    q, k, v = operands(setting, shape.n, dtype, batch=shape.batch, heads=shape.heads, d=shape.d)
    inputs = case.given(setting)
    attention, mask = case.attention(setting), case.mask(setting, inputs)
    race = _race(setting, case, attention, mask, inputs, direction)
    row: Row = {"case": case.name, "kind": case.kind, "n": shape.n, "d": shape.d, "heads": shape.heads[0]}
    row |= {"batch": shape.batch, "dtype": word(dtype), "direction": direction, "machine": simulated_device(setting)}
    error_by_name = sampled_errors(race.ours, mask, (q, k, v), gradients=True)
    row |= {"errors": error_by_name, "ok": fits(error_by_name, dtype)}
    if not row["ok"]:
        return row
    race, absent = _right(race, mask, (q, k, v), direction)
    row |= _facts(setting, case, attention, inputs, direction)
    row |= timed(setting, _runs(race, (q, k, v), direction), graphs=direction == "forward")
    row |= {
        "absent": absent,
        "published": [figure.row() for figure in published.figures(case.name, direction, shape.n)],
    }
    return row | _shares(row)


def _race(
    setting: Setting,
    case: GpuCase,
    attention: Attention,
    mask: Mask,
    inputs: Mapping[str, Tensor],
    direction: Direction,
) -> MaskRace:
    ours = partial(called, attention, inputs)

    tried: dict[str, Attend | Absent] = {
        "flex": _flex(setting, mask, direction),
        "natten": natten.attend(mask, setting.device),
        "flash_attention": flash_attention.attend(mask, setting.device),
    }
    rivals: dict[str, Attend | Absent] = {
        f"sdpa_{kernel}": sdpa.attend(kernel, setting.device, causal=case.is_causal) for kernel in ("cudnn", "flash")
    }
    if case.kind == "dense":
        tried, rivals = {**tried, **rivals}, {}
    else:
        rivals["attnc_dense"] = case.dense()
    absent = {name: run.reason for name, run in {**tried, **rivals}.items() if isinstance(run, Absent)}
    here, dense = ({n: run for n, run in some.items() if not isinstance(run, Absent)} for some in (tried, rivals))
    return MaskRace(ours, here, dense, absent)


def called(attention: Any, inputs: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the output of a call with its inputs."""
    out: Tensor = attention(q, k, v, **inputs)
    return out


def _flex(setting: Setting, mask: Mask, direction: Direction) -> Attend | Absent:
    """Return FlexAttention: tuned on a GPU, uncompiled at toy sizes, where only its results count."""
    if direction == "backward" and (refused := flex.trained(setting.device)) is not None:
        return refused
    blocks: list[Any] = []
    reason = refusal(lambda: blocks.append(flex.block_mask(mask, setting.device, compiled=setting.cuda)))
    if reason is not None:
        return Absent(f"no block mask: {reason}")
    return flex.attend(blocks[0], setting.device, tuned=True, compiled=setting.cuda)


def _right(
    race: MaskRace, mask: Mask, leaves: tuple[Tensor, Tensor, Tensor], direction: Direction
) -> tuple[MaskRace, dict[str, str]]:
    """Return the comparison with the rivals that run and are correct, and why others are left out."""
    reasons = {name: _wrong(run, mask, leaves, direction) for name, run in race.alike.items()}
    reasons |= {name: refusal(partial(_once, run, leaves, direction)) for name, run in race.dense.items()}
    absent = {**race.absent, **{name: reason for name, reason in reasons.items() if reason is not None}}
    alike, dense = (
        {name: run for name, run in some.items() if name not in absent} for some in (race.alike, race.dense)
    )
    return MaskRace(race.ours, alike, dense, absent), absent


def _wrong(run: Attend, mask: Mask, leaves: tuple[Tensor, Tensor, Tensor], direction: Direction) -> str | None:
    """Return why a rival is left out: it does not run, or its results differ from fp64."""
    error_by_name: dict[str, float] = {}
    gradients = direction == "backward"
    reason = refusal(lambda: error_by_name.update(sampled_errors(run, mask, leaves, gradients=gradients)))
    if reason is not None or fits(error_by_name, leaves[0].dtype):
        return reason
    return f"its results are wrong: {error_by_name}"


def _once(run: Attend, leaves: tuple[Tensor, Tensor, Tensor], direction: Direction) -> object:
    """Make one call, with its gradient if that is timed."""
    return alone(run, leaves) if direction == "forward" else gradient(run, leaves)()


def _runs(race: MaskRace, leaves: tuple[Tensor, Tensor, Tensor], direction: Direction) -> dict[str, Run]:
    contenders = {"attnc": race.ours, **race.alike, **race.dense}
    if direction == "forward":
        return {name: partial(alone, run, leaves) for name, run in contenders.items()}
    gradients = {name: gradient(run, leaves) for name, run in contenders.items()}
    return {**gradients, "attnc_forward": partial(alone, race.ours, leaves)}


def alone(run: Attend, leaves: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Make a call that records nothing."""
    with torch.no_grad():
        return run(*leaves)


def gradient(run: Attend, leaves: tuple[Tensor, Tensor, Tensor]) -> Run:
    """Return the gradient alone, for an output that is computed once."""
    out = run(*leaves)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


# --- results ----------------------------------------------------------------------------------------------------------


def sampled_errors(
    run: Attend, mask: Mask, leaves: tuple[Tensor, Tensor, Tensor], *, gradients: bool
) -> dict[str, float]:
    """Return the largest relative errors of the first head of the first entry and the last head of the last entry.

    Gradients are for an output gradient that is zero except in the sampled rows: gradients of keys are then exact.
    """
    largest: dict[str, float] = {}
    q, _, v = leaves
    for lane in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        draw = torch.randperm(mask.n, device=q.device)[:SAMPLED].sort().values
        weights = torch.randn(len(draw), v.shape[-1], device=q.device, dtype=torch.float64)
        true = _true(mask, leaves, lane, draw, weights)
        ours = _ours(run, leaves, lane, draw, weights, gradients=gradients)
        for name, x in ours.items():
            largest[name] = max(largest.get(name, 0.0), gap(x, true[name]))
    return largest


def _ours(
    run: Attend,
    leaves: tuple[Tensor, Tensor, Tensor],
    lane: tuple[int, int],
    draw: Tensor,
    weights: Tensor,
    *,
    gradients: bool,
) -> dict[str, Tensor]:
    b, h = lane
    if not gradients:
        return {"out": alone(run, leaves)[b, h, draw]}
    out = run(*leaves)
    grad = torch.zeros_like(out)
    grad[b, h, draw] = weights.to(grad.dtype)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    kv = h * leaves[1].shape[1] // leaves[0].shape[1]
    return {"out": out[b, h, draw], "dq": dq[b, h, draw], "dk": dk[b, kv], "dv": dv[b, kv]}


def _true(
    mask: Mask, leaves: tuple[Tensor, Tensor, Tensor], lane: tuple[int, int], draw: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Compute the rows of one head in fp64: `SAMPLED` × n scores."""
    (b, h), (q, k, v) = lane, leaves
    kv = h * k.shape[1] // q.shape[1]
    operands_of_head = [x.detach().double().requires_grad_() for x in (q[b, h, draw], k[b, kv], v[b, kv])]
    scores = operands_of_head[0] @ operands_of_head[1].T * q.shape[-1] ** -0.5
    if mask.mod is not None:
        entry, head = (torch.tensor(i, device=q.device) for i in lane)
        keys = torch.arange(mask.n, device=q.device)
        scores = scores.masked_fill(~mask.mod(entry, head, draw[:, None], keys[None]), -torch.inf)
    out = scores.softmax(-1) @ operands_of_head[2]
    grads = torch.autograd.grad(out, operands_of_head, weights.to(q.dtype).double())
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


# --- bounds and shares -----------------------------------------------------------------------------------------------


def _facts(
    setting: Setting, case: GpuCase, attention: Attention, inputs: Mapping[str, Tensor], direction: Direction
) -> Row:
    """Return density over dense attention, bound and prediction; nothing if the simulator has no such machine."""
    device, shape = simulated_device(setting), case.shape(setting)
    if device is None:
        return {}
    call: dict[str, Any] = {"heads": shape.heads[0], "kv_heads": shape.heads[1], "batch": shape.batch}
    call |= {"head_dim": shape.d, "dtype": _dtype(setting), "device": device, "stage": direction}
    call |= {"baseline": "causal" if case.is_causal else "full", **{name: x.cpu() for name, x in inputs.items()}}
    simulation = attention.simulate(shape.n, **call)
    bound = simulation.rung("tile").speedup
    facts: Row = {"bound": round(bound, 4), "density": _density(case, shape.n, simulation.density)}
    facts["predicted"] = {"attnc": simulation.predicted_ms, "attnc_dense": simulation.dense_ms}
    return facts | {"full_tiles": round(simulation.tiles.full / simulation.tiles.live, 4)}


def _density(case: GpuCase, n: int, visible: float | None) -> float | None:
    """Return visible pairs over dense attention's pairs, given their share of all pairs."""
    dense = (n + 1) / (2 * n) if case.is_causal else 1.0
    return None if visible is None else visible / dense


def _shares(row: Row) -> Row:
    """Return the shares of the bound and of the dense kernel's rate, both over our dense kernel of the same run."""
    if "attnc_dense" not in row["ms"] or row.get("density") is None:
        return {}
    over = ratio(row, "attnc_dense")
    return {"of_bound": over / row["bound"], "of_dense_rate": over * row["density"]}


# --- deterministic gradients -----------------------------------------------------------------------------------------


def deterministic(setting: Setting) -> Iterator[Row]:
    """Compare gradients with and without torch's deterministic algorithms: their cost, and equal bits."""
    cases = (*gpu_cases.dense_cases(128, LENGTHS[3:]), gpu_cases.WINDOWS[3], gpu_cases.BLOCK_SPARSE[5])
    todo: dict[str, Callable[[], Row]] = {
        case.label(setting, word(_dtype(setting)), "backward"): partial(_deterministic, setting, case) for case in cases
    }
    return rows(setting, todo.items())


def _deterministic(setting: Setting, case: GpuCase) -> Row:
    torch.manual_seed(0)
    shape, dtype, inputs = case.shape(setting), _dtype(setting), case.given(setting)
    leaves = operands(setting, shape.n, dtype, batch=shape.batch, heads=shape.heads, d=shape.d)
    mask = case.mask(setting, inputs)
    runs: dict[str, Run] = {}
    gradients_by_mode: dict[str, list[Tensor]] = {}
    for name, strict in (("attnc", False), ("attnc_deterministic", True)):
        out = called(case.attention(setting, deterministic=strict), inputs, *leaves)
        grad = torch.ones_like(out)
        step = partial(_step, strict, out, leaves, grad)
        gradients_by_mode[name] = [*step(), *step()]
        runs[name] = step
    theirs = {name: flash_attention.attend(mask, setting.device, deterministic=d) for name, d in FLASH.items()}
    absent = {name: run.reason for name, run in theirs.items() if isinstance(run, Absent)}
    for name, run in theirs.items():
        if not isinstance(run, Absent):
            runs[name] = gradient(run, leaves)
    first, again = gradients_by_mode["attnc_deterministic"][:3], gradients_by_mode["attnc_deterministic"][3:]
    same = all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    row: Row = {"case": case.name, "n": shape.n, "d": shape.d, "dtype": word(dtype), "direction": "backward"}
    return {**row, "same_bits": same, "ok": same, "absent": absent, **timed(setting, runs)}


FLASH = {"flash_attention": False, "flash_attention_deterministic": True}


def _step(strict: bool, out: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    torch.use_deterministic_algorithms(strict)
    try:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)
    finally:
        torch.use_deterministic_algorithms(False)
