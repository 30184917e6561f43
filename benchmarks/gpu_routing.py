"""Attention to selected keys on a GPU: results, waits of the host, and speed against dense attention.

`speed` has the shapes of NSA-Triton's README (64 query heads on 4 kv heads of 128, blocks of 64, the best 8 and 16)
and MoBA's. `attnc` is the whole call, `attnc_choice` the selection alone, by mean keys and for the heads of a group
together; NSA-Triton and flash-linear-attention get the blocks that attnc selected. Gradients are for given blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from baselines import fla, flash_attention, nsa_triton, published, sdpa
from baselines.rival import Absent, Attend, causal
from benchmark_part import Row, Setting
from gpu_masks import alone, gradient
from gpu_parts import (
    TOLERANCE,
    Run,
    errors,
    fits,
    gap,
    median,
    operands,
    ratio,
    refusal,
    rows,
    simulated_device,
    timed,
    word,
)
from torch import Tensor

from attnc import Attention, compile_attention

STEPS = 50

GROUPED = """pattern grouped_blocks(block: int = 64, topk: int = 16)
    align   end
    select chosen
        over   b = k // block
        score  sum(dot(q, mean(b.k)) for head in group)
        from   b.end <= q
        keep   rank < topk - 1
        always q in b
    visible k in chosen and k <= q
"""
"""Selects blocks for the heads of a group together, always including the query's own block."""
SORTED = """pattern sorted_blocks(block: int = 64)
    align   end
    input   h: int[batch, kv_head, token]
    visible order(h)[q] // block == order(h)[k] // block
"""
TEXTS = {"grouped_blocks": GROUPED, "sorted_blocks": SORTED}

LENGTHS = (8192, 16384, 32768, 65536, 131072)


def _attention(name: str, **params: Any) -> Attention:
    return compile_attention(TEXTS.get(name, name), backend="triton", **params)


Given = Callable[[int, torch.device | str], dict[str, Tensor]]


def _nothing(n: int, device: torch.device | str) -> dict[str, Tensor]:
    return {}


def _gates(n: int, device: torch.device | str) -> dict[str, Tensor]:
    return {"gate": torch.rand(1, n, 4, 3, device=device)}


def _indexer(n: int, device: torch.device | str) -> dict[str, Tensor]:
    sizes = {"iq": (1, n, 4, 16), "ik": (1, n, 16), "w": (1, n, 4)}
    return {name: torch.randn(size, device=device) for name, size in sizes.items()}


def _hashes(n: int, device: torch.device | str) -> dict[str, Tensor]:
    return {"h": torch.randint(0, 64, (1, 2, n), device=device)}


def _placed(setting: Setting) -> list[tuple[str, dict[str, Any], Given]]:
    """Return the cases whose blocks are found on the device: strips of a prompt, tokens in the order of hashes."""
    strips = {"block": 10, "stride": 5} if setting.toy else {"block": 50, "stride": 10}
    return [("sorted_blocks", {"block": 16 if setting.toy else 64}, _hashes), ("xattention", strips, _nothing)]


def _asking(setting: Setting) -> list[tuple[str, dict[str, Any], Given]]:
    """Return the cases that select other than blocks of keys: tiles are listed on the device."""
    toy = setting.toy
    slashes = {"columns": 40, "slashes": 60, "block": 8, "probe": 10} if toy else {"columns": 200, "slashes": 300}
    return [
        ("deepseek_sparse", {"topk": 6 if toy else 64}, _indexer),
        ("minference_vertical_slash", slashes, _nothing),
        ("anchor", {"block": 8, "group": 3, "theta": 1} if toy else {"block": 32, "group": 4, "theta": 1}, _nothing),
    ]


@dataclass(frozen=True)
class Chosen:
    """A pattern with selections, its parameters and inputs."""

    name: str
    params: dict[str, Any]
    make: Given = _nothing


