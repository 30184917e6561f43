"""A call of the recurrence as kernels take it: its class, its tensors aligned, its scratch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnc.compiler.kernels.kernel_source import TYPES, VECTOR
from attnc.compiler.recurrences.kernels.block_shapes import blocks_of
from attnc.compiler.recurrences.kernels.recurrence_kernels import emit
from attnc.compiler.recurrences.kernels.recurrence_problem import LEAST, RecurrenceClass, RecurrenceProblem
from attnc.compiler.recurrences.segment_count import even_segments
from attnc.runtime.gpu.device_targets import target_of
from attnc.runtime.gpu.launch import launch
from attnc.runtime.recurrent.chunked import Inputs

WALKS = frozenset({"states", "adjoints", "walk", "fused"})
"""Kernels whose programs have a segment of a lane."""
FIRST_WALKS = frozenset({"segments", "adjoint_segments"})
"""The same, of all segments but one; their columns are more than the state's."""
JOINING = frozenset({"joined", "multiplied"})
"""Kernels that compute the states between segments of a forward pass."""
OF_LANES = frozenset({"step", "joined", "multiplied", "adjoints_joined", "adjoints_multiplied"})
"""Kernels whose programs have a lane."""
BY_COLUMNS = WALKS | OF_LANES | {"outputs", "columns", "column_reads", "column_values"}
"""Kernels whose programs have a block of columns each."""
TORCH_TYPES = {name: getattr(torch, name) for name in TYPES}


@dataclass
class RecurrenceTensors:
    """Tensors by the names that kernels have for them, and how many there are of everything.

    `segments`: those that a lane is split into, `span` chunks each; what is left over is the last. `at_edges`: states
    are stored at the edges of segments only, not before every chunk.
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
        """Micro-steps of all tokens."""
        return self.tokens * self.problem.form.micro

    @property
    def lanes(self) -> int:
        """Heads of all batch entries."""
        return self.batch * self.heads

    @property
    def chunks(self) -> int:
        """Of a lane."""
        return -(-self.tokens // self.problem.per_chunk)

    @property
    def span(self) -> int:
        """Chunks of a segment."""
        return -(-self.chunks // self.segments)

    def split(self, segments: int) -> None:
        """Split lanes into so many segments or fewer, and set aside what segments make of states."""
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
        """Rows for every row of every chunk, not set."""
        shape = (self.lanes * self.chunks, self.problem.length, width)
        found = torch.empty(shape, dtype=dtype or TORCH_TYPES[self.problem.dtype], device=self.device)
        self.tensors[name] = found
        return found

    def states(self, name: str, given: Tensor | None, at: int) -> Tensor:
        """States before all chunks, or segments, and after the last, one of them set: (lanes, … + 1, wk, wv)."""
        p, count = self.problem, self.segments if self.at_edges else self.chunks
        found = torch.empty(self.lanes, count + 1, p.wk, p.wv, dtype=torch.float32, device=self.device)
        set_one = found[:, at]
        if (p.wk, p.wv) != (p.dk, p.dv) or given is None:
            set_one.zero_()
        if given is not None:
            set_one[:, : p.dk, : p.dv] = given.reshape(self.lanes, p.dk, p.dv)
        self.tensors[name] = found
        return found

    def parts(self, stage: str) -> int:
        """Programs of a kernel for each chunk, or each lane."""
        p, blocks = self.problem, blocks_of(self.problem, stage)
        if stage in FIRST_WALKS:
            return p.segment_width // blocks.columns
        if stage in BY_COLUMNS:
            return p.wv // blocks.columns
        return p.wk // blocks.rows if stage in ("keys", "reads") else 1

    def programs(self, stage: str) -> int:
        """Programs of a kernel, but for its parts."""
        if stage in OF_LANES:
            return self.lanes
        if stage in FIRST_WALKS:
            return self.lanes * (self.segments - 1)
        return self.lanes * (self.segments if stage in WALKS else self.chunks)

    def run(self, stage: str) -> None:
        """Run a kernel."""
        numbers = {"heads": self.heads, "chunks": self.chunks, "steps": self.steps, "tokens": self.tokens}
        numbers |= {"segments": self.segments, "span": self.span}
        if self.at_edges and stage in JOINING:  # a segment has one state, as where it is one chunk
            numbers |= {"chunks": self.segments, "span": 1}
        launch(emit(self.problem, stage), self.programs(stage), self.tensors, numbers, self.parts(stage))


def call_of(problem: RecurrenceProblem, inputs: Inputs) -> RecurrenceTensors:
    """A call with nothing computed."""
    return RecurrenceTensors(problem, inputs.q.shape[0], inputs.q.shape[1], inputs.q.shape[2], inputs.q.device)


def problem_of(form: RecurrenceClass, q: Tensor, v: Tensor, dtype: torch.dtype, chunk: int) -> RecurrenceProblem:
    """What kernels are made for."""
    steps = q.shape[2] * form.micro
    length = min(chunk, 64, max(LEAST, 1 << (steps - 1).bit_length()))
    name = str(dtype).removeprefix("torch.")
    return RecurrenceProblem(form, q.shape[-1], v.shape[-1], name, max(length, LEAST), target_of(q.device))


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same with rows side by side that begin at multiples of 16 bytes; copied where they do not."""
    x = x.to(dtype)
    size = x.element_size()
    fits = x.stride(-1) == 1 and all(
        stride * size % VECTOR == 0 for stride, count in zip(x.stride()[:-1], x.shape[:-1], strict=True) if count > 1
    )
    if fits and x.data_ptr() % VECTOR == 0:
        return x
    return like(x, x.shape, dtype).copy_(x)


def like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Not set, of such rows."""
    unit = VECTOR // dtype.itemsize
    width = -(-shape[-1] // unit) * unit
    return torch.empty(*shape[:-1], width, dtype=dtype, device=x.device)[..., : shape[-1]]
