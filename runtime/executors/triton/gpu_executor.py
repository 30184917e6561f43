"""The triton executor: attention by emitted kernels, forward and backward.

Everything that a call needs besides its tensors (`Prepared`) is built once per call shape and cached. A call only
launches kernels and allocates its results, so it can be captured in a CUDA graph once it has run. Nothing is atomic:
equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.kernels.attention_kernels import AttentionKernels
from attnc.compiler.kernels.delta import ROWS
from attnc.compiler.kernels.inputs import input_name
from attnc.compiler.kernels.kernel_source import VECTOR, KernelSource, Stage
from attnc.compiler.kernels.pair_gradients import ENTRIES, varying_dimension
from attnc.compiler.kernels.value_text import LOG2_E
from attnc.compiler.kernels.visible_products import RESULT_SUM
from attnc.runtime.executors.cpu.cpu_executor import empty_like
from attnc.runtime.executors.triton.launch import launch, lies_evenly
from attnc.runtime.executors.triton.mask_lists import MaskLists
from attnc.runtime.fallbacks import COPY, note
from attnc.runtime.process.device_constants import keep_captured

NOTHING: Mapping[str, Tensor] = {}

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]

WRITTEN: Mapping[str, tuple[str, ...]] = {"forward": ("out",), "dq": ("dq",), "dkdv": ("dk", "dv")}
"""The results that a hidden pair can make NaN, by stage."""

FARTHEST = 1 << 24
"""Maximum distance between two tokens in units of 16 bytes, so that offsets inside a tile fit into 32 bits."""


@dataclass(frozen=True)
class Prepared:
    """The kernels of a call, the tensors they read besides the call's, by kernel, and their scalar arguments.

    `runs`: the kernels that walk runs of tiles. `lists`: the builder of tile lists from selections.
    """

    kernels: AttentionKernels
    tensors: Mapping[str, Mapping[str, Tensor]]
    numbers: Mapping[str, int]
    runs: Mapping[str, bool] = field(default_factory=dict)
    lists: MaskLists | None = None

    def source(self, stage: Stage) -> KernelSource:
        """Return the kernel of a stage."""
        return self.kernels.listed(stage, self.runs.get(stage, False))

    def careful(self, stage: Stage) -> KernelSource | None:
        """Return the careful kernel that follows the stage's kernel, if the stage needs one."""
        careful = self.kernels.careful
        return None if careful is None else careful.listed(stage, self.runs.get(stage, False))