def _cases(setting: Setting) -> list[Chosen]:
    small = {"block": 16, "topk": 3}
    blocks = [Chosen("moba", small), Chosen("grouped_blocks", small)]
    placed = [Chosen(*case) for case in (*_placed(setting), *_asking(setting))]
    return [*blocks, Chosen("native_sparse", {**small, "window": 40}, _gates), *placed]


def correct(setting: Setting) -> Iterator[Row]:
    """Yield outputs and gradients against the reference in fp64, compared where both select the same blocks."""
    dtypes = [torch.float32] if setting.toy else list(TOLERANCE)
    todo = {f"{c.name} {word(t)}": partial(_correct, setting, c, t) for c, t in product(_cases(setting), dtypes)}
    return rows(setting, todo.items())


def _correct(setting: Setting, case: Chosen, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    n, width = (70, 16) if setting.toy else (1500, 64)
    attend = _attention(case.name, **case.params)
    leaves = operands(setting, n, dtype, d=width)
    inputs: dict[str, Any] = case.make(n, setting.device)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in leaves)
    true_given: dict[str, Any] = {key: x.cpu() for key, x in inputs.items()}
    true_given = {key: x.double() if x.is_floating_point() else x for key, x in true_given.items()}
    ours, true = attend(*leaves, **inputs), attend.reference(*exact, **true_given)
    assert isinstance(true, Tensor)
    weights = torch.randn_like(true)
    grads = torch.autograd.grad((ours.double().cpu() * weights).sum(), leaves)
    wanted = torch.autograd.grad((true * weights).sum(), exact)
    differing = _differing(attend, (*leaves, inputs), (*exact, true_given)) if attend.pattern.selections else 0.0
    error_by_name = errors((x.cpu() for x in (ours, *grads)), (true.detach(), *wanted))
    row: Row = {"pattern": case.name, "n": n, "d": width, "dtype": word(dtype), "differing": differing}
    ok = fits(error_by_name, dtype) if differing == 0 else dtype != torch.float32 and differing <= DIFFERING
    return {**row, "errors": error_by_name, "ok": ok}


DIFFERING = 0.01
"""The share of selections that may differ for 16-bit scores; beyond it results are not compared."""


def _differing(attend: Attention, *calls: tuple[Any, ...]) -> float:
    """Return the share of selections in which two calls, of q, k, v and inputs, differ."""
    first, second = (attend.chosen(q, k, v, **inputs) for q, k, v, inputs in calls)
    return max(float((x.cpu() != second[key].cpu()).sum() / x.sum().cpu().clamp(min=1)) for key, x in first.items())


def steps(setting: Setting) -> Iterator[Row]:
    """Yield training steps with new selections, in which the host never waits for the device (else torch raises)."""
    moba = Chosen("moba", {"block": 16 if setting.toy else 128})
    grouped = Chosen("grouped_blocks", {"topk": 4})
    placed = [Chosen(*one) for one in (*_placed(setting), *_asking(setting))]
    every = [moba, grouped, *placed]
    return rows(setting, [(one.name, partial(_steps, setting, one)) for one in every[:: 2 if setting.toy else 1]])


def _steps(setting: Setting, case: Chosen) -> Row:
    torch.manual_seed(0)
    n, width, count = (60, 16, 1) if setting.toy else (4000, 128, STEPS)
    attend = _attention(case.name, **case.params)
    drawn = [operands(setting, n, torch.float32, d=width) for _ in range(count + 2)]
    inputs: dict[str, Any] = case.make(n, setting.device)
    grad = torch.randn(1, 4, n, width, device=setting.device)
    for leaves in drawn[:2]:
        torch.autograd.grad(attend(*leaves, **inputs), leaves, grad)
    waits = ""
    if setting.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for leaves in drawn[2:]:
            torch.autograd.grad(attend(*leaves, **inputs), leaves, grad)
    except RuntimeError as error:
        waits = str(error)
    finally:
        if setting.cuda:
            torch.cuda.set_sync_debug_mode("default")
    return {"pattern": case.name, "steps": count, "watched": setting.cuda, "waits": waits, "ok": not waits}


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutingRace:
    """A pattern that selects blocks, and the shape at which it is timed."""

    name: str
    pattern: str
    params: dict[str, int]
    batch: int = 1
    heads: tuple[int, int] = (64, 4)
    d: int = 128
    toy: dict[str, int] = field(default_factory=lambda: {"block": 16, "topk": 2})


