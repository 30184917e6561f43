"""The kernels of a recurrence class, and the order of their stages."""

from __future__ import annotations

from functools import lru_cache

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.recurrences.kernels.block_shapes import blocks_of
from attnc.compiler.recurrences.kernels.column_gradients import ColumnGradients, PairGradients
from attnc.compiler.recurrences.kernels.column_values import ColumnEdges, ColumnPairs, ColumnReads, ColumnValues
from attnc.compiler.recurrences.kernels.outputs import Outputs
from attnc.compiler.recurrences.kernels.prepare import Prepare
from attnc.compiler.recurrences.kernels.recurrence_frame import RecurrenceFrame
from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceProblem
from attnc.compiler.recurrences.kernels.row_gradients import ReadGradients, RowGradients
from attnc.compiler.recurrences.kernels.segment_kernels import (
    AdjointJoin,
    AdjointProduct,
    SegmentAdjoints,
    SegmentJoin,
    SegmentProduct,
    SegmentStates,
)
from attnc.compiler.recurrences.kernels.solve import SolveKernel
from attnc.compiler.recurrences.kernels.state_walk import AdjointWalk, StateWalk
from attnc.compiler.recurrences.kernels.step import StepKernel
from attnc.compiler.recurrences.kernels.walk import FusedWalk, OneWalk, PairWeightWalk
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass

_ALL: tuple[type[RecurrenceFrame], ...] = (
    Prepare,
    ColumnEdges,
    ColumnReads,
    SolveKernel,
    SegmentStates,
    SegmentJoin,
    SegmentProduct,
    StateWalk,
    Outputs,
    OneWalk,
    PairWeightWalk,
    FusedWalk,
    SegmentAdjoints,
    AdjointJoin,
    AdjointProduct,
    AdjointWalk,
    ColumnGradients,
    PairGradients,
    ColumnPairs,
    ColumnValues,
    RowGradients,
    ReadGradients,
    StepKernel,
)
_KERNELS = {kernel.stage: kernel for kernel in _ALL}


@lru_cache(maxsize=1024)
def emit(problem: RecurrenceProblem, stage: str) -> KernelSource:
    """Return the kernel of a stage."""
    return _KERNELS[stage](problem, *blocks_of(problem, stage)).source()


def stages(form: RecurrenceClass) -> tuple[str, ...]:
    """Return all stages of a class except `walk_stages`.

    These are the stages of the forward pass, of the backward pass, for few tokens, and for few heads.
    """
    split = (*segment_stages(form), *adjoint_segment_stages(form))
    return (*prepared_stages(form), "states", "outputs", *backward_stages(form), "step", *split)


def walk_stages(problem: RecurrenceProblem) -> tuple[str, ...]:
    """Return the stages that store no state between chunks, in calls without gradients."""
    fused = fused_stages(problem.form) if problem.can_fuse else ()
    return ("walk", *fused) if problem.can_walk else ()


def fused_stages(form: RecurrenceClass) -> tuple[str, ...]:
    """Return the stages of a call without gradients and without prepared rows."""
    return ("weights", "fused") if form.has_weights else ("fused",)


def segment_stages(form: RecurrenceClass) -> tuple[str, ...]:
    """Return the stages that run before "states" where sequences are split into segments."""
    return ("segments", "multiplied" if form.is_corrected else "joined")


def adjoint_segment_stages(form: RecurrenceClass) -> tuple[str, ...]:
    """Return the stages that run before "adjoints" where sequences are split into segments."""
    return ("adjoint_segments", "adjoints_multiplied" if form.is_corrected else "adjoints_joined")


def prepared_stages(form: RecurrenceClass) -> tuple[str, ...]:
    """Return the stages with which both the forward and the backward pass begin."""
    return ("prepare", *(["columns"] if form.columns else []), *(["solve"] if form.is_corrected else []))


def backward_stages(form: RecurrenceClass) -> tuple[str, ...]:
    """Return the stages of the backward pass after the prepared ones."""
    if form.columns:
        return ("column_reads", "adjoints", "column_pairs", "column_values", "keys")
    value_stages = ("values", "pairs") if form.is_rank_one else ("values",)
    return ("adjoints", *value_stages, "keys", *(["reads"] if form.is_split else []))
