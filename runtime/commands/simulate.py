"""`attnc simulate`: how fast a pattern can be on a machine, before anything runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isinf
from typing import Any, Literal, cast

import torch
from torch import Tensor

from attnc.compiler.growth.growth import Growth
from attnc.compiler.simulation.machine import MachineError
from attnc.compiler.simulation.print_simulation import ms, print_simulation, times
from attnc.compiler.simulation.simulation import PASSES, Baseline, Choice, Pass, Simulation
from attnc.runtime.attention import Attention
from attnc.runtime.call import FLOATS
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import (
    add_grid,
    add_inputs,
    add_pattern,
    compiled,
    given_inputs,
    has_free_length,
    length_of,
    value_json,
)
from attnc.runtime.example_inputs import Example, example_inputs, head_count
from attnc.runtime.floors import Floor
from attnc.runtime.simulating import break_even
from attnc.spec.errors import AttncError

LENGTH = 16384
"""Where nothing says another one."""

HEADS = 8

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

LARGEST_SWEEP = 64
"""Simulations of one sweep."""

Orders = Literal["natural", "bricks", "residues"]


@dataclass(frozen=True)
class Asked:
    """What is simulated beside the pattern, its length and the device."""

    n_k: int | None
    heads: int | None
    kv_heads: int | None
    batch: int
    head_dim: int
    dtype: torch.dtype | None
    stage: Pass
    tile: tuple[int, int] | None
    order: Orders | None
    inputs: Sequence[str]
    examples: dict[str, str] = field(default_factory=dict)


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `simulate`."""
    add_pattern(parser)
    parser.add_argument("--len", dest="n_q", metavar="N", type=int, help=f"queries (default {LENGTH}, or the grid's)")
    parser.add_argument("--keys", dest="n_k", metavar="N", type=int, help="keys (default: as many as queries)")
    add_grid(parser)
    parser.add_argument("--heads", metavar="H", type=int, help=f"query heads (default {HEADS})")
    parser.add_argument("--kv-heads", metavar="H", type=int, help="key and value heads (default: as many)")
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--head-dim", metavar="D", type=int, default=128, help="numbers of a head (default 128)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="bfloat16, float16, float32 (default bfloat16; fp32 on the CPU)"
    )
    parser.add_argument(
        "--device",
        dest="devices",
        metavar="NAME",
        action="append",
        default=[],
        help="a100, h100, h200, b200, cpu (this one), or a file NAME.json that describes a machine; may be repeated "
        "(default h100)",
    )
    parser.add_argument("--pass", dest="stage", metavar="NAME", default="forward", help=f"{', '.join(PASSES)}")
    parser.add_argument(
        "--baseline", metavar="NAME", default="full", help="the dense rival: full, causal, or both (default full)"
    )
    parser.add_argument("--tile", metavar="QxK", help="only these tiles, as in 128x64")
    parser.add_argument("--order", metavar="NAME", help="only this order of tokens: natural, bricks, residues")
    parser.add_argument(
        "--compare", metavar="SPEC", action="append", default=[], help="another pattern; may be repeated"
    )
    parser.add_argument(
        "-q",
        dest="other_params",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a parameter of the patterns compared",
    )
    parser.add_argument(
        "--sweep", metavar="NAME=LOW..HIGH", help="doubling: len=1k..1m, or a parameter as in window=64..8k"
    )
    add_inputs(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate."""
    asked = _asked(args)
    attention = compiled(args)
    n = length_of(attention.bound, args.n_q, LENGTH)
    devices = [name for text in args.devices for name in text.split(",") if name] or ["h100"]
    baselines = _baselines(args.baseline)
    main = _simulated(attention, n, asked, devices[0], baselines[0])
    others = _others(args, attention, n, asked, devices, baselines)
    sweep = _swept(args, attention, n, asked, devices[0], baselines[0])
    floors = () if asked.stage == "decode" else _floors(attention, n, asked)
    even = _break_even(attention, asked, devices[0], baselines[0], n)
    growth = attention.growth(heads=main.shape.heads)
    if args.json:
        console.print_json(_as_json(main, even, floors, growth, others, sweep, asked))
        return console.FINE
    unicode = console.has_unicode(sys.stdout)
    print(print_simulation(main, unicode=unicode))
    print(f"growth    {growth.law}{'' if growth.pairs is None else f'; visible pairs {growth.pairs}'}")
    for floor in floors:
        print(f"floor     {floor}")
    print(f"break-even {_even_in_words(even)}")
    for name, words in asked.examples.items():
        print(f"input     {name}: {words}")
    if others:
        print("\n" + _table([main, *others], by="pattern"))
    if sweep:
        print("\n" + _table([s for _, s in sweep], by="sweep", names=[name for name, _ in sweep]))
    return console.FINE


# --- what is asked ---------------------------------------------------------------------------------------------------


def _asked(args: argparse.Namespace) -> Asked:
    for option, value in (
        ("--len", args.n_q),
        ("--keys", args.n_k),
        ("--heads", args.heads),
        ("--kv-heads", args.kv_heads),
        ("--batch", args.batch),
        ("--head-dim", args.head_dim),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: give a whole number, at least 1")
    if args.stage not in PASSES:
        raise UsageError(f"--pass {args.stage}: it is one of {', '.join(PASSES)}")
    if args.order not in (None, "natural", "bricks", "residues"):
        raise UsageError(f"--order {args.order}: it is one of natural, bricks, residues")
    return Asked(
        args.n_k,
        args.heads,
        args.kv_heads,
        args.batch,
        args.head_dim,
        _dtype(args.dtype),
        args.stage,
        _tile(args.tile),
        args.order,
        args.inputs,
    )


def _dtype(text: str | None) -> torch.dtype | None:
    if text is None:
        return None
    found = getattr(torch, SHORT_NAMES.get(text, text), None)
    if found not in FLOATS:
        raise UsageError(f"--dtype {text}: it is one of bfloat16, float16, float32, float64")
    return cast("torch.dtype", found)


def _tile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)[x×,](\d+)", text)
    if found is None:
        raise UsageError(f"--tile {text}: write queries by keys, as in --tile 128x64")
    return int(found[1]), int(found[2])


def _baselines(text: str) -> list[Baseline]:
    if text == "both":
        return ["full", "causal"]
    if text not in ("full", "causal"):
        raise UsageError(f"--baseline {text}: it is one of full, causal, both")
    return [cast("Baseline", text)]


# --- simulating ------------------------------------------------------------------------------------------------------


def _simulated(attention: Attention, n: int, asked: Asked, device: str, baseline: Baseline) -> Simulation:
    n_q, n_k = (min(n, 1), asked.n_k or n) if asked.stage == "decode" else (n, asked.n_k or n)
    heads = asked.heads or head_count(attention.bound) or HEADS
    if asked.kv_heads is not None and heads % asked.kv_heads:
        raise UsageError(f"--heads {heads} is no multiple of --kv-heads {asked.kv_heads}")
    return attention.simulate(
        n_q,
        n_k,
        heads=heads,
        kv_heads=asked.kv_heads,
        batch=asked.batch,
        head_dim=asked.head_dim,
        dtype=asked.dtype,
        device=device,
        stage=asked.stage,
        baseline=baseline,
        tile=asked.tile,
        order=asked.order,
        **_inputs(attention, n_q, n_k, heads, asked),
    )


def _inputs(attention: Attention, n_q: int, n_k: int, heads: int, asked: Asked) -> dict[str, Tensor]:
    """Those given, and an example of each other that the relation reads."""
    given = given_inputs(attention.bound, asked.inputs, n_q, n_k)
    sizes = {"heads": heads}
    made: dict[str, Example] = example_inputs(
        attention.bound,
        n_q,
        n_k,
        given,
        batch=asked.batch,
        heads=heads,
        sizes=sizes,
        names=attention.relation_inputs,
    )
    for name, example in made.items():
        asked.examples.setdefault(name, example.words)
    return {**given, **{name: example.tensor for name, example in made.items()}}


def _floors(attention: Attention, n: int, asked: Asked) -> tuple[Floor, ...]:
    inputs: dict[str, Any] = {**_inputs(attention, n, asked.n_k or n, 1, asked)}
    return attention.floors(n, asked.n_k or n, **inputs)


def _others(
    args: argparse.Namespace,
    attention: Attention,
    n: int,
    asked: Asked,
    devices: Sequence[str],
    baselines: Sequence[Baseline],
) -> list[Simulation]:
    """What stands beside the first: other baselines, other devices, other patterns on all of them."""
    found = [_simulated(attention, n, asked, devices[0], baseline) for baseline in baselines[1:]]
    found += [_simulated(attention, n, asked, device, baselines[0]) for device in devices[1:]]
    for spec in args.compare:
        other = compiled(argparse.Namespace(spec=spec, params=args.other_params, preset=None))
        found += [_simulated(other, n, asked, device, baselines[0]) for device in devices]
    return found


Swept = list[tuple[str, Simulation]]


def _swept(
    args: argparse.Namespace, attention: Attention, n: int, asked: Asked, device: str, baseline: Baseline
) -> Swept:
    if args.sweep is None:
        return []
    name, values = _sweep_of(args.sweep)
    if name == "len":
        if not has_free_length(attention.bound):
            raise UsageError(f"--sweep {args.sweep}: the length of `{attention.name}` is fixed by its parameters")
        jobs = [partial(_simulated, attention, value, asked, device, baseline) for value in values]
    else:
        jobs = [partial(_with_param, args, name, value, n, asked, device, baseline) for value in values]
    found: Swept = []
    with console.progress("simulate", len(jobs)) as step:
        for value, job in zip(values, jobs, strict=True):
            step(f"{name}={value}")
            found.append((f"{name}={value:,}", job()))
    return found


def _with_param(
    args: argparse.Namespace, name: str, value: int, n: int, asked: Asked, device: str, baseline: Baseline
) -> Simulation:
    params = [text for text in args.params if text.partition("=")[0].strip() != name]
    changed = compiled(argparse.Namespace(spec=args.spec, params=[*params, f"{name}={value}"], preset=args.preset))
    return _simulated(changed, n, asked, device, baseline)


def _sweep_of(text: str) -> tuple[str, list[int]]:
    found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+[kKmM]?)\s*\.\.\s*(\d+[kKmM]?)\s*", text)
    if found is None:
        raise UsageError(f"--sweep {text}: write a name and a range, as in --sweep len=1k..1m")
    low, high = (_number(found[i]) for i in (2, 3))
    if not 1 <= low <= high:
        raise UsageError(f"--sweep {text}: the range must begin at 1 or above and not end before it begins")
    values: list[int] = []
    while low <= high and len(values) < LARGEST_SWEEP:
        values.append(low)
        low *= 2
    return found[1], values


def _number(text: str) -> int:
    factor = {"k": 1 << 10, "m": 1 << 20}.get(text[-1].lower(), 1)
    return int(text.rstrip("kKmM")) * factor


def _break_even(attention: Attention, asked: Asked, device: str, baseline: Baseline, n: int) -> int | str | None:
    """The length from which on it is worth it; a text where the length is not free."""
    if attention.bound.program.segments:
        return "its tokens are a grid, whose extents would have to grow"
    if asked.n_k is not None:
        return "the number of keys is given"
    if any(text.partition("=")[2].strip().startswith("[") for text in asked.inputs):
        return "its inputs are given for one length"

    def at(length: int) -> Simulation:
        return _simulated(attention, length, asked, device, baseline)

    try:
        return break_even(at, n)
    except (AttncError, MachineError) as error:
        return str(error).splitlines()[0]


# --- in words --------------------------------------------------------------------------------------------------------


def _even_in_words(even: int | str | None) -> str:
    if isinstance(even, str):
        return f"not asked: {even}"
    return "never, up to this length" if even is None else f"from {even:,} tokens on it beats dense attention"


def _table(found: Sequence[Simulation], by: str, names: Sequence[str] = ()) -> str:
    """A line a simulation."""
    head = ["", "element", "tile", "balanced", "predicted", "time", "dense", "as fast", "schedule"]
    rows = [head]
    for i, one in enumerate(found):
        name = names[i] if by == "sweep" else f"{one.pattern} on {one.device}"
        if by != "sweep" and one.baseline == "causal":
            name += ", against causal"
        rungs = [times(rung.speedup) for rung in one.rungs]
        rows.append([name, *rungs, ms(one.predicted_ms), ms(one.dense_ms), times(one.speedup), _short(one.choices[0])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(widths[i + 1]) for i, cell in enumerate(row[1:-1])), row[-1]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(choice: Choice) -> str:
    return f"{choice.q_tile}×{choice.k_tile}, {choice.order}"


# --- JSON ------------------------------------------------------------------------------------------------------------


def _as_json(
    main: Simulation,
    even: int | str | None,
    floors: Sequence[Floor],
    growth: Growth,
    others: Sequence[Simulation],
    sweep: Swept,
    asked: Asked,
) -> dict[str, object]:
    return {
        **simulation_json(main),
        "break_even_length": even if isinstance(even, int) else None,
        "break_even_note": even if isinstance(even, str) else None,
        "growth": growth.law,
        "growth_law": _growth_json(growth),
        "floors": [_floor_json(floor) for floor in floors],
        "examples": dict(asked.examples),
        "compared": [simulation_json(one) for one in others],
        "sweep": [{"at": name, **simulation_json(one)} for name, one in sweep],
    }


def simulation_json(found: Simulation) -> dict[str, object]:
    """A simulation with the keys that the command line promises. An infinite speedup is null."""
    shape, choice = found.shape, found.choices[0]
    return {
        "pattern": found.pattern,
        "params": {name: value_json(value) for name, value in found.params.items()},  # type: ignore[arg-type]
        "device": found.device,
        "dtype": shape.dtype,
        "shape": {
            "batch": shape.batch,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "queries": shape.n_q,
            "keys": shape.n_k,
            "dk": shape.dk,
            "dv": shape.dv,
        },
        "pass": found.stage,
        "baseline": found.baseline,
        "causal": found.causal,
        "visible": found.visible,
        "element_density": found.density,
        "tiles": {
            "total": found.tiles.total,
            "live": found.tiles.live,
            "full": found.tiles.full,
            "partial": found.tiles.partial,
        },
        "schedule": _choice_json(choice),
        "kernels": [_choice_json(one) for one in found.choices],
        "runners_up": [_choice_json(one) for one in found.others],
        "rungs": [
            {"name": rung.name, "speedup": _finite(rung.speedup), "lost_to": rung.lost_to} for rung in found.rungs
        ],
        "predicted_ms": found.predicted_ms,
        "dense_ms": found.dense_ms,
        "ideal_dense_ms": found.ideal_ms,
        "speedup": _finite(found.speedup),
        "calibrated": found.calibrated,
        "flop": found.flop,
        "bytes": {"least": found.traffic.least, "moved": found.traffic.moved, "held": found.traffic.held},
        "notes": list(found.notes),
    }


def _choice_json(choice: Choice) -> dict[str, object]:
    return {
        "kernel": choice.kernel,
        "q_tile": choice.q_tile,
        "k_tile": choice.k_tile,
        "order": str(choice.order),
        "q_brick": list(choice.order.q_brick),
        "k_brick": list(choice.order.k_brick),
        "how": choice.how,
        "limit": choice.limit,
        "ms": choice.ms,
    }


def _growth_json(growth: Growth) -> dict[str, object]:
    return {
        "law": growth.law,
        "pairs": None if growth.pairs is None else str(growth.pairs),
        "tiles": None if growth.tiles is None else str(growth.tiles),
        "tile": growth.tile,
        "fitted": growth.fitted,
        "derivation": list(growth.derivation),
        "checked": list(growth.checked),
    }


def _floor_json(floor: Floor) -> dict[str, object]:
    return {
        "parameter": floor.parameter,
        "least": value_json(floor.least),
        "visible": floor.visible,
        "density": floor.density,
        "causes": [{"text": text, "visible": count} for text, count in floor.causes],
    }


def _finite(speedup: float) -> float | None:
    return None if isinf(speedup) else speedup
