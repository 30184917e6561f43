"""Decode on a GPU: results from slots and pages, replays for other lengths, and speed.

Speed is compared with a copy of the keys in the same run, and with SDPA, FlexAttention, FlashAttention and FlashInfer
over all keys. Besides the whole cache: a window with sinks; the best blocks by a gate, different for each kv head
(`pages`, by `prefill`, as there are no kernels of `decode` with selections); and the best pages as a table (`table`).
`live` is the share of the cache that a sparse step reads. Short steps are timed as CUDA graphs. Caches are those of 2 M
tokens or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from baselines import flash_attention, flashinfer, flex, published, sdpa
from baselines.rival import Absent, Attend
from benchmark_part import Row, Setting
from gpu_check import CHECKED, Checked
from gpu_parts import TOLERANCE, fits, gap, median, operands, refusal, replaying, rows, timed, word
from torch import Tensor

from attnc import Attention, compile_attention

HEADS, KV_HEADS, WIDTH = 32, 8, 128
BATCHES, LENGTHS = (1, 8, 32, 64), (1024, 4096, 16384, 65536, 131072)
MOST_TOKENS = 2 << 20
WINDOW, SINKS, BLOCK, BUDGET = 1024, 4, 64, 4096


# --- results ---------------------------------------------------------------------------------------------------------


def correct(setting: Setting) -> Iterator[Row]:
    """Yield steps of three tokens against the reference, replayed for other lengths."""
    dtypes = [torch.float32] if setting.toy else list(TOLERANCE)
    todo = {f"{c.name} {word(t)}": partial(_correct, setting, c, t) for c, t in product(CHECKED[1:3], dtypes)}
    return rows(setting, todo.items())


def _correct(setting: Setting, case: Checked, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    n, page, batch, d = (64, 16, 2, 16) if setting.toy else (4096, 64, 4, 128)
    attention = case.attention(setting)
    q, k, v = (x.detach() for x in operands(setting, n, dtype, batch=batch, d=d))
    lengths = torch.arange(batch, dtype=torch.int32, device=setting.device) * 3 + n // 2
    table, pages = _pages(k, v, page)
    last = q[:, :, :3].contiguous()

    def step() -> list[Tensor]:
        with torch.no_grad():
            by_slot = attention.decode(last, k, v, kv_len=lengths)
            by_page = attention.decode(last, pages[0], pages[1], kv_len=lengths, block_table=table)
        return [by_slot, by_page]

    replay = replaying(setting, step)
    largest = {"slots": 0.0, "pages": 0.0}
    for more in (0, 7, n // 2 - 20):
        lengths += more
        true = _true_rows(attention, last, k, v, lengths)
        for name, out in zip(largest, replay(), strict=True):
            largest[name] = max(largest[name], *(gap(x, y, least=1.0) for x, y in zip(out, true, strict=True)))
    row: Row = {"pattern": case.name, "n": n, "dtype": word(dtype), "captured": setting.cuda}
    return {**row, "errors": largest, "ok": fits(largest, dtype)}


def _pages(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, list[Tensor]]:
    """Return keys and values in pages in a random order, and their page table."""
    batch, heads, n, d = k.shape
    table = torch.randperm(batch * n // page, device=k.device).reshape(batch, -1).to(torch.int32)
    pages = []
    for x in (k, v):
        paged = torch.empty(table.numel(), heads, page, d, dtype=x.dtype, device=x.device)
        paged[table.long()] = x.reshape(batch, heads, -1, page, d).movedim(2, 1)
        pages.append(paged)
    return table, pages


def _true_rows(attention: Attention, last: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> list[Tensor]:
    """Return the last rows of every batch entry, by the reference in fp64."""
    last_rows_of_entries = []
    for i, length in enumerate(lengths.tolist()):
        own_k, own_v = (x[i : i + 1, :, :length].double() for x in (k, v))
        padded = torch.zeros(1, last.shape[1], length, last.shape[3], dtype=torch.float64, device=k.device)
        padded[:, :, -last.shape[2] :] = last[i].double()
        out = attention.reference(padded, own_k, own_v)
        assert isinstance(out, Tensor)
        last_rows_of_entries.append(out[0, :, -last.shape[2] :])
    return last_rows_of_entries


# --- timings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step of attnc, the keys that the last head of the last batch entry sees, and their share of the cache."""

    run: Callable[[], Tensor]
    seen: Tensor
    live: float


def speed(setting: Setting) -> Iterator[Row]:
    """Yield timings by batch and length."""
    sizes = [(2, 128)] if setting.toy else [(b, n) for b, n in product(BATCHES, LENGTHS) if b * n <= MOST_TOKENS]
    todo = {f"decode {batch} n={n}": partial(_speed, setting, batch, n) for batch, n in sizes}
    return rows(setting, todo.items())