TOP8 = RoutingRace("top-8", "grouped_blocks", {"block": 64, "topk": 8})
TOP16 = RoutingRace("top-16", "grouped_blocks", {"block": 64, "topk": 16})
MOBA = RoutingRace("moba top-8", "moba", {"block": 128, "topk": 8}, 2, (16, 16))


def speed_16(setting: Setting) -> Iterator[Row]:
    """Measure the best 16 blocks, forward."""
    return _timings(setting, TOP16, "forward")


def speed_8(setting: Setting) -> Iterator[Row]:
    """Measure the best 8 blocks, forward."""
    return _timings(setting, TOP8, "forward")


def gradients(setting: Setting) -> Iterator[Row]:
    """Measure gradients of the best 16 and 8 blocks."""
    yield from _timings(setting, TOP16, "backward")
    yield from _timings(setting, TOP8, "backward")


def moba(setting: Setting) -> Iterator[Row]:
    """Measure MoBA in both directions."""
    yield from _timings(setting, MOBA, "forward")
    yield from _timings(setting, MOBA, "backward")


def _timings(setting: Setting, race: RoutingRace, direction: str) -> Iterator[Row]:
    lengths = (48,) if setting.toy else LENGTHS
    todo = {f"{race.name} n={n} {direction}": partial(_timing, setting, race, n, direction) for n in lengths}
    return rows(setting, todo.items())


def _timing(setting: Setting, race: RoutingRace, n: int, direction: str) -> Row:
    torch.manual_seed(0)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    heads, d = ((2, 1), 16) if setting.toy else (race.heads, race.d)
    params = race.toy if setting.toy else race.params
    leaves = operands(setting, n, dtype, batch=race.batch, heads=heads, d=d)
    attend = _attention(race.pattern, **params)
    taken = attend.chosen(*(x.detach() for x in leaves))["chosen"]
    row: Row = {"case": race.name, "n": n, "d": d, "heads": heads[0], "kv_heads": heads[1], "batch": race.batch}
    row |= {"dtype": word(dtype), "direction": direction, "machine": simulated_device(setting), **params}
    error_by_name = {"out": _sampled_error(attend, leaves, taken, params["block"])}
    row |= {"errors": error_by_name, "ok": fits(error_by_name, dtype)}
    if not row["ok"]:
        return row
    rivals, absent = _rivals(setting, race, leaves, taken, params, direction)
    runs: dict[str, Attend] = {"attnc": partial(_called, attend), **rivals}
    steps_: dict[str, Run] = {name: _step(run, leaves, direction) for name, run in runs.items()}
    if direction == "forward":
        steps_["attnc_choice"] = partial(attend.chosen, *(x.detach() for x in leaves))
    row |= {"absent": absent, **timed(setting, steps_)}
    row["published"] = [figure.row() for figure in _published(race, direction, n)]
    return row | _derived(setting, row, attend)


