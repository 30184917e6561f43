"""The GPU resources of a pattern: kernels for each head shape, tables for each call shape, built once and cached."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Hashable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.ir import BOUNDARIES, Pattern
from attnc.compiler.kernels.attention_kernels import AttentionKernels, HeadShape, Tiles, find_kernels
from attnc.compiler.kernels.content_mask_tiles import MaskCall
from attnc.compiler.kernels.content_masks import MaskTiles
from attnc.compiler.kernels.index_text import LONGEST, NotInKernelsError
from attnc.compiler.kernels.inputs import input_name, size_name
from attnc.compiler.kernels.kernel_source import Stage, TileShape
from attnc.compiler.kernels.key_gradients import turns_fit
from attnc.compiler.kernels.targets import Target
from attnc.compiler.kernels.tile_tables import tile_tables
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.device_targets import pretended, target_of
from attnc.runtime.call.tensor_checks import TensorSizes, blank, call_shape, check_tensors, names_read
from attnc.runtime.choices.tile_candidates import STAGES, allowed_shapes, knob_of
from attnc.runtime.choices.tuned import Tuned
from attnc.runtime.executors.triton.document_windows import windows_of_boundaries, windows_of_documents
from attnc.runtime.executors.triton.gpu_executor import Prepared
from attnc.runtime.executors.triton.mask_lists import MaskLists, StageTensors
from attnc.runtime.fallbacks import CAST, HOST_LISTS, HOST_WAIT, MOVED, note
from attnc.runtime.planning.plans import Planner, documents_of_call, name_of, planning, relations_of
from attnc.runtime.process.recent import Recent, held_bytes
from attnc.runtime.settings import SETTINGS

_log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Operands(NamedTuple):
    """The tensors of a call; `inputs` in the order of the pattern, `widths` as in `GpuPlanner.prepared`."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Sequence[Tensor]
    widths: tuple[int, int] | None