def _speed(setting: Setting, batch: int, n: int) -> Row:
    torch.manual_seed(0)
    flex.forget()
    heads, kv_heads, d = (4, 2, 16) if setting.toy else (HEADS, KV_HEADS, WIDTH)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    q = torch.randn(batch, heads, 1, d, device=setting.device).to(dtype)
    k, v = (torch.randn(batch, kv_heads, n, d, device=setting.device).to(dtype) for _ in range(2))
    lengths = torch.full((batch,), n, dtype=torch.int32, device=setting.device)
    steps = _steps(setting, q, k, v, lengths)
    error_by_step = {name: gap(step.run()[-1, -1], _true(q, k, v, step.seen)) for name, step in steps.items()}
    row: Row = {"case": f"decode {batch}", "batch": batch, "n": n, "d": d, "heads": heads, "kv_heads": kv_heads}
    row |= {"dtype": word(dtype), "direction": "forward", "errors": error_by_step, "ok": fits(error_by_step, dtype)}
    if not row["ok"]:
        return row
    rivals, absent = _rivals(setting, q, k, v, lengths)
    row |= {"live": {name: step.live for name, step in steps.items()}, "absent": absent}
    row |= {"cache_bytes": 2 * k.numel() * k.element_size()}
    runs = {name: step.run for name, step in steps.items()}
    row |= timed(setting, {**runs, **rivals, "copy": k.clone}, graphs=True)
    row["published"] = [figure.row() for figure in published.figures(row["case"], "forward", n)]
    return row | {"of_copy_speed": median(row, "copy") / median(row)}


def _steps(setting: Setting, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> dict[str, Step]:
    """Return steps on the whole cache, a window with sinks, each kv head's best blocks, the first head's as a table."""
    batch, kv_heads, n, _ = k.shape
    window, sinks, block, budget = (24, 4, 16, 32) if setting.toy else (WINDOW, SINKS, BLOCK, BUDGET)
    places = torch.arange(n, device=k.device)
    gate = torch.rand(batch, kv_heads, 1, n // block, device=k.device)
    best = gate[:, :, 0].topk(min(budget // block, n // block)).indices
    own_block = places // block == (n - 1) // block
    table = (best[:, 0] + torch.arange(batch, device=k.device)[:, None] * (n // block)).to(torch.int32)
    pages = [flashinfer.pages(x, block) for x in (k, v)]
    filled = torch.full_like(lengths, table.shape[1] * block)
    causal = compile_attention("causal", backend="triton")
    streaming = compile_attention("sliding_window", window=window, sinks=sinks, backend="triton")
    gated = compile_attention("seer_decode", block=block, budget=budget, backend="triton")
    every = torch.ones_like(own_block)
    runs: dict[str, tuple[Callable[[], Any], Tensor]] = {
        "attnc": (partial(causal.decode, q, k, v, kv_len=lengths), every),
        "attnc_window": (
            partial(streaming.decode, q, k, v, kv_len=lengths),
            (places >= n - window) | (places < sinks),
        ),
        "attnc_pages": (
            partial(gated.prefill, q, k, v, kv_len=n, gate=gate),
            torch.isin(places // block, best[-1, -1]) | own_block,
        ),
        "attnc_table": (
            partial(causal.decode, q, *pages, kv_len=filled, block_table=table),
            torch.isin(places // block, best[-1, 0]),
        ),
    }
    return {name: Step(partial(_alone, run), seen, float(seen.double().mean())) for name, (run, seen) in runs.items()}


def _alone(run: Callable[[], Any]) -> Tensor:
    with torch.no_grad():
        out = run()
    assert isinstance(out, Tensor)
    return out


def _true(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Compute the last head of the last batch entry in fp64."""
    query, keys, values = (x[-1, -1].double() for x in (q, k, v))
    scores = query @ keys[seen].T * q.shape[-1] ** -0.5
    out: Tensor = scores.softmax(-1) @ values[seen]
    return out


def _rivals(
    setting: Setting, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return the rivals over the whole cache that run and are correct, and why others do not."""
    makers: dict[str, Callable[[], Attend | Absent]] = {
        "flex": lambda: flex.attend(None, setting.device, tuned=True, compiled=setting.cuda),
        "flash_attention": lambda: flash_attention.decode(lengths),
        "flashinfer": lambda: flashinfer.decode(q, k, lengths),
        **{
            f"sdpa_{kernel}": partial(sdpa.attend, kernel, setting.device, causal=False)
            for kernel in ("cudnn", "flash")
        },
    }
    true = _true(q, k, v, torch.ones(k.shape[2], dtype=torch.bool, device=k.device))
    here: dict[str, Callable[[], Tensor]] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        made = _made(make, q, k, v, true)
        if isinstance(made, Absent):
            absent[name] = made.reason
        else:
            here[name] = partial(made, q, k, v)
    return here, absent


def _made(make: Callable[[], Attend | Absent], q: Tensor, k: Tensor, v: Tensor, true: Tensor) -> Attend | Absent:
    """Return a rival that runs and is correct, else the reason why it is left out."""
    calls: list[Attend | Absent] = []
    reason = refusal(lambda: calls.append(make()))
    if reason is not None:
        return Absent(reason)
    run = calls[0]
    if isinstance(run, Absent):
        return run
    out: list[Tensor] = []
    reason = refusal(lambda: out.append(run(q, k, v)))
    if reason is not None:
        return Absent(reason)
    error = gap(out[0][-1, -1], true)
    return run if error <= TOLERANCE[q.dtype] else Absent(f"its results are wrong by {error}")
