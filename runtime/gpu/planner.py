"""What a pattern needs on a GPU: kernels for each kind of head, tables for each call shape, made once and kept."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.analysis.tiles import TooManyTilesError
from attnc.compiler.ir import BOUNDARIES, Pattern
from attnc.compiler.kernels.index_text import LONGEST, NotInKernelsError
from attnc.compiler.kernels.inputs import input_name, size_name
from attnc.compiler.kernels.kernels import Heads, Kernels, find_kernels
from attnc.compiler.kernels.key_gradients import turns_fit
from attnc.compiler.kernels.targets import Target
from attnc.compiler.kernels.tile_tables import tile_tables
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.runtime.call import call_shape, check_tensors, names_read
from attnc.runtime.errors import ArgumentError
from attnc.runtime.gpu.executor import Prepared
from attnc.runtime.gpu.targets import target_of
from attnc.runtime.gpu.windows import windows_of_boundaries, windows_of_documents
from attnc.runtime.plans import documents_of_call, name_of, relations_of
from attnc.runtime.recent import Recent
from attnc.runtime.settings import SETTINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GpuPlanner:
    """Kernels and tables of one pattern."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._kernels: Recent[Kernels] = Recent(SETTINGS.plans)
        self._prepared: Recent[Prepared] = Recent(SETTINGS.plans)
        self._checked = _CheckedDocuments()
        read = names_read(pattern)
        self._planned_from = [tensor.name in read for tensor in pattern.tensors]

    def kernels(self, heads: Heads, target: Target, square: bool) -> Kernels:
        """The kernels for such heads, and as many queries as keys. Raises NotInKernelsError where there are none."""
        return self._kernels.get((heads, target, square), lambda: find_kernels(self._pattern, heads, target, square))

    def prepared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        widths: tuple[int, int] | None = None,
    ) -> Prepared:
        """All that a call needs beside q, k and v; `inputs` are the pattern's, in its order.

        `widths`: dk and dv of the call, where q, k and v are made of others.

        Raises NotInKernelsError, and what a call of an `Attention` raises.
        """
        if q.dtype not in DTYPES:
            raise NotInKernelsError(f"numbers of {q.dtype}".replace("torch.", ""))
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, tf32, widths)
        if not inputs:
            return self._prepared.get(key, lambda: self._made(q, k, v, (), tf32, widths))
        if self._kernels_of(q, k, v, tf32, widths).form != "lists":  # nothing is planned from what inputs hold
            shapes = tuple((x.shape, x.dtype) for x in inputs)
            alike = self._prepared.get((*key, *shapes), lambda: self._made(q, k, v, inputs, tf32, widths))
            return dataclasses.replace(alike, tensors=self._read(alike.kernels, q, k, inputs))
        named = tuple(name_of(x, is_read) for x, is_read in zip(inputs, self._planned_from, strict=True))
        made = self._prepared.get((*key, *named), lambda: self._made(q, k, v, inputs, tf32, widths))
        read = self._read(made.kernels, q, k, inputs)
        return dataclasses.replace(made, tensors={stage: {**own, **read[stage]} for stage, own in made.tensors.items()})

    def _kernels_of(self, q: Tensor, k: Tensor, v: Tensor, tf32: bool, widths: tuple[int, int] | None) -> Kernels:
        grouped = q.shape[1] != k.shape[1]
        heads = Heads(q.shape[3], v.shape[3], str(q.dtype).removeprefix("torch."), tf32, widths, grouped)
        return self.kernels(heads, target_of(q.device), q.shape[2] == k.shape[2])

    def _made(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        tf32: bool,
        widths: tuple[int, int] | None,
    ) -> Prepared:
        """All but the tensors that kernels of ranges read, which no data of inputs enter."""
        sizes = check_tensors(q, k, v)
        if max(sizes.n_q, sizes.n_k) > LONGEST:
            raise ArgumentError(f"there are {max(sizes.n_q, sizes.n_k)} tokens: kernels take {LONGEST} at most")
        if sizes.heads > sizes.kv_heads and not turns_fit(sizes.heads // max(sizes.kv_heads, 1), sizes.n_q):
            raise ArgumentError(f"there are {sizes.n_q} queries of heads that share keys: kernels take fewer of these")
        kernels = self._kernels_of(q, k, v, tf32, widths)
        ranged = kernels.form != "lists"
        given = self._named(inputs)
        if widths is not None:
            sizes = dataclasses.replace(sizes, dk=widths[0], dv=widths[1])
        shape = call_shape(self._pattern, sizes, {n: _blank(x) for n, x in given.items()} if ranged else given)
        shift = sizes.n_k - sizes.n_q if self._pattern.align == "end" else 0
        sizes_of = {**shape.sizes, **(self._pattern.general.sizes if self._pattern.general else {})}
        numbers = {
            "heads": sizes.heads,
            "group": sizes.heads // max(sizes.kv_heads, 1),
            "queries": sizes.n_q,
            "keys": sizes.n_k,
            "shift": shift,
            "distances": sizes.n_k - 1 - shift,
            **{size_name(name): sizes_of[name] for name in kernels.problem.sizes},
        }
        if ranged:
            return Prepared(kernels, {}, numbers)
        tables, runs = self._tables(kernels, relations_of(self._pattern, shape), q.device)
        return Prepared(kernels, tables, numbers, runs)

    def _named(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        names = [tensor.name for tensor in self._pattern.tensors]
        if len(names) != len(inputs):
            raise ArgumentError(f"`{self._pattern.name}` has {len(names)} inputs and is given {len(inputs)}")
        return dict(zip(names, inputs, strict=True))

    def _tables(
        self, kernels: Kernels, relations: Relations, device: torch.device
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, bool]]:
        """The lists of every kernel, and whether they are of runs."""
        tables, runs = {}, {}
        for source in (kernels.forward, kernels.dq, kernels.dkdv):
            tiles = source.tiles
            try:
                found = tile_tables(relations, tiles.q_tile, tiles.k_tile, by_key=source.stage == "dkdv")
            except (TooManyTilesError, TooManyClassesError) as error:
                message = f"tiles of {tiles.q_tile}×{tiles.k_tile} that are too unlike each other to be listed"
                raise NotInKernelsError(message) from error
            runs[source.stage] = found.runs
            tables[source.stage] = {n: torch.from_numpy(x.copy()).to(device) for n, x in found.arrays().items()}
        return tables, runs

    def _read(self, kernels: Kernels, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """The tensors that kernels of ranges read, by kernel."""
        given, device = self._named(inputs), q.device
        read = {input_name(t): as_read(given[t.name], device) for t in kernels.problem.tensors}
        found: dict[str, dict[str, Tensor]] = {stage: dict(read) for stage in ("forward", "dq", "dkdv")}
        documents = self._pattern.documents
        if documents is not None:
            ids, n_q, n_k = given[documents.name], q.shape[2], k.shape[2]
            self._checked.check(self._pattern, ids, n_q, n_k)
            if BOUNDARIES in documents.dims:
                windows = windows_of_boundaries(ids.to(device), n_q, n_k, self._pattern.align)
            else:
                whole = ids.to(device)
                windows = windows_of_documents(
                    whole if "batch" in documents.dims else whole[None], n_q, self._pattern.align
                )
            for stage, tables in found.items():
                tables["windows"] = windows[stage == "dkdv"]
        return found


class _CheckedDocuments:
    """Ids and boundaries that were looked at: looking waits for the device, so each tensor is looked at once.

    While a CUDA graph is captured nothing is looked at.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def check(self, pattern: Pattern, ids: Tensor, n_q: int, n_k: int) -> None:
        """Raise ArgumentError for documents that are scattered, and for boundaries that are none."""
        known = self._seen.get(id(ids))
        if known is not None and known[0]() is ids and known[1] == ids._version:
            return
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        documents_of_call(pattern, ids.detach().cpu().numpy(), n_q, n_k)
        if len(self._seen) >= SETTINGS.plans:
            self._seen.clear()
        self._seen[id(ids)] = (weakref.ref(ids), ids._version)


def _blank(x: Tensor) -> NDArray[Any]:
    """An array of the shape and kind of a tensor, without its data."""
    kind = np.bool_ if x.dtype == torch.bool else np.float32 if x.is_floating_point() else np.int64
    return np.broadcast_to(np.zeros((), dtype=kind), tuple(x.shape))


def as_read(x: Tensor, device: torch.device) -> Tensor:
    """An input as kernels read it: numbers of 32 bits, those of the last dimension side by side."""
    x = x.to(device)
    if x.is_floating_point():
        x = x.float()
    elif x.dtype != torch.bool:
        x = x.to(torch.int32)
    return x if not x.ndim or x.stride(-1) == 1 else x.contiguous()
