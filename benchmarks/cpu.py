"""The cpu executor against dense causal SDPA and compiled FlexAttention: forward, and forward with backward.

Dense attention is causal and has no other mask, whatever the pattern: what it would cost not to use one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import as_json, interleaved, once
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnc import compile_attention
from attnc.compiler.planning.build_plan import CallShape, build_plan
from attnc.compiler.planning.plan import Plan
from attnc.compiler.planning.schedule import Choice, Problem, choose, dense_choice
from attnc.runtime.attention import Attention
from attnc.runtime.call import input_tensors
from attnc.runtime.operators import plain
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.tuning.timer import Timing

Row = dict[str, object]


MaskMod = Callable[..., Tensor]
Runs = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """A pattern, for each length, as attnc and as FlexAttention write it."""

    name: str
    attention: Callable[[int], Attention]
    mask_mod: Callable[[int], MaskMod]
    inputs: Callable[[int], dict[str, Any]] = lambda n: {}


def document_ids(n: int) -> Tensor:
    """Eight documents of uneven lengths, (1, n)."""
    weights = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    lengths = weights * n // weights.sum()
    lengths[-1] += n - lengths.sum()
    return torch.repeat_interleave(torch.arange(8), lengths)[None]


def grid_of(n: int) -> tuple[int, int]:
    """Height and width of a picture with n tokens, n a power of two."""
    height = 1 << (n.bit_length() - 1) // 2
    return height, n // height


def _window(width: int, sinks: int) -> Callable[[int], MaskMod]:
    return lambda n: lambda b, h, q, k: (q >= k) & ((q - k < width) | (k < sinks))


def _strided(step: int) -> Callable[[int], MaskMod]:
    return lambda n: lambda b, h, q, k: (q >= k) & ((q - k < step) | ((q - k) % step == 0))


def _power(block: int, window: int) -> Callable[[int], MaskMod]:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        gap = q // block - k // block
        return (q >= k) & ((gap < window) | (gap & (gap - 1) == 0) | (k < block))

    return lambda n: visible


def _dilated(window: int, dilation: int) -> Callable[[int], MaskMod]:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window * dilation) & ((q - k) % dilation == 0)

    return lambda n: visible


def _neighborhood(n: int) -> MaskMod:
    height, width = grid_of(n)

    def near(a: Tensor, b: Tensor, extent: int) -> Tensor:
        first = torch.clamp(a - NEIGHBORS // 2, 0, extent - NEIGHBORS)
        return (b >= first) & (b < first + NEIGHBORS)

    return lambda b, h, q, k: near(q // width, k // width, height) & near(q % width, k % width, width)


def _document(n: int) -> MaskMod:
    doc = document_ids(n)[0]
    return lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k)


def _neighborhood_2d(n: int) -> Attention:
    height, width = grid_of(n)
    return compile_attention("neighborhood_2d", height=height, width=width, window=NEIGHBORS)


def _compiled(spec: str, **params: Any) -> Callable[[int], Attention]:
    return lambda n: compile_attention(spec, **params)


NEIGHBORS = 13
CASES = (
    Case("window 512", _compiled("sliding_window", window=512), _window(512, 0)),
    Case("window 300 + 7 sinks", _compiled("sliding_window", window=300, sinks=7), _window(300, 7)),
    Case("strided 128", _compiled("strided", stride=128), _strided(128)),
    Case("power 256, 5", _compiled("power", block=256, window=5), _power(256, 5)),
    Case("dilated 16 x 64", _compiled("dilated_window", window=16, dilation=64), _dilated(16, 64)),
    Case("neighborhood 13 x 13", _neighborhood_2d, _neighborhood),
    Case("document", _compiled("document"), _document, lambda n: {"doc": document_ids(n)}),
)

HEADS = 4


LONG = 16384
"""From this length on there are fewer rounds, and dense by row blocks and the second dense run, which say little there,
are left out.
"""

AGAIN = 31
"""Rounds of the second look at a row that came out behind; what it says then counts, beside dense against itself."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def rows(
    lengths: list[int],
    head_dims: list[int],
    dtypes: list[torch.dtype],
    rounds: int,
    names: list[str] | None = None,
    *,
    backward: bool = True,
) -> Iterator[Row]:
    """A row for each pattern, length, head dimension, dtype and direction; correctness comes before time."""
    cases = [case for case in CASES if names is None or any(name in case.name for name in names)]
    for n, d, dtype, case in itertools.product(lengths, head_dims, dtypes, cases):
        yield from _rows(case, n, d, dtype, rounds, backward)


