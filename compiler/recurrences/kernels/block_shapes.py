"""Blocks and warps of kernels: those that machine code was read for."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceClass, RecurrenceProblem


class Blocks(NamedTuple):
    """Widths of blocks of the state's rows and of its columns, warps, and buffers of what loops load."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_of(problem: RecurrenceProblem, stage: str) -> Blocks:
    """Return the block shape of a kernel. Passes from chunk to chunk hold the whole width of the state's rows."""
    if stage in _FIRST_WALKS:
        found = _chosen(problem, stage) or blocks_of(problem, _FIRST_WALKS[stage])
        return found._replace(columns=gcd(found.columns, problem.segment_width))
    if stage in ("states", "adjoints") and (problem.is_exact or problem.wk > 128):
        return Blocks(min(256, problem.wk), min(32, problem.wv), 8, 1)
    if stage in ("walk", "fused"):
        found = _one_walk(problem, stage)
    else:
        found = _chosen(problem, stage) or _wanted(problem, stage)
    return Blocks(min(found.rows, problem.wk), min(found.columns, problem.wv), found.warps, found.stages)


def _one_walk(problem: RecurrenceProblem, stage: str) -> Blocks:
    """Return the block shape of walks that also write outputs: the most columns without spills."""
    form, target, many = problem.form, problem.target.name, problem.wk > 64
    if problem.is_exact or problem.wk > 128:
        return Blocks(256, 16 if target in ("sm_80", "gfx942") else 32, 8, 1)
    if target == "sm_100":
        return Blocks(256, 32 if form.is_corrected and not many else 64, 8, 2)
    if stage == "fused":
        wanted = {"sm_80": Blocks(256, 16 if many else 32, 8, 2), "gfx942": Blocks(256, 64, 4, 1)}
        return wanted.get(target, Blocks(256, 64, 8 if many else 4, 2))
    if target == "sm_80" and (form.is_rank_one or many):
        return Blocks(256, 32, 8, 2)
    return Blocks(256, 64, 4, 1 if target == "gfx942" and (form.is_corrected or many) else 2)


def _chosen(problem: RecurrenceProblem, stage: str) -> Blocks | None:
    """Return the block shape of a kernel on its target, None where it is the general one."""
    of_target = _OF_TARGETS.get(problem.target.name)
    return of_target(problem, stage) if of_target else None


def _wanted(problem: RecurrenceProblem, stage: str) -> Blocks:
    form = problem.form
    if stage == "step" and problem.wk <= 64 and not form.columns:
        return Blocks(256, 32, 4, 1)
    if form.gate == "rows" and stage in _OF_LEVELS:
        return _OF_LEVELS[stage] if not form.is_corrected or stage == "prepare" else Blocks(16, 64, 8, 2)
    if stage in ("multiplied", "adjoints_multiplied") and problem.wk > 128:
        return Blocks(32, 16, 8, 1)
    if form.columns and stage == "outputs":
        return Blocks(64, 32, 8, 2)
    if form.is_rank_one and stage == "prepare":
        return Blocks(64, 64, 8, 2)
    if form.is_corrected and stage == "values":
        return Blocks(64, 64 if form.is_rank_one else 32, 8, 2)
    return _WANTED[stage]


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
    """Whether it is a pass from chunk to chunk that has a correction's rows beside the state."""
    return (stage == "adjoints" and form.is_corrected) or (stage == "states" and form.is_rank_one)


_OF_TARGETS: dict[str, Callable[[RecurrenceProblem, str], Blocks | None]] = {
    "sm_80": _on_sm_80,
    "sm_100": _on_sm_100,
    "gfx942": _on_gfx942,
}
_FIRST_WALKS = {"segments": "states", "adjoint_segments": "adjoints"}
"""The walks of segments, which have the shapes of walks from known states."""
_WANTED = {
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
_OF_LEVELS = {
    "prepare": Blocks(32, 64, 8, 2),
    "keys": Blocks(32, 32, 8, 2),
    "reads": Blocks(16, 64, 8, 2),
}
"""Block shapes for a gate per row: sums and factors of levels are tiles, and wider ones do not fit into registers."""
