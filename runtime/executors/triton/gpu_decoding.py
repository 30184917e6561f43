"""Decoding by kernels: a few queries against a cache, in splits of the keys that are merged afterwards.

If each row sees few ranges of keys, the kernel reads the lengths and nothing waits for the device. Other relations are
evaluated on the host, which must know the lengths, and their keys are listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.ir import Pattern, fold
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.decode import MOST_SPLITS, CacheKind
from attnc.compiler.kernels.decode_kernels import DecodeKernels, find_decode, row_tile
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.inputs import input_name
from attnc.compiler.kernels.score_formula import ScoreFormula
from attnc.compiler.kernels.value_text import LOG2_E
from attnc.compiler.kernels.visible_products import RESULT_SUM
from attnc.compiler.kernels.walks import RangedWalk
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.call.length_groups import cut
from attnc.runtime.call.tensor_checks import TensorSizes, as_tensor, call_shape
from attnc.runtime.executors.cpu.cpu_decoding import SharedKeys, look
from attnc.runtime.executors.triton.device_cache import DeviceCache
from attnc.runtime.executors.triton.gpu_executor import fitting, on, result_sum, scaled_queries, writable
from attnc.runtime.executors.triton.launch import launch
from attnc.runtime.executors.triton.planner import DTYPES, as_read
from attnc.runtime.executors.triton.score_operands import ScoreOperands
from attnc.runtime.fallbacks import HOST_WAIT, note
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.process.device_constants import on_device

Pair = tuple[Tensor, Tensor]
Int32 = NDArray[np.int32]

LEAST_KEYS = 256
"""Minimum number of keys in a split, by the capacity of the cache."""


@dataclass(frozen=True, eq=False)
class ListedKeys:
    """The keys of every batch entry and kv head, concatenated.

    `rows`: words with a bit for every query, one per key, or one per key and member of the head group.
    """

    pointers: Int32
    keys: Int32
    rows: Int32
    words: int


def decode(
    planner: Planner,
    q: Tensor,
    cache: DeviceCache,
    scale: float,
    real: Mapping[str, Tensor],
    inputs: Mapping[str, object],
) -> Pair:
    """Compute (out, lse) of queries (B, Hq, Nq, dk) for the last rows of a pattern's only attention.

    Raises NotInKernelsError, ArgumentError.
    """
    kernels = _kernels(planner, q, cache)
    if not kernels.listed:
        _check(planner.pattern, q, cache, inputs)
    problem, score = kernels.problem, kernels.problem.score
    batch, heads, queries, _ = q.shape
    group, kv_groups = heads // cache.kv_heads, batch * cache.kv_heads
    dv = cache.v.shape[3]
    name = planner.pattern.name
    out = q.new_empty((batch, heads, queries, dv))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if not out.numel():
        return out, lse
    source = kernels.decode(group * queries)
    row_tiles = -(-group * queries // row_tile(group * queries))
    splits = _splits(q.device, kv_groups * row_tiles, cache.capacity)
    scaled_q, factor = scaled_queries(q, scale) if score is None else (q, scale)
    tensors: dict[str, Tensor] = {
        "q": fitting(name, "q", scaled_q),
        "k": fitting(name, "k_cache", cache.k),
        "v": fitting(name, "v_cache", cache.v),
        "kv_len": cache.lengths,
    }
    tensors["out_parts"] = q.new_empty((splits, *out.shape), dtype=torch.float32)
    tensors["lse_parts"] = q.new_empty((splits, *lse.shape), dtype=torch.float32)
    tensors |= {input_name(t): as_read(name, t.name, as_tensor(inputs[t.name]), q.device) for t in problem.tensors}
    terms = {} if score is None else _terms(planner, score, q, cache, scale, inputs, real)
    numbers: dict[str, int | float] = {
        "lanes": kv_groups,
        "heads": heads,
        "kv_heads": cache.kv_heads,
        "group": group,
        "queries": queries,
        "splits": splits,
        "scale": factor * LOG2_E if score is None else factor,
        **_cache_numbers(cache, tensors),
    }
    same_keys = not isinstance(problem.by_query, RangedWalk) or not problem.by_query.reads_head
    if kernels.listed:
        listed = _listed(planner, q, cache, inputs)
        arrays = {"listed_pointers": listed.pointers, "listed_keys": listed.keys, "listed_rows": listed.rows}
        tensors |= {name: on_device(x, q.device) for name, x in arrays.items()}
        numbers["listed_words"] = listed.words
        same_keys = listed.words == 1
    # If all rows of a program see the same keys, no hidden key is loaded.
    careful = None if queries == 1 and same_keys else kernels.careful(group * queries)
    aligned_out = writable(name, "out", out)
    with on(q):
        launch(source, kv_groups * splits, {**tensors, **terms}, numbers, row_tiles)
        if careful is not None:
            written = {RESULT_SUM.name: result_sum(tensors["out_parts"])}
            launch(careful, kv_groups * splits, {**tensors, **terms, **written}, numbers, row_tiles)
        rows = batch * heads * queries
        merged = {
            "out_parts": tensors["out_parts"],
            "lse_parts": tensors["lse_parts"],
            "out": aligned_out,
            "lse": lse,
            **terms,
        }
        launch(kernels.merge, rows, merged, {**numbers, "rows": rows})
    return (out if aligned_out is out else out.copy_(aligned_out)), lse


def _kernels(planner: Planner, q: Tensor, cache: DeviceCache) -> DecodeKernels:
    if q.dtype not in DTYPES:
        raise NotInKernelsError(f"numbers of {q.dtype}".replace("torch.", ""))
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    heads = HeadShape(q.shape[3], cache.v.shape[3], str(q.dtype).removeprefix("torch."), tf32)
    kind: CacheKind = "pages" if cache.table is not None else "slots" if cache.ring is None else "ring"
    target = target_of(q.device)
    key = "decode", heads, target, kind
    return planner.remembered(key, lambda: find_decode(planner.pattern, heads, target, kind))


def _check(pattern: Pattern, q: Tensor, cache: DeviceCache, inputs: Mapping[str, object]) -> None:
    """Check what planning would check, where nothing is planned. Raises ArgumentError, SpecError, NotInKernelsError."""
    batch, heads, queries, dk = q.shape
    host_lengths = cache.known_lengths
    if pattern.requirements or pattern.segments:
        if host_lengths is None:
            raise NotInKernelsError("decoding with requirements on lengths that only the device knows")
        for length in sorted(set(host_lengths)):
            entries = tuple(i for i, length_inputs in enumerate(host_lengths) if length_inputs == length)
            length_inputs = dict(cut(pattern, inputs, cache.known(), entries, length))
            sizes = TensorSizes(queries, length, len(entries), heads, cache.kv_heads, dk, cache.v.shape[3], "float32")
            relations_of(pattern, call_shape(pattern, sizes, length_inputs))
    for name, count in pattern.head_lists:
        if count != heads:
            raise ArgumentError(f"the parameter `{name}` has {count} entries, one per head; q has {heads} heads")
    least = cache.capacity if host_lengths is None else max(host_lengths, default=0)
    fixed = {"head": heads, "kv_head": cache.kv_heads, "query": queries, "dk": dk, "dv": cache.v.shape[3]}
    for tensor in pattern.tensors:
        shape = tuple(getattr(as_tensor(inputs[tensor.name]), "shape", ()))
        if len(shape) != len(tensor.dims):
            raise ArgumentError(
                f"the input `{tensor.name}` has shape {shape}: it must have {len(tensor.dims)} dimensions"
            )
        for axis, (dim, size) in enumerate(zip(tensor.dims, shape, strict=True)):
            wanted = dim if isinstance(dim, int) else fixed.get(dim, size)
            few = dim in ("token", "key") and size < least
            if few or size != wanted or (dim == "batch" and size not in (1, batch)):
                must = f"at least {least}" if few else batch if dim == "batch" else wanted
                raise ArgumentError(
                    f"the input `{tensor.name}` has size {size} in dimension {axis} (`{dim}`): it must be {must}"
                )


def processors(device: torch.device) -> int:
    """Return the approximate number of programs that run at once."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _splits(device: torch.device, programs: int, capacity: int) -> int:
    """Return the number of splits of the keys of a kv head: enough to fill the device, one for few keys."""
    max_splits = max(1, min(MOST_SPLITS, capacity // LEAST_KEYS))
    return max(1, min(max_splits, -(-processors(device) // max(programs, 1))))


def _cache_numbers(cache: DeviceCache, tensors: dict[str, Tensor]) -> dict[str, int]:
    if cache.table is not None:
        tensors["block_table"] = cache.table
        return {"page_bits": cache.slots.bit_length() - 1, "columns": cache.table.shape[1]}
    return {} if cache.ring is None else {"ring_first": cache.ring, "ring_slots": cache.slots}


_BY_TOKEN = {"query", "key", "token"}
"""Dimensions whose length is that of a call; terms by head read no input with such a dimension."""


def _terms(
    planner: Planner,
    score: ScoreFormula,
    q: Tensor,
    cache: DeviceCache,
    scale: float,
    inputs: Mapping[str, object],
    real: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Compute the terms of a score by head; they do not depend on lengths."""
    if not score.terms and score.extra is None:
        return {}
    queries = q.shape[2]
    node = replace(planner.pattern.attend, visible=fold.truth(True))  # no term reads the relation or lengths
    pattern = checked(replace(planner.pattern, requirements=(), segments=(), documents=None, nodes=(node,)))
    sizes = TensorSizes(
        queries, queries, q.shape[0], q.shape[1], cache.kv_heads, q.shape[3], cache.v.shape[3], "float32"
    )
    indices = {x.name: inputs[x.name] for x in pattern.tensors if not x.is_floating and not _BY_TOKEN & {*x.dims}}
    relations = relations_of(pattern, call_shape(pattern, sizes, indices))
    k, v = cache.placeholders(queries)
    values = [real[tensor.name] for tensor in pattern.tensors if tensor.is_floating]
    terms = ScoreOperands(relations, scale, q, k, v, values).terms(score)
    return {name: x.expand(*x.shape[:2], queries).contiguous() for name, x in terms.items()}


# --- lists -----------------------------------------------------------------------------------------------------------


def _listed(planner: Planner, q: Tensor, cache: DeviceCache, inputs: Mapping[str, object]) -> ListedKeys:
    """List the keys of all batch entries and kv heads. Waits for the device if the lengths are on it."""
    if cache.known_lengths is None:
        note(planner.pattern.name, HOST_WAIT, "keys are listed for each row, and kv_len is on the device")
    host_cache = cache.known()
    kv_heads, (_, heads, queries, dk) = cache.kv_heads, q.shape
    by_entry: dict[int, tuple[SharedKeys, ...]] = {}
    for length in sorted(set(host_cache.lengths)):
        entries = tuple(i for i, entry_length in enumerate(host_cache.lengths) if entry_length == length)
        sizes = TensorSizes(queries, length, len(entries), heads, kv_heads, dk, cache.v.shape[3], "float32")
        looked = look(planner, sizes, dict(cut(planner.pattern, inputs, host_cache, entries, length)))
        for i, entry in enumerate(entries):
            by_entry[entry] = tuple(part for part in looked.parts if i in part.batches)
    same_heads = all(len(part.heads) == heads for parts in by_entry.values() for part in parts)
    group = heads // kv_heads
    words = 1 if same_heads else group
    keys, rows, pointers = [], [], [0]
    for entry in range(len(host_cache.lengths)):
        made: tuple[Int32, Int32] | None = None
        for kv_head in range(kv_heads):
            if made is None or not same_heads:
                members = range(kv_head * group, (kv_head + 1) * group)
                made = _keys_of_members(by_entry[entry], members, words)
            keys.append(made[0])
            rows.append(made[1])
            pointers.append(pointers[-1] + len(made[0]))
    return ListedKeys(np.array(pointers, dtype=np.int32), np.concatenate(keys), np.concatenate(rows).ravel(), words)


def _keys_of_members(parts: Sequence[SharedKeys], members: range, words: int) -> tuple[Int32, Int32]:
    """Return the keys that some of the heads `members` see, ascending, and the row words of each key."""
    every = [part.seen.every[0] + part.window.key for part in parts if set(members) & set(part.heads)]
    keys = np.unique(np.concatenate(every)) if every else np.zeros(0, dtype=np.int64)
    rows = np.zeros((len(keys), words), dtype=np.int64)
    for part in parts:
        part_keys, mask = part.seen.every
        bits = (mask.astype(np.int64) << np.arange(part.window.row, part.window.row + len(mask))[:, None]).sum(0)
        positions = np.searchsorted(keys, part_keys + part.window.key)
        for word in range(words):
            if (members[0] if words == 1 else members[word]) in part.heads:
                rows[positions, word] |= bits
    return keys.astype(np.int32), rows.astype(np.uint32).view(np.int32)
