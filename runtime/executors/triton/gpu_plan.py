"""The plan of a call on a GPU: the tiles that its kernels walk, the reasons, and what the executor allocates.

With e bytes an element and R rows of queries over batch and heads:

- saved: e · (q + k + v + out) + 4 · lse, in elements;
- forward: nothing, plus copies of q, k, v and out if their rows do not begin at multiples of 16 bytes;
- backward: 8 · R for the LSE and delta that kernels read, plus copies of q, k, v, out, its gradient and the gradients
  of q, k and v if they do not fit.

The tables that kernels read are cached (`SETTINGS.table_bytes`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.kernels.attention_kernels import AttentionKernels, HeadShape
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.kernel_source import VECTOR
from attnc.compiler.kernels.targets import Target
from attnc.compiler.planning.cpu_plan import Memory, Plan, TileCounts
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.simulation.simulated_call import SimulatedRelation, problem_of
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.device_targets import device_at_hand
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape
from attnc.runtime.choices.tile_candidates import STAGES, knob_of
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.triton.gpu_work import without_kernels
from attnc.runtime.executors.triton.planner import gpu_planner
from attnc.runtime.planning.plans import Planner, cache_of, relations_of

SCHEDULES = {"ranges": "loop bounds", "bricks": "bricks", "lists": "tile lists", "runs": "tile lists"}


def plan_on_gpu(planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object], target: Target) -> Plan:
    """Plan a call with these sizes and inputs.

    Raises what planning for the CPU raises, and UnsupportedError for what `strict` does not allow.
    """
    heads = HeadShape(sizes.dk, sizes.dv, sizes.dtype, grouped=sizes.heads != sizes.kv_heads)
    try:
        if sizes.dtype == "float64":
            raise NotInKernelsError("numbers of float64")
        device = device_at_hand()
        tiles = {} if device is None else gpu_planner(planner).tiles_of(heads, target, sizes, device)
        kernels = gpu_planner(planner).kernels(heads, target, sizes.n_q == sizes.n_k, None, tiles)
        return _by_kernels(planner, kernels, sizes, inputs)
    except NotInKernelsError as error:
        if planner.strict:
            raise UnsupportedError(without_kernels(planner.pattern.name, error)) from error
        why = f"there are no kernels for {error}"
        torch_plan = cpu_plans(planner).plan(sizes, inputs)
        reasons = ("tiles as operations of torch on the device", *torch_plan.reasons)
        return replace(torch_plan, executor="torch", fallback=why, reasons=reasons, memory_of=_untold)


def _tuned(planner: Planner, sizes: TensorSizes) -> tuple[str, ...]:
    """Return the reasons for the tiles, if they come from measurements."""
    device = device_at_hand()
    if planner.tuned is None or device is None:
        return ()
    knobs = [knob_of(planner.knob, stage) for stage in STAGES]
    return tuple(dict.fromkeys(planner.tuned.why(knob, sizes, "triton", device) for knob in knobs))


def how_listed(planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object], target: Target) -> str:
    """Return, as text, where the tile lists of an attention with selections come from.

    `inputs`: the call's inputs, and arrays of the shapes of its selections. Raises UnsupportedError for what `strict`
    does not allow.
    """
    heads = HeadShape(sizes.dk, sizes.dv, sizes.dtype, grouped=sizes.heads != sizes.kv_heads)
    try:
        if sizes.dtype == "float64":
            raise NotInKernelsError("numbers of float64")
        kernels = gpu_planner(planner).kernels_of(heads, target, sizes, inputs)
    except NotInKernelsError as error:
        if planner.strict:
            raise UnsupportedError(without_kernels(planner.pattern.name, error)) from error
        return f"tiles in torch on the device: there are no kernels for {error}"
    gpu_planner(planner).refuse_host(kernels)
    return kernels.reason


def _by_kernels(planner: Planner, kernels: AttentionKernels, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
    pattern = planner.pattern
    relations = relations_of(pattern, call_shape(pattern, sizes, inputs))
    q_tile, k_tile = kernels.forward.tiles.q_tile, kernels.forward.tiles.k_tile
    problem = problem_of([relations], pattern.name, {}, sizes.n_k)
    try:
        works = [(_work(part, kernels, q_tile, k_tile), part.times) for part in problem.parts]
    except (TooManyTilesError, TooManyClassesError) as error:
        if kernels.form == "lists":
            raise NotInKernelsError(
                f"tiles of {q_tile}×{k_tile} with more tiles or distinct masks than lists can hold"
            ) from error
        works = []
    full, partial = (sum(count[i] * times for count, times in works) for i in (0, 1))
    rows, columns = -(-sizes.n_q // q_tile), -(-sizes.n_k // k_tile)
    total = rows * columns * sizes.batch * sizes.heads
    stages = [kernels.forward, kernels.dq, kernels.dkdv]
    return Plan(
        n_q=sizes.n_q,
        n_k=sizes.n_k,
        batch=sizes.batch,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        q_tile=q_tile,
        k_tile=k_tile,
        tiles=TileCounts(total, full + partial, full, partial),
        visible=problem.visible,
        groups=(),
        masks=(),
        executor="triton",
        schedule=SCHEDULES[kernels.form],  # type: ignore[arg-type]
        reasons=(
            kernels.reason,
            *_tuned(planner, sizes),
            *(() if is_plain(pattern.attend) else ("vectors and terms of the score are computed before the kernels",)),
            *(f"{source.function}: tiles of {source.tiles}" for source in stages),
            f"for {kernels.target.name}, tiles "
            + ("copied by the hardware" if kernels.problem.boxes else "loaded by pointers"),
        ),
        fallback=None,
        exact_mask=relations.exact_mask,
        cache_of=cache_of(pattern, sizes.heads, sizes.kv_heads),
        pattern=pattern.name,
        memory_of=functools.partial(memory_on_gpu, sizes) if is_plain(pattern.attend) else _untold,
    )


def _untold() -> None:
    """Report no memory for patterns whose score terms are computed before the kernels."""


def _work(part: SimulatedRelation, kernels: AttentionKernels, q_tile: int, k_tile: int) -> tuple[int, int]:
    """Return the full and partial tiles of a relation."""
    bricked = kernels.bricked.get("forward")
    if bricked is not None and part.finder.bricks is not None:
        work = part.finder.bricks.work(bricked.grid.q_brick, bricked.grid.k_brick)
    else:
        work = part.finder.natural(q_tile, k_tile)
    return work.rows.full_tiles, work.rows.partial_tiles


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_on_gpu(sizes: TensorSizes) -> Memory:
    """Return the memory of a call of one softmax over plain scores, with contiguous tensors and a positive scale."""
    element = 4 if sizes.dtype == "float32" else 2
    rows, keys = sizes.batch * sizes.heads * sizes.n_q, sizes.batch * sizes.kv_heads * sizes.n_k
    of_dk, of_dv = (_copied(width * element) for width in (sizes.dk, sizes.dv))
    saved = element * (rows + keys) * (sizes.dk + sizes.dv) + 4 * rows
    forward = (rows + keys) * (of_dk + of_dv)
    backward = 8 * rows + 2 * (rows + keys) * of_dk + (2 * rows + 2 * keys) * of_dv
    return Memory(saved, forward, backward)


def _copied(row: int) -> int:
    """Return the bytes of a row that must be copied; 0 if rows fit."""
    return -(-row // VECTOR) * VECTOR if row % VECTOR else 0