def _called(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def _published(race: RoutingRace, direction: str, n: int) -> list[published.Published]:
    if race is MOBA:
        return []
    return [*published.figures(race.name, direction, n), *published.figures("dense", direction, n)]


def _derived(setting: Setting, row: Row, attend: Attention) -> Row:
    """Return ratios to the best dense kernel, the selection's share, and the simulator's prediction."""
    dense = [name for name in row["ms"] if name.startswith(("sdpa", "flash"))]
    ratios: Row = {"dense_over_attnc": min(ratio(row, name) for name in dense)}
    if "attnc_choice" in row["ms"]:
        ratios["choice_share"] = median(row, "attnc_choice") / median(row)
    if (device := simulated_device(setting)) is not None:
        sizes: dict[str, Any] = {"heads": row["heads"], "kv_heads": row["kv_heads"], "batch": row["batch"]}
        sizes |= {"head_dim": row["d"], "dtype": getattr(torch, row["dtype"]), "device": device}
        stage: Any = row["direction"]
        simulated = attend.simulate(row["n"], stage=stage, baseline="causal", **sizes)
        ratios["predicted"] = {"attnc": simulated.predicted_ms}
    return ratios


ROWS = 48
"""Number of query rows whose output is compared with fp64 for given selections."""


def _sampled_error(attend: Attention, leaves: tuple[Tensor, Tensor, Tensor], taken: Tensor, block: int) -> float:
    """Return the error of the last head, whose rows see their selected blocks, up to the query."""
    q, k, v = (x.detach() for x in leaves)
    n = q.shape[2]
    draw = torch.randperm(n, device=q.device)[:ROWS]
    keys = torch.arange(n, device=q.device)
    seen = taken[-1, -1, draw][:, keys // block] & (keys[None] <= draw[:, None])
    scores = q[-1, -1, draw].double() @ k[-1, -1].double().T * q.shape[-1] ** -0.5
    true = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[-1, -1].double()
    with torch.no_grad():
        return gap(attend(q, k, v)[-1, -1, draw], true)


def _rivals(
    setting: Setting,
    race: RoutingRace,
    leaves: tuple[Tensor, Tensor, Tensor],
    taken: Tensor,
    params: dict[str, int],
    direction: str,
) -> tuple[dict[str, Attend], dict[str, str]]:
    """Return dense attention and the kernels that take given blocks: those that run, and why others do not."""
    q, k, v = (x.detach() for x in leaves)
    tried: dict[str, Attend | Absent] = {
        "sdpa_cudnn": sdpa.attend("cudnn", setting.device, causal=True),
        "sdpa_flash": sdpa.attend("flash", setting.device, causal=True),
        "flash_attention": flash_attention.attend(causal(q.shape[2]), setting.device),
    }
    if race is not MOBA:
        places = nsa_triton.places(taken[0], params["topk"])
        tried["nsa_triton"] = nsa_triton.attend(places, params["block"], setting.device)
        tried["fla"] = fla.blocks(places.transpose(0, 1)[None], params["block"])
    with torch.no_grad():
        ours = _called(_attention(race.pattern, **params), q, k, v).double()
    here: dict[str, Attend] = {}
    absent: dict[str, str] = {}
    for name, run in tried.items():
        if isinstance(run, Absent):
            absent[name] = run.reason
        elif reason := _refusal(run, leaves, direction, ours if name in GIVEN else None):
            absent[name] = reason
        else:
            here[name] = run
    return here, absent


GIVEN = ("nsa_triton", "fla")
"""Rivals that take attnc's selected blocks, so that their results must equal attnc's."""


def _refusal(run: Attend, leaves: tuple[Tensor, Tensor, Tensor], direction: str, ours: Tensor | None) -> str | None:
    """Return why a rival is left out: it does not run, or its results differ from attnc's."""
    reason = refusal(partial(_once, run, leaves, direction))
    if reason is not None or ours is None:
        return reason
    error = gap(alone(run, leaves), ours)
    return None if error <= 2 * TOLERANCE[leaves[0].dtype] else f"its results differ by {error}"


def _once(run: Attend, leaves: tuple[Tensor, Tensor, Tensor], direction: str) -> object:
    return _step(run, leaves, direction)()


def _step(run: Attend, leaves: tuple[Tensor, Tensor, Tensor], direction: str) -> Run:
    """Return a call without gradients, or the gradient alone for an output that is computed once."""
    return partial(alone, run, leaves) if direction == "forward" else gradient(run, leaves)