def _rows(case: Case, n: int, d: int, dtype: torch.dtype, rounds: int, backward: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    torch.compiler.reset()  # past a few patterns dynamo stops compiling and runs flex unfused
    q, k, v = (torch.randn(1, HEADS, n, d, dtype=dtype, requires_grad=True) for _ in range(3))
    facts: Row = {"pattern": case.name, "n": n, "head_dim": d, "dtype": str(dtype).removeprefix("torch.")}
    inputs, attention = case.inputs(n), case.attention(n)
    ours = partial(attention, q, k, v, **inputs)
    first = {"attnc_first_ms": once(ours)}
    flex, first["flex_first_ms"] = _flex(case, n, q, k, v)
    error = (ours().detach().float() - flex().float()).abs().max().item()
    assert error < TOLERANCE[dtype], f"{facts}: attnc and flex differ by {error}"

    dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    contenders: Runs = {"attnc": ours, "flex": flex, "dense": dense}
    training: Runs = {name: _with_backward(contenders[name], (q, k, v)) for name in ("attnc", "dense")}
    if n < LONG:
        contenders["dense_blocks"], training["dense_blocks"] = _dense_blocks(attention, inputs, q, k, v)
        contenders["dense_again"], training["dense_again"] = dense, training["dense"]  # what noise makes of one
    rounds = max(3, min(rounds, rounds * 4096 // n))
    plan = attention.plan(n, heads=HEADS, head_dim=d, dtype=dtype, **inputs)
    chosen: Row = {"schedule": plan.schedule, "tile": plan.q_tile, "pieces": sum(len(g.pieces) for g in plan.groups)}
    with torch.no_grad():
        times = interleaved(contenders, rounds, 1 if n >= LONG else 2)
        again = _second_look(times, contenders)
    forward = facts | {"direction": "forward", "max_difference": error} | chosen | first | _ratios(times)
    yield forward | _bound(times, plan, n) | again
    if not backward:
        return
    times = interleaved(training, max(rounds // 2, 2), 1)
    again = _second_look(times, training)
    yield facts | {"direction": "forward+backward"} | chosen | _ratios(times) | _bound(times, plan, n) | again


def _second_look(times: dict[str, Timing], contenders: Runs) -> Row:
    """The row measured anew, with more rounds and without flex, where it came out behind dense or its row blocks."""
    if "dense_again" not in times or _least(_ratios(times)) >= 1:
        return {}
    return {"again": _ratios(interleaved({n: run for n, run in contenders.items() if n != "flex"}, AGAIN, 0))}


def _flex(case: Case, n: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], float]:
    """FlexAttention, compiled, and milliseconds of its first call with the block mask that goes before it."""
    compiled = torch.compile(flex_attention, dynamic=False)
    masks: list[Any] = []

    def run() -> Tensor:
        # it refuses inputs that want gradients on a CPU
        result = compiled(q.detach(), k.detach(), v.detach(), block_mask=masks[0])
        assert isinstance(result, Tensor)
        return result

    def first() -> None:
        masks.append(create_block_mask(case.mask_mod(n), None, None, n, n, device="cpu"))
        run()

    return run, once(first)


class _DensePlanner(Planner):
    """Attention by row blocks whose masks are evaluated as they run: what the planner falls back to."""

    def _build(self, shape: CallShape, choice: Callable[[Problem], Choice] = choose) -> Plan:
        return build_plan(relations_of(self.pattern, shape), dense_choice)


def _dense_blocks(
    attention: Attention, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    own = attention._planner
    planner = _DensePlanner(own.text, own.pattern, strict=False)

    def run() -> Tensor:
        return plain.attend(q, k, v, input_tensors(own.pattern, inputs), planner, None, return_lse=False)[0]

    return run, _with_backward(run, (q, k, v))


def _bound(times: dict[str, Timing], plan: Plan, n: int) -> Row:
    """How much of the speed-up over dense that the live tiles allow was reached (tiles in the plan's own order)."""
    tile_pairs = plan.tiles.live / HEADS * plan.q_tile * plan.k_tile
    bound = n * (n + 1) / 2 / tile_pairs
    speedup = times["dense"].median / times["attnc"].median
    return {"tile_bound": round(bound, 3), "of_tile_bound": round(speedup / bound, 3)}


def _with_backward(run: Callable[[], Any], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    def step() -> object:
        out = run()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def _ratios(times: dict[str, Timing]) -> Row:
    ours = times["attnc"].median
    ratios = {f"{name}_over_attnc": round(t.median / ours, 3) for name, t in times.items() if name != "attnc"}
    return {**{f"{name}_ms": as_json(t) for name, t in times.items()}, **ratios}


def summary(rows: list[Row]) -> dict[str, object]:
    """The targets of the suite with what was measured: ahead or behind, and every row that is behind."""
    forward = [row for row in rows if row["direction"] == "forward"]
    single = [row for row in forward if row["dtype"] == "float32"]
    behind = [row for row in rows if _least(row) < 1]
    slow = [row for row in behind if "again" not in row or _least(row["again"]) < 1]
    return {
        "forward vs flex, geometric mean (target 1.5)": _mean(forward),
        "forward vs flex by dtype and width": {
            f"{dtype} d{d}": _mean([r for r in forward if (r["dtype"], r["head_dim"]) == (dtype, d)])
            for dtype, d in sorted({(str(r["dtype"]), int(str(r["head_dim"]))) for r in forward})
        },
        "fp32 forward vs flex, least (target 1.0)": min((_of(r, "flex_over_attnc") for r in single), default=None),
        f"rows behind dense or dense by row blocks at first, of {len(rows)}": len(behind),
        f"forward, behind in {AGAIN} rounds more (target none)": [
            _name(row) for row in slow if row["direction"] == "forward"
        ],
        f"with backward, behind in {AGAIN} rounds more": [_name(row) for row in slow if row["direction"] != "forward"],
        "dense over itself: least, median, most": _spread(
            [
                _of(r, "dense_again_over_attnc") / _of(r, "dense_over_attnc")
                for r in rows
                if "dense_again_over_attnc" in r
            ]
        ),
        "share of the tile bound, fp32, median (aims: forward 0.8, backward 0.7)": {
            direction: statistics.median([_of(r, "of_tile_bound") for r in rows if _is(r, direction)] or [0])
            for direction in ("forward", "forward+backward")
        },
        "first call, ms, medians (attnc, flex)": [
            round(statistics.median(_of(r, f"{name}_first_ms") for r in forward), 1) for name in ("attnc", "flex")
        ],
    }


def _spread(ratios: list[float]) -> list[float]:
    return [round(f(ratios), 3) for f in (min, statistics.median, max)] if ratios else []


def _is(row: Row, direction: str) -> bool:
    return row["direction"] == direction and row["dtype"] == "float32"


def _least(row: Any) -> float:
    """How many times as fast as the better of dense and dense by row blocks."""
    return min(_of(row, "dense_over_attnc"), _of(row, "dense_blocks_over_attnc"))


def _of(row: Row, key: str) -> float:
    """A ratio of a row; infinite where the other was not run."""
    return float(str(row.get(key, "inf")))


def _mean(rows: list[Row]) -> float | None:
    return round(statistics.geometric_mean(_of(r, "flex_over_attnc") for r in rows), 3) if rows else None


def _name(row: Row) -> str:
    last: Any = row.get("again", row)
    dense, blocks = last["dense_over_attnc"], last.get("dense_blocks_over_attnc", "not run")
    itself = round(_of(last, "dense_over_attnc") / _of(last, "dense_again_over_attnc"), 3)
    what = f"{row['pattern']}, n={row['n']}, d={row['head_dim']}, {row['dtype']}, {row['direction']}"
    return f"{what}: dense {dense}×, row blocks {blocks}×; dense itself {itself}×"
