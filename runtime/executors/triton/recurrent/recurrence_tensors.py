"""The tensors that recurrence kernels take in one call: aligned inputs and scratch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.compiler.kernels.kernel_source import TYPES, VECTOR
from attnc.compiler.recurrences.kernels.block_shapes import blocks_of
from attnc.compiler.recurrences.kernels.recurrence_kernels import emit
from attnc.compiler.recurrences.kernels.recurrence_problem import LEAST, RecurrenceProblem
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.compiler.recurrences.segment_count import even_segments
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.executors.recurrent.linear_inputs import Inputs
from attnc.runtime.executors.triton.launch import launch

WALKS = frozenset({"states", "adjoints", "walk", "fused"})
"""Kernels that launch a program per segment of a head."""
FIRST_WALKS = frozenset({"segments", "adjoint_segments"})
"""Kernels that launch a program per segment but one; they have more columns than the state."""
JOINING = frozenset({"joined", "multiplied"})
"""Kernels that compute the states between segments of a forward pass."""
OF_LANES = frozenset({"step", "joined", "multiplied", "adjoints_joined", "adjoints_multiplied"})
"""Kernels that launch a program per head."""
BY_COLUMNS = WALKS | OF_LANES | {"outputs", "columns", "column_reads", "column_values"}
"""Kernels that launch a program per block of columns."""
TORCH_TYPES = {name: getattr(torch, name) for name in TYPES}


@dataclass
class RecurrenceTensors:
    """The tensors of a call by their names in kernels, and the sizes of the call.

    `segments`: the number of segments of a head, `span` chunks each; the last segment holds the remainder. `at_edges`:
    states are stored only at the edges of segments, not before every chunk.
    """

    problem: RecurrenceProblem
    batch: int
    heads: int
    tokens: int
    device: torch.device
    tensors: dict[str, Tensor] = field(default_factory=dict)
    segments: int = 1
    at_edges: bool = False

    @property
    def steps(self) -> int:
        """Number of micro-steps of all tokens."""
        return self.tokens * self.problem.form.micro

    @property
    def lanes(self) -> int:
        """Number of heads of all batch entries."""
        return self.batch * self.heads

    @property
    def chunks(self) -> int:
        """Number of chunks of a head."""
        return -(-self.tokens // self.problem.per_chunk)

    @property
    def span(self) -> int:
        """Number of chunks in a segment."""
        return -(-self.chunks // self.segments)

    def split(self, segments: int) -> None:
        """Split heads into at most `segments` segments, and allocate the tensors that segments exchange."""
        self.segments = even_segments(segments, self.chunks)
        if self.problem.form.is_corrected:
            count = self.lanes if self.segments > 1 else 1
            self.tensors["whole"] = torch.empty(count, dtype=torch.int32, device=self.device)
        if self.segments == 1:
            return
        p, count = self.problem, self.lanes * self.segments
        shapes: dict[str, tuple[int, ...]] = {"segment_states": (p.wk, p.segment_width)}
        if p.form.has_total:
            shapes["segment_total"] = (p.wk if p.form.gate == "rows" else 1,)
        if p.form.columns:
            shapes["segment_total_columns"] = (p.wv,)
        for name, shape in shapes.items():
            self.tensors[name] = torch.empty(count, *shape, dtype=torch.float32, device=self.device)

    def scratch(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate uninitialised rows for every row of every chunk."""
        shape = (self.lanes * self.chunks, self.problem.length, width)
        rows = torch.empty(shape, dtype=dtype or TORCH_TYPES[self.problem.dtype], device=self.device)
        self.tensors[name] = rows
        return rows

    def states(self, name: str, initial: Tensor | None, at: int) -> Tensor:
        """Allocate states before each chunk, or segment, and after the last (lanes, … + 1, wk, wv); set state `at`."""
        p, count = self.problem, self.segments if self.at_edges else self.chunks
        states = torch.empty(self.lanes, count + 1, p.wk, p.wv, dtype=torch.float32, device=self.device)
        target = states[:, at]
        if (p.wk, p.wv) != (p.dk, p.dv) or initial is None:
            target.zero_()
        if initial is not None:
            target[:, : p.dk, : p.dv] = initial.reshape(self.lanes, p.dk, p.dv)
        self.tensors[name] = states
        return states

    def parts(self, stage: str) -> int:
        """Return the programs that a kernel launches per chunk, or per head."""
        p, blocks = self.problem, blocks_of(self.problem, stage)
        if stage in FIRST_WALKS:
            return p.segment_width // blocks.columns
        if stage in BY_COLUMNS:
            return p.wv // blocks.columns
        return p.wk // blocks.rows if stage in ("keys", "reads") else 1

    def programs(self, stage: str) -> int:
        """Return the programs that a kernel launches, not multiplied by its `parts`."""
        if stage in OF_LANES:
            return self.lanes
        if stage in FIRST_WALKS:
            return self.lanes * (self.segments - 1)
        return self.lanes * (self.segments if stage in WALKS else self.chunks)

    def run(self, stage: str) -> None:
        """Launch the kernel of a stage."""
        numbers = {"heads": self.heads, "chunks": self.chunks, "steps": self.steps, "tokens": self.tokens}
        numbers |= {"segments": self.segments, "span": self.span}
        if self.at_edges and stage in JOINING:  # a segment has one state, as if it were one chunk
            numbers |= {"chunks": self.segments, "span": 1}
        launch(emit(self.problem, stage), self.programs(stage), self.tensors, numbers, self.parts(stage))


def call_of(problem: RecurrenceProblem, inputs: Inputs) -> RecurrenceTensors:
    """Return the tensors of a call before anything is computed."""
    return RecurrenceTensors(problem, inputs.q.shape[0], inputs.q.shape[1], inputs.q.shape[2], inputs.q.device)


def problem_of(form: RecurrenceClass, q: Tensor, v: Tensor, dtype: torch.dtype, chunk: int) -> RecurrenceProblem:
    """Return the problem, for which kernels are emitted."""
    steps = q.shape[2] * form.micro
    length = min(chunk, 64, max(LEAST, 1 << (steps - 1).bit_length()))
    name = str(dtype).removeprefix("torch.")
    return RecurrenceProblem(form, q.shape[-1], v.shape[-1], name, max(length, LEAST), target_of(q.device))


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in a dtype, contiguous along the last dimension and aligned to 16 bytes; copied only if necessary."""
    x = x.to(dtype)
    size = x.element_size()
    fits = x.stride(-1) == 1 and all(
        stride * size % VECTOR == 0 for stride, count in zip(x.stride()[:-1], x.shape[:-1], strict=True) if count > 1
    )
    if fits and x.data_ptr() % VECTOR == 0:
        return x
    return like(x, x.shape, dtype).copy_(x)


def like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialised tensor whose rows begin at multiples of 16 bytes."""
    unit = VECTOR // dtype.itemsize
    width = -(-shape[-1] // unit) * unit
    return torch.empty(*shape[:-1], width, dtype=dtype, device=x.device)[..., : shape[-1]]
