"""What a pattern needs on a GPU: kernels for each kind of head, tables for each call shape, made once and kept."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Hashable, Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.ir import BOUNDARIES, Pattern
from attnc.compiler.kernels.attention_kernels import AttentionKernels, HeadShape, Tiles, find_kernels
from attnc.compiler.kernels.content_mask_tiles import MaskCall
from attnc.compiler.kernels.content_masks import MaskTiles
from attnc.compiler.kernels.index_text import LONGEST, NotInKernelsError
from attnc.compiler.kernels.inputs import input_name, size_name
from attnc.compiler.kernels.kernel_source import Stage
from attnc.compiler.kernels.key_gradients import turns_fit
from attnc.compiler.kernels.targets import Target
from attnc.compiler.kernels.tile_tables import tile_tables
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.simulation.gpu_clocks import TileShape
from attnc.runtime.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.fallbacks import CAST, HOST_LISTS, HOST_WAIT, MOVED, note
from attnc.runtime.gpu.device_targets import pretended, target_of
from attnc.runtime.gpu.document_windows import windows_of_boundaries, windows_of_documents
from attnc.runtime.gpu.gpu_executor import Prepared
from attnc.runtime.gpu.mask_lists import MaskLists, StageTensors
from attnc.runtime.plans import documents_of_call, name_of, planning, relations_of
from attnc.runtime.recent import Recent, held_bytes
from attnc.runtime.settings import SETTINGS
from attnc.runtime.tensor_checks import TensorSizes, blank, call_shape, check_tensors, names_read
from attnc.runtime.tuning.tile_candidates import STAGES, allowed_shapes, knob_of
from attnc.runtime.tuning.tuned import Tuned

_log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GpuPlanner:
    """Kernels and tables of one pattern.

    `strict`: raise UnsupportedError where the host lists tiles in every call.
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
        """The kernels for such heads, and as many queries as keys; `on_host`: why the host lists tiles.

        `tiles`: those of some stages, where they are not the first choice. `before`: queries stand before key 0. Raises
        NotInKernelsError where there are none.
        """
        own = tiles or {}
        key = (heads, target, square, on_host, tuple(sorted(own.items())), before)
        return self._kernels.get(key, lambda: self._emitted(heads, target, square, on_host, own, before))

    def _emitted(
        self, heads: HeadShape, target: Target, square: bool, on_host: str | None, tiles: Tiles, before: bool
    ) -> AttentionKernels:
        began = perf_counter()
        found = find_kernels(self._pattern, heads, target, square, on_host, tiles, before)
        ms = 1e3 * (perf_counter() - began)
        _log.debug("`%s` for %s, %s: kernels in %.1f ms, %s", self._pattern.name, target.name, heads, ms, found.reason)
        return found

    def tiles_of(self, heads: HeadShape, target: Target, sizes: TensorSizes, device: torch.device) -> Tiles:
        """The tiles that measuring has chosen for calls of these sizes, by stage; others take the first choice."""
        found: dict[Stage, TileShape] = {}
        for stage in STAGES if self._tuned is not None else ():
            assert self._tuned is not None
            option = self._tuned.option(knob_of(self._knob, stage), sizes, "triton", device)
            shape = None if option is None else allowed_shapes(target, stage, heads).get(option)
            if shape is not None:
                found[stage] = shape
        return found

    def kernels_of(
        self,
        heads: HeadShape,
        target: Target,
        sizes: TensorSizes,
        given: Mapping[str, object],
        device: torch.device | None = None,
    ) -> AttentionKernels:
        """The kernels of a call, of whose inputs shapes alone are asked. Raises as `kernels`.

        `device`: where it runs, None: where something is only looked at.
        """
        square = sizes.n_q == sizes.n_k
        called = sizes if heads.widths is None else dataclasses.replace(sizes, dk=heads.widths[0], dv=heads.widths[1])
        tiles = {} if device is None else self.tiles_of(heads, target, called, device)
        before = self._pattern.align == "end" and sizes.n_q > sizes.n_k
        kernels = self.kernels(heads, target, square, None, tiles, before)
        walk = kernels.problem.by_query
        if not isinstance(walk, MaskTiles):
            return kernels
        refusal = self._asked_call(sizes, given).refusal(walk.asked, _tiles(kernels).values())
        return kernels if refusal is None else self.kernels(heads, target, square, refusal, tiles)

    def _asked_call(self, sizes: TensorSizes, given: Mapping[str, object]) -> MaskCall:
        return MaskCall(self._pattern, call_shape(self._pattern, sizes, {n: blank(x) for n, x in given.items()}))

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
        place = pretended() or q.device
        key: tuple[Hashable, ...] = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, place, tf32, widths)
        if self._tuned is not None:
            key = (*key, self._tuned.state)
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        kernels = self._found.get((*key, *shapes), lambda: self._kernels_here(q, k, v, inputs, tf32, widths))
        if not inputs:
            return self._prepared.get(key, lambda: self._made(q, k, v, (), kernels, widths))
        if kernels.form != "lists":  # nothing is planned from what inputs hold
            alike = self._prepared.get((*key, *shapes), lambda: self._made(q, k, v, inputs, kernels, widths))
            read = self._read(kernels, q, k, inputs)
            if alike.lists is None:
                return dataclasses.replace(alike, tensors=read)
            return dataclasses.replace(alike, tensors=StageTensors(read["forward"], self._named(inputs), alike.lists))
        self._note_host(kernels, inputs)
        named = tuple(name_of(x, is_read) for x, is_read in zip(inputs, self._planned_from, strict=True))
        made = self._prepared.get((*key, *named), lambda: self._made(q, k, v, inputs, kernels, widths))
        read = self._read(kernels, q, k, inputs)
        return dataclasses.replace(made, tensors={stage: {**own, **read[stage]} for stage, own in made.tensors.items()})

    def _note_host(self, kernels: AttentionKernels, inputs: Sequence[Tensor]) -> None:
        """Count a call whose tiles the host lists, and what it reads for it. Raises as `refuse_host`."""
        self.refuse_host(kernels)
        name = self._pattern.name
        if self._pattern.selections:
            note(name, HOST_LISTS, kernels.reason)
        for tensor, x, is_read in zip(self._pattern.tensors, inputs, self._planned_from, strict=True):
            if is_read and x.is_cuda:
                note(name, HOST_WAIT, f"tiles are listed from what the input `{tensor.name}` holds")

    def refuse_host(self, kernels: AttentionKernels) -> None:
        """Raise UnsupportedError where the host would list tiles in every call, if it is to be strict."""
        if self._strict and kernels.form == "lists" and self._pattern.selections:
            raise UnsupportedError(
                f"strict: `{self._pattern.name}` would have {kernels.reason}; compile it without strict to allow that"
            )

    def _kernels_here(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        tf32: bool,
        widths: tuple[int, int] | None,
    ) -> AttentionKernels:
        grouped = q.shape[1] != k.shape[1]
        heads = HeadShape(q.shape[3], v.shape[3], str(q.dtype).removeprefix("torch."), tf32, widths, grouped)
        with planning():
            return self.kernels_of(heads, target_of(q.device), check_tensors(q, k, v), self._named(inputs), q.device)

    def _made(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        kernels: AttentionKernels,
        widths: tuple[int, int] | None,
    ) -> Prepared:
        """All but the tensors that kernels of ranges read, which no data of inputs enter."""
        sizes = check_tensors(q, k, v)
        if max(sizes.n_q, sizes.n_k) > LONGEST:
            raise ArgumentError(f"there are {max(sizes.n_q, sizes.n_k)} tokens: kernels take {LONGEST} at most")
        if sizes.heads > sizes.kv_heads and not turns_fit(sizes.heads // max(sizes.kv_heads, 1), sizes.n_q):
            raise ArgumentError(f"there are {sizes.n_q} queries of heads that share keys: kernels take fewer of these")
        walk = kernels.problem.by_query
        ranged = kernels.form != "lists"
        given = self._named(inputs)
        if widths is not None:
            sizes = dataclasses.replace(sizes, dk=widths[0], dv=widths[1])
        shape = call_shape(self._pattern, sizes, {n: blank(x) for n, x in given.items()} if ranged else given)
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
            lists = MaskLists(MaskCall(self._pattern, shape), walk.asked, _tiles(kernels), q.device)
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

    def _read(
        self, kernels: AttentionKernels, q: Tensor, k: Tensor, inputs: Sequence[Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors that kernels of ranges read, by kernel."""
        given, device = self._named(inputs), q.device
        name, tensors = self._pattern.name, [t for t in kernels.problem.tensors if t.name in given]
        read = {input_name(t): as_read(name, t.name, given[t.name], device) for t in tensors}
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

    While a CUDA graph is captured nothing is looked at. Threads may look at the same tensor, and forget what others
    have seen: then it is looked at again.
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
        if ids.is_cuda and pattern.documents is not None:
            note(pattern.name, HOST_WAIT, f"`{pattern.documents.name}` is checked, once for each tensor")
        documents_of_call(pattern, ids.detach().cpu().numpy(), n_q, n_k)
        if len(self._seen) >= SETTINGS.plans:
            self._seen.clear()
        self._seen[id(ids)] = (weakref.ref(ids), ids._version)


def _tiles(kernels: AttentionKernels) -> dict[str, tuple[int, int]]:
    """The tiles of kernels that walk lists."""
    sources = (kernels.forward, kernels.dq, kernels.dkdv)
    return {source.stage: (source.tiles.q_tile, source.tiles.k_tile) for source in sources}


def as_read(pattern: str, name: str, given: Tensor, device: torch.device) -> Tensor:
    """An input as kernels read it: numbers of 32 bits, those of the last dimension side by side."""
    x = _as_read(given, device)
    if given.device != device:
        note(pattern, MOVED, f"the input `{name}` is on {given.device.type}")
    if x.dtype.itemsize < given.dtype.itemsize:
        note(pattern, CAST, f"the input `{name}`: {given.dtype} to {x.dtype}".replace("torch.", ""))
    return x


def _as_read(x: Tensor, device: torch.device) -> Tensor:
    x = x.to(device)
    if x.is_floating_point():
        x = x.float()
    elif x.dtype != torch.bool:
        x = x.to(torch.int32)
    return x if not x.ndim or x.stride(-1) == 1 else x.contiguous()
