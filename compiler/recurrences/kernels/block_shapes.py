"""Block shapes and warps of kernels, chosen by reading their machine code."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceProblem
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass


class Blocks(NamedTuple):
    """Block widths along the state's rows and columns, warps, and pipeline stages of loops."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_of(problem: RecurrenceProblem, stage: str) -> Blocks:
    """Return the block shape of a kernel. Walks from chunk to chunk hold all rows of the state."""
    if stage in _FIRST_WALKS:
        blocks = _target_shape(problem, stage) or blocks_of(problem, _FIRST_WALKS[stage])
        return blocks._replace(columns=gcd(blocks.columns, problem.segment_width))
    if stage in ("states", "adjoints") and (problem.is_exact or problem.wk > 128):
        return Blocks(min(256, problem.wk), min(32, problem.wv), 8, 1)
    if stage in ("walk", "fused"):
        blocks = _one_walk(problem, stage)
    else:
        blocks = _target_shape(problem, stage) or _general_shape(problem, stage)
    return Blocks(min(blocks.rows, problem.wk), min(blocks.columns, problem.wv), blocks.warps, blocks.stages)


def _one_walk(problem: RecurrenceProblem, stage: str) -> Blocks:
    """Return the block shape of walks that also write outputs: the largest number of columns without spills."""
    form, target, is_wide = problem.form, problem.target.name, problem.wk > 64
    if problem.is_exact or problem.wk > 128:
        return Blocks(256, 16 if target in ("sm_80", "gfx942") else 32, 8, 1)
    if target == "sm_100":
        return Blocks(256, 32 if form.is_corrected and not is_wide else 64, 8, 2)
    if stage == "fused":
        by_target = {"sm_80": Blocks(256, 16 if is_wide else 32, 8, 2), "gfx942": Blocks(256, 64, 4, 1)}
        return by_target.get(target, Blocks(256, 64, 8 if is_wide else 4, 2))
    if target == "sm_80" and (form.is_rank_one or is_wide):
        return Blocks(256, 32, 8, 2)
    return Blocks(256, 64, 4, 1 if target == "gfx942" and (form.is_corrected or is_wide) else 2)


def _target_shape(problem: RecurrenceProblem, stage: str) -> Blocks | None:
    """Return the block shape specific to the target; None if the general one applies."""
    shape_of = _BY_TARGET.get(problem.target.name)
    return shape_of(problem, stage) if shape_of else None


def _general_shape(problem: RecurrenceProblem, stage: str) -> Blocks:
    """Return the block shape for targets without a specific one."""
    form = problem.form
    if stage == "step" and problem.wk <= 64 and not form.columns:
        return Blocks(256, 32, 4, 1)
    if form.gate == "rows" and stage in _WITH_ROW_GATES:
        return _WITH_ROW_GATES[stage] if not form.is_corrected or stage == "prepare" else Blocks(16, 64, 8, 2)
    if stage in ("multiplied", "adjoints_multiplied") and problem.wk > 128:
        return Blocks(32, 16, 8, 1)
    if form.columns and stage == "outputs":
        return Blocks(64, 32, 8, 2)
    if form.is_rank_one and stage == "prepare":
        return Blocks(64, 64, 8, 2)
    if form.is_corrected and stage == "values":
        return Blocks(64, 64 if form.is_rank_one else 32, 8, 2)
    return _GENERAL[stage]


def _on_sm_80(problem: RecurrenceProblem, stage: str) -> Blocks | None:
    """Return the narrower block shapes where products use registers."""
    form = problem.form
    if stage == "prepare" and form.is_rank_one:
        return Blocks(16, 64, 8, 2)
    if stage == "prepare" and form.has_vector_gate:
        return Blocks(32, 64, 4, 2)
    if _is_serial(form, stage):
        return Blocks(256, 32, 4, 2)
    if stage == "values" and not form.is_corrected:
        return Blocks(64, 32, 4, 2)
    if stage == "values" and form.is_rank_one:
        return Blocks(64, 32, 8, 2)
    if stage == "outputs" and not form.is_corrected and not form.columns:
        return Blocks(64, 32, 4, 2)
    if stage == "pairs" and form.is_rank_one and form.gate != "rows" and problem.wv > 64:
        return Blocks(64, 64, 8, 2)
    if stage == "step" and form.micro > 1:
        return Blocks(256, 32, 4, 1)
    if stage == "keys" and form.is_corrected and form.gate != "rows":
        return Blocks(16, 64, 4, 2)
    return None