class GpuPlanner:
    """Kernels and tables of one pattern.

    `strict`: raise UnsupportedError if the host lists tiles in every call.
    """

    def __init__(self, pattern: Pattern, strict: bool = False, tuned: Tuned | None = None, knob: str = "") -> None:
        self._pattern = pattern
        self._strict = strict
        self._tuned = tuned
        self._knob = knob
        self._kernels: Recent[AttentionKernels] = Recent(SETTINGS.plans)
        self._found: Recent[AttentionKernels] = Recent(SETTINGS.plans)
        self._prepared: Recent[Prepared] = Recent(SETTINGS.plans, SETTINGS.table_bytes, held_bytes)
        self._checked = _CheckedDocuments()
        read = names_read(pattern)
        self._planned_from = [tensor.name in read for tensor in pattern.tensors]

    def kernels(
        self,
        heads: HeadShape,
        target: Target,
        square: bool,
        on_host: str | None = None,
        tiles: Tiles | None = None,
        before: bool = False,
    ) -> AttentionKernels:
        """Return the kernels for a head shape; `square`: as many queries as keys; `on_host`: why the host lists tiles.

        `tiles`: tiles of stages that do not use the first choice. `before`: queries precede key 0. Raises
        NotInKernelsError if there are no kernels.
        """
        stage_tiles = tiles or {}
        key = (heads, target, square, on_host, tuple(sorted(stage_tiles.items())), before)
        return self._kernels.get(key, lambda: self._emitted(heads, target, square, on_host, stage_tiles, before))

    def _emitted(
        self, heads: HeadShape, target: Target, square: bool, on_host: str | None, tiles: Tiles, before: bool
    ) -> AttentionKernels:
        began = perf_counter()
        kernels = find_kernels(self._pattern, heads, target, square, on_host, tiles, before)
        ms = 1e3 * (perf_counter() - began)
        _log.debug(
            "`%s` for %s, %s: kernels in %.1f ms, %s", self._pattern.name, target.name, heads, ms, kernels.reason
        )
        return kernels

    def tiles_of(self, heads: HeadShape, target: Target, sizes: TensorSizes, device: torch.device) -> Tiles:
        """Return the tiles that measurements chose for these sizes, by stage; other stages use the first choice."""
        shapes: dict[Stage, TileShape] = {}
        for stage in STAGES if self._tuned is not None else ():
            assert self._tuned is not None
            option = self._tuned.option(knob_of(self._knob, stage), sizes, "triton", device)
            shape = None if option is None else allowed_shapes(target, stage, heads).get(option)
            if shape is not None:
                shapes[stage] = shape
        return shapes

    def kernels_of(
        self,
        heads: HeadShape,
        target: Target,
        sizes: TensorSizes,
        inputs: Mapping[str, object],
        device: torch.device | None = None,
    ) -> AttentionKernels:
        """Return the kernels of a call, from the shapes of its inputs. Raises as `kernels`.

        `device`: the device of the call; None if the call is only inspected.
        """
        square = sizes.n_q == sizes.n_k
        call_sizes = (
            sizes if heads.widths is None else dataclasses.replace(sizes, dk=heads.widths[0], dv=heads.widths[1])
        )
        tiles = {} if device is None else self.tiles_of(heads, target, call_sizes, device)
        before = self._pattern.align == "end" and sizes.n_q > sizes.n_k
        kernels = self.kernels(heads, target, square, None, tiles, before)
        walk = kernels.problem.by_query
        if not isinstance(walk, MaskTiles):
            return kernels
        call = MaskCall(self._pattern, call_shape(self._pattern, sizes, {n: blank(x) for n, x in inputs.items()}))
        refusal = call.refusal(walk.mask_relation, _tiles(kernels).values())
        return kernels if refusal is None else self.kernels(heads, target, square, refusal, tiles)

    def prepared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        widths: tuple[int, int] | None = None,
    ) -> Prepared:
        """Return everything that a call needs besides q, k and v; `inputs` are in the order of the pattern.

        `widths`: dk and dv of the call, if q, k and v are derived vectors of other widths.

        Raises NotInKernelsError, and what a call of an `Attention` raises.
        """
        if q.dtype not in DTYPES:
            raise NotInKernelsError(f"numbers of {q.dtype}".replace("torch.", ""))
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        device = pretended() or q.device
        key: tuple[Hashable, ...] = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, device, tf32, widths)
        if self._tuned is not None:
            key = (*key, self._tuned.state)
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        operands = _Operands(q, k, v, inputs, widths)
        kernels = self._found.get((*key, *shapes), lambda: self._kernels_here(operands, tf32))
        if not inputs:
            return self._prepared.get(key, lambda: self._made(operands, kernels))
        if kernels.form != "lists":  # planning uses no input values
            shared = self._prepared.get((*key, *shapes), lambda: self._made(operands, kernels))
            read = self._read(kernels, operands)
            if shared.lists is None:
                return dataclasses.replace(shared, tensors=read)
            return dataclasses.replace(shared, tensors=StageTensors(read["forward"], self._named(inputs), shared.lists))
        self._note_host(kernels, inputs)
        named = tuple(name_of(x, is_read) for x, is_read in zip(inputs, self._planned_from, strict=True))
        made = self._prepared.get((*key, *named), lambda: self._made(operands, kernels))
        read = self._read(kernels, operands)
        return dataclasses.replace(
            made, tensors={stage: {**stage_tensors, **read[stage]} for stage, stage_tensors in made.tensors.items()}
        )

    def _note_host(self, kernels: AttentionKernels, inputs: Sequence[Tensor]) -> None:
        """Count a call whose tiles the host lists, and the inputs that it reads for them. Raises as `refuse_host`."""
        self.refuse_host(kernels)
        name = self._pattern.name
        if self._pattern.selections:
            note(name, HOST_LISTS, kernels.reason)
        for tensor, x, is_read in zip(self._pattern.tensors, inputs, self._planned_from, strict=True):
            if is_read and x.is_cuda:
                note(name, HOST_WAIT, f"tiles are listed from what the input `{tensor.name}` holds")

    def refuse_host(self, kernels: AttentionKernels) -> None:
        """Raise UnsupportedError under strict if the host would list tiles in every call."""
        if self._strict and kernels.form == "lists" and self._pattern.selections:
            raise UnsupportedError(
                f"strict: `{self._pattern.name}` would have {kernels.reason}; compile it without strict to allow that"
            )

    def _kernels_here(self, operands: _Operands, tf32: bool) -> AttentionKernels:
        q, k, v, inputs, widths = operands
        grouped = q.shape[1] != k.shape[1]
        heads = HeadShape(q.shape[3], v.shape[3], str(q.dtype).removeprefix("torch."), tf32, widths, grouped)
        with planning():
            return self.kernels_of(heads, target_of(q.device), check_tensors(q, k, v), self._named(inputs), q.device)

    def _made(self, operands: _Operands, kernels: AttentionKernels) -> Prepared:
        """Build everything but the tensors that kernels of ranges read; no input values enter it."""
        q, k, v, inputs, widths = operands
        sizes = check_tensors(q, k, v)
        if max(sizes.n_q, sizes.n_k) > LONGEST:
            raise ArgumentError(f"{max(sizes.n_q, sizes.n_k)} tokens are too many for kernels: use {LONGEST} at most")
        if sizes.heads > sizes.kv_heads and not turns_fit(sizes.heads // max(sizes.kv_heads, 1), sizes.n_q):
            raise ArgumentError(
                f"{sizes.n_q} queries of heads that share keys are too many for kernels: use fewer queries"
            )
        walk = kernels.problem.by_query
        ranged = kernels.form != "lists"
        named_inputs = self._named(inputs)
        if widths is not None:
            sizes = dataclasses.replace(sizes, dk=widths[0], dv=widths[1])
        shape = call_shape(
            self._pattern, sizes, {n: blank(x) for n, x in named_inputs.items()} if ranged else named_inputs
        )
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
        if isinstance(walk, MaskTiles):
            lists = MaskLists(MaskCall(self._pattern, shape), walk.mask_relation, _tiles(kernels), q.device)
            return Prepared(kernels, {}, numbers, lists=lists)
        if ranged:
            return Prepared(kernels, {}, numbers)
        with planning():
            tables, runs = self._tables(kernels, relations_of(self._pattern, shape), q.device)
        return Prepared(kernels, tables, numbers, runs)

    def _named(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        names = [tensor.name for tensor in self._pattern.tensors]
        if len(names) != len(inputs):
            raise ArgumentError(f"`{self._pattern.name}` has {len(names)} inputs and is given {len(inputs)}")
        return dict(zip(names, inputs, strict=True))

    def _tables(
        self, kernels: AttentionKernels, relations: Relations, device: torch.device
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, bool]]:
        """Return the lists of every kernel, and whether they are lists of runs."""
        tables, runs = {}, {}
        for source in (kernels.forward, kernels.dq, kernels.dkdv):
            tiles = source.tiles
            try:
                lists = tile_tables(relations, tiles.q_tile, tiles.k_tile, by_key=source.stage == "dkdv")
            except (TooManyTilesError, TooManyClassesError) as error:
                message = (
                    f"tiles of {tiles.q_tile}×{tiles.k_tile} with more tiles or distinct masks than lists can hold"
                )
                raise NotInKernelsError(message) from error
            runs[source.stage] = lists.runs
            tables[source.stage] = {n: torch.from_numpy(x.copy()).to(device) for n, x in lists.arrays().items()}
        return tables, runs

    def _read(self, kernels: AttentionKernels, operands: _Operands) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that kernels of ranges read, by kernel."""
        q, k, _, inputs, _ = operands
        named_inputs, device = self._named(inputs), q.device
        name, tensors = self._pattern.name, [t for t in kernels.problem.tensors if t.name in named_inputs]
        read = {input_name(t): as_read(name, t.name, named_inputs[t.name], device) for t in tensors}
        tensors_by_stage: dict[str, dict[str, Tensor]] = {stage: dict(read) for stage in ("forward", "dq", "dkdv")}
        documents = self._pattern.documents
        if documents is not None:
            ids, n_q, n_k = named_inputs[documents.name], q.shape[2], k.shape[2]
            self._checked.check(self._pattern, ids, n_q, n_k)
            if BOUNDARIES in documents.dims:
                windows = windows_of_boundaries(ids.to(device), n_q, n_k, self._pattern.align)
            else:
                device_ids = ids.to(device)
                windows = windows_of_documents(
                    device_ids if "batch" in documents.dims else device_ids[None], n_q, self._pattern.align
                )
            for stage, tables in tensors_by_stage.items():
                tables["windows"] = windows[stage == "dkdv"]
        return tensors_by_stage


def gpu_planner(planner: Planner) -> GpuPlanner:
    """Return the kernels and tables of a planner's pattern."""
    return planner.part(_gpu_planner)


def _gpu_planner(planner: Planner) -> GpuPlanner:
    return GpuPlanner(planner.pattern, planner.strict, planner.tuned, planner.knob)


class _CheckedDocuments:
    """Ids and boundaries that were checked: checking waits for the device, so each tensor is checked once.

    Nothing is checked while a CUDA graph is captured. Threads may check the same tensor, or evict what other threads
    have checked; it is then checked again.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def check(self, pattern: Pattern, ids: Tensor, n_q: int, n_k: int) -> None:
        """Raise ArgumentError for scattered documents, and for invalid boundaries."""
        entry = self._seen.get(id(ids))
        if entry is not None and entry[0]() is ids and entry[1] == ids._version:
            return
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if ids.is_cuda and pattern.documents is not None:
            note(pattern.name, HOST_WAIT, f"`{pattern.documents.name}` is checked, once for each tensor")
        documents_of_call(pattern, ids.detach().cpu().numpy(), n_q, n_k)
        if len(self._seen) >= SETTINGS.plans:
            self._seen.clear()
        self._seen[id(ids)] = (weakref.ref(ids), ids._version)


def _tiles(kernels: AttentionKernels) -> dict[str, tuple[int, int]]:
    """Return the tiles of kernels that walk lists."""
    sources = (kernels.forward, kernels.dq, kernels.dkdv)
    return {source.stage: (source.tiles.q_tile, source.tiles.k_tile) for source in sources}


def as_read(pattern: str, name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """Return an input as kernels read it: 32-bit numbers, contiguous along the last dimension."""
    x = _as_read(tensor, device)
    if tensor.device != device:
        note(pattern, MOVED, f"the input `{name}` is on {tensor.device.type}")
    if x.dtype.itemsize < tensor.dtype.itemsize:
        note(pattern, CAST, f"the input `{name}`: {tensor.dtype} to {x.dtype}".replace("torch.", ""))
    return x


def _as_read(x: Tensor, device: torch.device) -> Tensor:
    x = x.to(device)
    if x.is_floating_point():
        x = x.float()
    elif x.dtype != torch.bool:
        x = x.to(torch.int32)
    return x if not x.ndim or x.stride(-1) == 1 else x.contiguous()