def scaled_queries(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a factor whose products equal q times the scale.

    The factor is positive: kernels take the maximum of a row before they scale.
    """
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


@dataclass(frozen=True)
class ScaledKernels:
    """The kernels and the scale of one call shape."""

    prepared: Prepared
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: Mapping[str, Tensor] = NOTHING) -> Pair:
        """Compute attention of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk) and v (B, Hkv, Nk, dv).

        `terms`: the inputs of a score besides products, fp32 (B or 1, Hq or 1, Nq, Nk or distances), by name.

        Returns out (B, Hq, Nq, dv) in the dtype of q, with the strides of `empty_like`, and the natural LSE (B, Hq,
        Nq), fp32; without a softmax the LSE is replaced by the sum of a row's weights, or left unset. Rows that see no
        key: 0 and −inf.
        """
        out = empty_like(q, (*q.shape[:3], v.shape[-1]), q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if not out.numel() or not k.numel():
            return out.zero_(), lse.fill_(-math.inf)
        scaled_q, factor = self._scaled(q)
        writable = self._writable("out", out)
        tensors = {name: self._fit(name, x) for name, x in (("q", scaled_q), ("k", k), ("v", v))}
        tensors |= {"out": writable, **terms}
        tensors |= {"lse": lse, "total": lse}
        self._launch("forward", q.shape[2], q.shape[0] * q.shape[1], tensors, factor)
        return (out if writable is out else out.copy_(writable)), lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        kept: Sequence[Tensor],
        terms: Mapping[str, Tensor] = NOTHING,
        tables: Sequence[str] = (),
    ) -> tuple[Triple, dict[str, Tensor]]:
        """Compute (dq, dk, dv) of `forward`, and the gradients of terms by name, (B, Hq, tokens).

        `tables`: inputs read pair by pair whose gradients are requested, (B, Hq, entries). `kept`: q, k, v, out, lse.
        Rows that see no key give exactly 0.
        """
        q, k, v, out, lse, *_ = kept
        grads = tuple(empty_like(x, x.shape, x.dtype) for x in (q, k, v))
        of_terms = self._gradients(q, k)
        if not out.numel() or not k.numel():
            return (grads[0].zero_(), grads[1].zero_(), grads[2].zero_()), {n: x.zero_() for n, x in of_terms.items()}
        scaled_q, factor = self._scaled(q)
        all_read = (("q", scaled_q), ("k", k), ("v", v), ("dout", grad_out), ("out", out))
        inputs = {name: self._fit(name, x) for name, x in all_read}
        lse2, delta = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(2))
        row_tensors = {"lse": lse.contiguous(), "lse2": lse2, "delta": delta}
        row_tensors |= {"total": row_tensors["lse"], "share": lse2}
        if grad_lse is not None:
            row_tensors["dlse"] = grad_lse.float().contiguous()
        kernels = self.prepared.kernels
        delta_kernel = kernels.delta if grad_lse is None else kernels.delta_with_lse
        batch_heads, batch_kv_heads = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
        written = {name: self._writable(name, x) for name, x in zip(("dq", "dk", "dv"), grads, strict=True)}
        if kernels.problem.kind != "sum":
            with on(q):
                tensors = {**inputs, **row_tensors}
                numbers = {"lanes": batch_heads, "heads": q.shape[1], "queries": q.shape[2]}
                launch(delta_kernel, -(-q.shape[2] // ROWS) * batch_heads, tensors, numbers)
        tensors = {**inputs, **written, "lse": lse2, "share": lse2, "delta": delta, **terms}
        tensors.update((f"d{name}", x) for name, x in of_terms.items())
        self._launch("dq", q.shape[2], batch_heads, tensors, factor)
        self._launch("dkdv", k.shape[2], batch_kv_heads, tensors, factor)
        results = [
            x if scaled_q is x else x.copy_(scaled_q) for x, scaled_q in zip(grads, written.values(), strict=True)
        ]
        if self.prepared.kernels.problem.score is None and self.scale <= 0:
            results[0].mul_(-1 if self.scale else 0)
        if "of_extra" in terms:  # the extra logit has the value 0, and its weight follows from the LSE
            share = torch.exp(terms["of_extra"] - torch.where(lse == -math.inf, math.inf, lse))
            of_terms["of_extra"] = -share * delta
        self._add_shifts(of_terms, grad_lse, lse)
        of_pairs = {"q": inputs["q"], "k": inputs["k"], "v": inputs["v"], "dout": inputs["dout"]}
        of_pairs |= {"lse": lse2, "share": lse2, "delta": delta, **terms}
        for name, source in kernels.of_distances.items():
            of_terms[name] = self._distance_gradient(source, of_pairs, factor)
        for name in tables:
            of_terms[name] = self._table_gradient(kernels.of_tables[name], name, of_pairs, factor)
        return (results[0], results[1], results[2]), of_terms

    def _add_shifts(self, of_terms: dict[str, Tensor], grad_lse: Tensor | None, lse: Tensor) -> None:
        """Add the gradients of terms that shift all scores of a row (`ScoreFormula.shifts_rows`)."""
        score = self.prepared.kernels.problem.score
        for term in () if score is None else score.terms:
            if score is not None and term.varies and score.shifts_rows(term):
                grad = torch.zeros_like(lse) if grad_lse is None else grad_lse.float()
                if "of_extra" in of_terms:
                    grad = grad - of_terms["of_extra"]
                of_terms[term.tensor.name] = torch.where(lse == -math.inf, 0, grad)

    def _distance_gradient(self, source: KernelSource, tensors: Mapping[str, Tensor], factor: float) -> Tensor:
        """Compute the gradient of a term of the distance, (B, Hq, distances)."""
        q, k, side = tensors["q"], tensors["k"], source.tiles.q_tile
        rows, columns = (-(-x.shape[2] // side) for x in (q, k))
        diagonals, batch_heads = rows + columns - 1, q.shape[0] * q.shape[1]
        sums = q.new_empty((batch_heads, diagonals, 2 * side - 1), dtype=torch.float32)
        with on(q):
            launch(
                source,
                diagonals * batch_heads,
                {**tensors, "sums": sums, **self._own(source)},
                self._numbers(batch_heads, factor),
            )
        # Diagonal i holds the distances from (i - columns) * side + 1 on: one block of `side` distances, and the next
        # block.
        by_diagonal = q.new_zeros((batch_heads, diagonals + 1, side), dtype=torch.float32)
        by_diagonal[:, :-1] += sums[:, :, :side]
        by_diagonal[:, 1:, : side - 1] += sums[:, :, side:]
        first = columns * side - 1 - (k.shape[2] - 1)
        gradient = by_diagonal.flatten(1)[:, first : first + q.shape[2] + k.shape[2] - 1]
        return gradient.reshape(*q.shape[:2], -1)

    def _table_gradient(self, source: KernelSource, name: str, tensors: Mapping[str, Tensor], factor: float) -> Tensor:
        """Compute the gradient of an input that is read pair by pair, (B, Hq, entries)."""
        q = tensors["q"]
        kernel_tensors = self._own(source)
        tensor = self.tensor(name)
        entries = kernel_tensors[input_name(tensor)].shape[varying_dimension(tensor)]
        rows, batch_heads, chunks = (
            -(-q.shape[2] // source.tiles.q_tile),
            q.shape[0] * q.shape[1],
            -(-entries // ENTRIES),
        )
        sums = q.new_empty((batch_heads, rows, chunks, ENTRIES), dtype=torch.float32)
        with on(q):
            numbers = self._numbers(batch_heads, factor)
            launch(source, rows * batch_heads, {**tensors, "sums": sums, **kernel_tensors}, numbers, chunks)
        return sums.sum(1).flatten(1)[:, :entries].reshape(*q.shape[:2], entries)

    def tensor(self, name: str) -> ir.Tensor:
        """Return the input with a name."""
        return next(tensor for tensor in self.prepared.kernels.problem.tensors if tensor.name == name)

    def _own(self, source: KernelSource) -> Mapping[str, Tensor]:
        """Return the tensors that a kernel reads besides the tensors of the call."""
        tensors = self.prepared.tensors
        return tensors[source.stage] if source.stage in tensors else tensors.get("dq", {})

    def _numbers(self, batch_heads: int, factor: float) -> dict[str, int | float]:
        plain = self.prepared.kernels.problem.score is None
        return {**self.prepared.numbers, "lanes": batch_heads, "scale": factor * LOG2_E if plain else factor}

    def _gradients(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """Allocate the gradients of terms."""
        score = self.prepared.kernels.problem.score
        tokens = {"query": q.shape[2], "key": k.shape[2]}
        return {
            term.tensor.name: q.new_empty((*q.shape[:2], tokens[term.side]), dtype=torch.float32)
            for term in (() if score is None else score.terms)
            if term.varies and term.side in tokens and not (score and score.shifts_rows(term))
        }

    @property
    def _is_folded(self) -> bool:
        """Whether kernels address the heads of all batch entries as one side of a box."""
        bricks = self.prepared.kernels.bricked.values()
        return self.prepared.kernels.problem.boxes and any(brick_tiles.grid.is_folded for brick_tiles in bricks)

    def _fit(self, name: str, x: Tensor) -> Tensor:
        """Return the tensor, copied if kernels cannot address it."""
        return fitting(self.prepared.kernels.problem.name, name, x, folded=self._is_folded)

    def _writable(self, name: str, x: Tensor) -> Tensor:
        """Return the tensor, or other memory whose contents are copied into it afterwards."""
        return writable(self.prepared.kernels.problem.name, name, x, folded=self._is_folded)

    def _scaled(self, q: Tensor) -> tuple[Tensor, float]:
        """Return queries and the scale; in a custom score the scale is a number in a formula and may have any sign."""
        return scaled_queries(q, self.scale) if self.prepared.kernels.problem.score is None else (q, self.scale)

    def _launch(
        self, stage: Stage, tokens: int, batch_heads: int, tensors: Mapping[str, Tensor], factor: float
    ) -> None:
        """Launch the kernel of a stage, and its careful variant, which returns at once if all results are finite."""
        source, careful = self.prepared.source(stage), self.prepared.careful(stage)
        kernel_tensors, numbers = self._own(source), self._numbers(batch_heads, factor)
        keep_captured(kernel_tensors.values())
        with on(tensors["q"]):
            programs = (source.row_tiles or -(-tokens // source.stationary)) * batch_heads
            launch(source, programs, {**tensors, **kernel_tensors}, numbers)
            if careful is not None:
                written = result_sum(*(tensors[name] for name in WRITTEN[stage]))
                launch(careful, programs, {**tensors, **kernel_tensors, RESULT_SUM.name: written}, numbers)


def result_sum(*results: Tensor) -> Tensor:
    """Sum all entries in fp32: finite unless an entry is NaN or infinite, or the sum overflows."""
    return reduce(torch.add, [x.sum(dtype=torch.float32) for x in results])


def fitting(pattern: str, name: str, x: Tensor, *, folded: bool = False) -> Tensor:
    """Return the tensor, copied if kernels cannot address it; the arguments are those of `writable`."""
    room = writable(pattern, name, x, folded=folded)
    return x if room is x else room.copy_(x)


def writable(pattern: str, name: str, x: Tensor, *, folded: bool = False) -> Tensor:
    """Return the tensor, or memory that kernels can address and that is copied into it afterwards.

    `pattern` and `name` identify the tensor in the note about the copy. `folded`: heads must be evenly spaced.
    """
    if _fits(x) and (not folded or lies_evenly(x)):
        return x
    text = f"{name}: kernels address rows in units of {VECTOR} bytes, but its strides or start are not multiples"
    note(pattern, COPY, text)
    unit = VECTOR // x.element_size()  # rows begin at multiples of 16 bytes
    width = -(-x.shape[3] // unit) * unit
    return x.new_empty((*x.shape[:3], width))[..., : x.shape[3]]


def on(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _fits(x: Tensor) -> bool:
    """Check whether kernels can address a tensor (batch, head, token, width) without a copy: in units of 16 bytes."""
    size = x.element_size()
    aligned = all(n == 1 or (s * size % VECTOR == 0 and s > 0) for s, n in zip(x.stride()[:3], x.shape, strict=False))
    near = x.stride(2) * size // VECTOR <= FARTHEST or x.shape[2] == 1
    return aligned and near and (x.stride(3) == 1 or x.shape[3] == 1) and x.data_ptr() % VECTOR == 0
