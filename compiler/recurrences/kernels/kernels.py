"""The kernels of a class, in the order in which they run."""

from __future__ import annotations

from functools import lru_cache

from attnc.compiler.kernels.source import KernelSource
from attnc.compiler.recurrences.kernels.column_values import ColumnPairs, ColumnValues
from attnc.compiler.recurrences.kernels.columns import ColumnEdges, ColumnReads
from attnc.compiler.recurrences.kernels.frame import Frame
from attnc.compiler.recurrences.kernels.keys import Keys, Reads
from attnc.compiler.recurrences.kernels.outputs import Outputs
from attnc.compiler.recurrences.kernels.prepare import Prepare
from attnc.compiler.recurrences.kernels.problem import Form, Problem
from attnc.compiler.recurrences.kernels.segments import (
    AdjointSegments,
    AdjointsJoined,
    AdjointsMultiplied,
    Joined,
    Multiplied,
    Segments,
)
from attnc.compiler.recurrences.kernels.solve import Solve
from attnc.compiler.recurrences.kernels.states import Adjoints, States
from attnc.compiler.recurrences.kernels.step import Step
from attnc.compiler.recurrences.kernels.tiles import blocks_of
from attnc.compiler.recurrences.kernels.values import Pairs, Values
from attnc.compiler.recurrences.kernels.walk import FusedWalk, OneWalk, Weights

_ALL: tuple[type[Frame], ...] = (
    Prepare,
    ColumnEdges,
    ColumnReads,
    Solve,
    Segments,
    Joined,
    Multiplied,
    States,
    Outputs,
    OneWalk,
    Weights,
    FusedWalk,
    AdjointSegments,
    AdjointsJoined,
    AdjointsMultiplied,
    Adjoints,
    Values,
    Pairs,
    ColumnPairs,
    ColumnValues,
    Keys,
    Reads,
    Step,
)
_KERNELS = {kernel.stage: kernel for kernel in _ALL}


@lru_cache(maxsize=1024)
def emit(problem: Problem, stage: str) -> KernelSource:
    """The kernel of a stage."""
    return _KERNELS[stage](problem, *blocks_of(problem, stage)).source()


def stages(form: Form) -> tuple[str, ...]:
    """Of all kernels of a class but those of `walk_stages`: of the forward pass, the backward pass, of few tokens, and
    of few lanes.
    """
    split = (*segment_stages(form), *adjoint_segment_stages(form))
    return (*prepared_stages(form), "states", "outputs", *backward_stages(form), "step", *split)


def walk_stages(problem: Problem) -> tuple[str, ...]:
    """Of the kernels that store no state between chunks, in calls that are not differentiated."""
    fused = fused_stages(problem.form) if problem.can_fuse else ()
    return ("walk", *fused) if problem.can_walk else ()


def fused_stages(form: Form) -> tuple[str, ...]:
    """Of the kernels of such a call with no prepared rows."""
    return ("weights", "fused") if form.has_weights else ("fused",)


def segment_stages(form: Form) -> tuple[str, ...]:
    """Of the kernels before the states', where lanes are split into segments."""
    return ("segments", "multiplied" if form.is_corrected else "joined")


def adjoint_segment_stages(form: Form) -> tuple[str, ...]:
    """Of the kernels before the adjoints'."""
    return ("adjoint_segments", "adjoints_multiplied" if form.is_corrected else "adjoints_joined")


def prepared_stages(form: Form) -> tuple[str, ...]:
    """Of the kernels that both passes begin with."""
    return ("prepare", *(["columns"] if form.columns else []), *(["solve"] if form.is_corrected else []))


def backward_stages(form: Form) -> tuple[str, ...]:
    """Of the kernels of the backward pass after these."""
    if form.columns:
        return ("column_reads", "adjoints", "column_pairs", "column_values", "keys")
    middle = ("values", "pairs") if form.is_rank_one else ("values",)
    return ("adjoints", *middle, "keys", *(["reads"] if form.is_split else []))