def _on_sm_100(problem: RecurrenceProblem, stage: str) -> Blocks | None:
    """Return block shapes with more warps to move sums out of tensor memory, or fewer rows at a time."""
    form = problem.form
    if stage in ("states", "adjoints") and not form.is_corrected and problem.wk <= 64:
        return Blocks(256, 64, 8, 2)
    if stage == "segments" and form.is_delta and problem.wk <= 64 and not problem.is_exact:
        return Blocks(64, 64, 8, 2)
    if stage == "keys" and form.is_rank_one and form.gate != "rows":
        return Blocks(32, 64, 8, 2)
    if stage == "prepare" and form.is_rank_one and form.gate == "rows":
        return Blocks(16, 64, 8, 2)
    if stage == "values" and not form.is_corrected and form.gate == "rows" and problem.wv <= 64:
        return Blocks(64, 64, 8, 2)
    return None


def _on_gfx942(problem: RecurrenceProblem, stage: str) -> Blocks | None:
    """Return block shapes that fit into 64 KiB, and into 256 registers with 8 warps."""
    form = problem.form
    if stage == "adjoint_segments" and problem.is_exact and form.is_corrected:
        return Blocks(256, 16, 8, 1)
    if _is_serial(form, stage):
        return Blocks(256, 64, 4, 1)
    if stage == "values" and form.is_corrected and not form.is_rank_one:
        return Blocks(64, 16, 8, 2)
    if stage == "keys" and form.gate == "rows":
        return Blocks(16, 64, 8, 2)
    return None


def _is_serial(form: RecurrenceClass, stage: str) -> bool:
    """Check whether a kernel walks from chunk to chunk with a correction's rows beside the state."""
    return (stage == "adjoints" and form.is_corrected) or (stage == "states" and form.is_rank_one)


_BY_TARGET: dict[str, Callable[[RecurrenceProblem, str], Blocks | None]] = {
    "sm_80": _on_sm_80,
    "sm_100": _on_sm_100,
    "gfx942": _on_gfx942,
}
_FIRST_WALKS = {"segments": "states", "adjoint_segments": "adjoints"}
"""The walks of segments, and the walks whose block shapes they use."""
_GENERAL = {
    "prepare": Blocks(64, 64, 4, 2),
    "columns": Blocks(64, 64, 4, 1),
    "column_reads": Blocks(64, 64, 4, 1),
    "solve": Blocks(64, 64, 4, 2),
    "states": Blocks(256, 64, 4, 2),
    "joined": Blocks(256, 16, 8, 1),
    "multiplied": Blocks(32, 16, 4, 1),
    "adjoints_joined": Blocks(256, 16, 8, 1),
    "adjoints_multiplied": Blocks(32, 16, 4, 1),
    "outputs": Blocks(64, 64, 4, 2),
    "weights": Blocks(64, 64, 4, 1),
    "adjoints": Blocks(256, 64, 4, 2),
    "values": Blocks(64, 64, 4, 2),
    "pairs": Blocks(64, 32, 8, 2),
    "column_pairs": Blocks(64, 32, 4, 1),
    "column_values": Blocks(64, 32, 8, 2),
    "keys": Blocks(32, 64, 4, 2),
    "step": Blocks(256, 16, 4, 1),
}
_WITH_ROW_GATES = {
    "prepare": Blocks(32, 64, 8, 2),
    "keys": Blocks(32, 32, 8, 2),
    "reads": Blocks(16, 64, 8, 2),
}
"""Block shapes with a gate per row: sums and factors of levels are tiles; wider blocks do not fit into registers."""
