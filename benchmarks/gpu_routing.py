"""Attention to chosen keys on a GPU: is it right, does it wait for nothing, how fast beside dense attention?

    python benchmarks/gpu_routing.py correct|steps|speed [--toy]

Each part takes less than nine minutes and writes `results/gpu-routing-<part>.json`. `speed` has the shapes of
NSA-Triton's README (64 query heads on 4 kv heads of 128, blocks of 64, the best 8 and 16): `choose` is the choice
alone, by mean keys and for the heads of a group together, `attend` the whole call, `dense` torch's SDPA in the same
run; `published` are that README's milliseconds on an H100: attention to given blocks without the choice, and
FlashAttention 2. On a CPU, `TRITON_INTERPRET=1` and `--toy` run every line at toy sizes in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import timing
import torch
from gpu_parts import L2_BYTES, TOLERANCE, run
from part import Setting
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention
from attnc.runtime.tuning.timer import Timing

Row = dict[str, Any]

ROUNDS, WARM_UP, STEPS = 15, 3, 50

GROUPED = """pattern grouped_blocks(block: int = 64, topk: int = 16)
    align   end
    select chosen
        over   b = k // block
        score  sum(dot(q, mean(b.k)) for head in group)
        from   b.end <= q
        keep   rank < topk - 1
        always q in b
    visible k in chosen and k <= q
"""
"""The blocks that the heads of a group take together, the own one among them."""
SORTED = """pattern sorted_blocks(block: int = 64)
    align   end
    input   h: int[batch, kv_head, token]
    visible order(h)[q] // block == order(h)[k] // block
"""
TEXTS = {"grouped_blocks": GROUPED, "sorted_blocks": SORTED}

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)

PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "FlashAttention 2 forward": (0.260, 0.847, 3.04, 11.74, 45.97, 187.2, 810.9),
    "FlashAttention 2 backward": (0.799, 2.55, 9.03, 34.1, 135.7, 541, 2140),
    "top-8 forward": (0.585, 1.09, 2.13, 4.19, 7.61, 14.8, 29.5),
    "top-8 backward": (1.12, 1.67, 2.77, 5.20, 9.97, 21.1, 54.9),
    "top-16 forward": (0.918, 1.75, 3.40, 6.70, 12.4, 24.5, 49.0),
    "top-16 backward": (1.38, 2.21, 3.95, 7.54, 15.2, 33.8, 93.8),
}
"""Milliseconds by length on an H100, of the README of NSA-Triton (XunhaoLai/native-sparse-attention-triton)."""

Run = Callable[[], object]


def main() -> int:
    """Run one part; 1 where something is wrong."""
    return run(PARTS, __doc__, "gpu-routing")


def _attention(name: str, **params: Any) -> Attention:
    return compile_attention(TEXTS.get(name, name), backend="triton", **params)


def _drawn(setting: Setting, heads: int, kv_heads: int, n: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = (heads, kv_heads, kv_heads)
    return [torch.randn(1, h, n, width, device=setting.device).to(dtype).requires_grad_() for h in sizes]


Given = Callable[[int, torch.device | str], dict[str, Tensor]]


def _nothing(n: int, device: torch.device | str) -> dict[str, Tensor]:
    return {}


def _gates(n: int, device: torch.device | str) -> dict[str, Tensor]:
    return {"gate": torch.rand(1, n, 4, 3, device=device)}


def _indexer(n: int, device: torch.device | str) -> dict[str, Tensor]:
    sizes = {"iq": (1, n, 4, 16), "ik": (1, n, 16), "w": (1, n, 4)}
    return {name: torch.randn(size, device=device) for name, size in sizes.items()}


def _hashes(n: int, device: torch.device | str) -> dict[str, Tensor]:
    return {"h": torch.randint(0, 64, (1, 2, n), device=device)}


def _placed(setting: Setting) -> list[tuple[str, dict[str, Any], Given]]:
    """Those whose places are found on the device: strips of a whole prompt, tokens in the order of hashes."""
    strips = {"block": 10, "stride": 5} if setting.toy else {"block": 50, "stride": 10}
    return [("sorted_blocks", {"block": 16 if setting.toy else 64}, _hashes), ("xattention", strips, _nothing)]


def _asking(setting: Setting) -> list[tuple[str, dict[str, Any], Given]]:
    """Those that choose otherwise than among blocks of keys: tiles are listed on the device."""
    toy = setting.toy
    slashes = {"columns": 40, "slashes": 60, "block": 8, "probe": 10} if toy else {"columns": 200, "slashes": 300}
    return [
        ("deepseek_sparse", {"topk": 6 if toy else 64}, _indexer),
        ("minference_vertical_slash", slashes, _nothing),
        ("anchor", {"block": 8, "group": 3, "theta": 1} if toy else {"block": 32, "group": 4, "theta": 1}, _nothing),
    ]


def correct(setting: Setting) -> Iterator[Row]:
    """Outputs and gradients against the reference in fp64, where that chooses the same."""
    n, width = (90, 16) if setting.toy else (1500, 64)
    small = {"block": 16, "topk": 3}
    dtypes = [torch.float32] if setting.toy else [torch.float32, torch.bfloat16, torch.float16]
    placed: list[tuple[str, dict[str, Any], Given]] = [
        ("moba", small, _nothing),
        ("grouped_blocks", small, _nothing),
        ("native_sparse", {**small, "window": 40}, _gates),
    ]
    for name, params, make in (*placed, *_placed(setting), *_asking(setting)):
        for dtype in dtypes:
            attend = _attention(name, **params)
            q, k, v = _drawn(setting, 4, 2, n, width, dtype)
            given: dict[str, Any] = make(n, setting.device)
            leaves = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
            true_given: dict[str, Any] = {key: x.cpu() for key, x in given.items()}
            true_given = {key: x.double() if x.is_floating_point() else x for key, x in true_given.items()}
            ours, true = attend(q, k, v, **given), attend.reference(*leaves, **true_given)
            weights = torch.randn_like(true)
            grads = torch.autograd.grad((ours.double().cpu() * weights).sum(), (q, k, v))
            wanted = torch.autograd.grad((true * weights).sum(), leaves)
            alike = not attend.pattern.selections or _chose_alike(attend, (q, k, v, given), (*leaves, true_given))
            pairs = zip(("out", "dq", "dk", "dv"), (ours, *grads), (true, *wanted), strict=True)
            errors = {key: _error(a, b) for key, a, b in pairs}
            ok = not alike or max(errors.values()) <= TOLERANCE[dtype]
            yield {"pattern": name, "dtype": str(dtype), "chose_alike": alike, "errors": errors, "ok": ok}


def _chose_alike(attend: Attention, *calls: tuple[Any, ...]) -> bool:
    """Whether two calls, of q, k, v and inputs, choose the same."""
    first, second = (attend.chosen(q, k, v, **given) for q, k, v, given in calls)
    return all(torch.equal(x.cpu(), second[key].cpu()) for key, x in first.items())


def _error(ours: Tensor, true: Tensor) -> float:
    return float((ours.detach().double().cpu() - true.detach()).abs().max() / max(float(true.abs().max()), 1.0))


def steps(setting: Setting) -> Iterator[Row]:
    """Training steps with new choices: no host waits for the device (an error of torch says where it does)."""
    n, width, count = (90, 16, 3) if setting.toy else (4000, 128, STEPS)
    placed: list[tuple[str, dict[str, Any], Given]] = [
        ("moba", {"block": 16 if setting.toy else 128}, _nothing),
        ("grouped_blocks", {"topk": 4}, _nothing),
    ]
    for name, params, make in (*placed, *_placed(setting), *_asking(setting)):
        attend = _attention(name, **params)
        drawn = [_drawn(setting, 4, 2, n, width, torch.float32) for _ in range(count + 2)]
        given: dict[str, Any] = make(n, setting.device)
        grad = torch.randn(1, 4, n, width, device=setting.device)
        for tensors in drawn[:2]:
            torch.autograd.grad(attend(*tensors, **given), tensors, grad)
        waits = ""
        if setting.cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for tensors in drawn[2:]:
                torch.autograd.grad(attend(*tensors, **given), tensors, grad)
        except RuntimeError as error:
            waits = str(error)
        finally:
            if setting.cuda:
                torch.cuda.set_sync_debug_mode("default")
        yield {"pattern": name, "steps": count, "waits": waits, "ok": not waits}


def speed(setting: Setting) -> Iterator[Row]:
    """Forward and forward with backward, bf16, by length."""
    heads, kv_heads, width = (4, 2, 16) if setting.toy else (64, 4, 128)
    lengths = (96,) if setting.toy else LENGTHS[2:]
    for topk in (8, 16):
        attend = _attention("grouped_blocks", topk=topk, **({"block": 16} if setting.toy else {}))
        for n in lengths:
            for training in (False, True):
                yield _timed(setting, attend, topk, heads, kv_heads, n, width, training=training)


def _timed(
    setting: Setting,
    attend: Attention,
    topk: int,
    heads: int,
    kv_heads: int,
    n: int,
    width: int,
    *,
    training: bool,
) -> Row:
    dtype = torch.float32 if setting.toy else torch.bfloat16
    q, k, v = _drawn(setting, heads, kv_heads, n, width, dtype)
    grad = torch.randn(1, heads, n, width, device=setting.device, dtype=dtype)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def run(function: Callable[[], Tensor]) -> Run:
        return (lambda: torch.autograd.grad(function(), (q, k, v), grad)) if training else function

    contenders: dict[str, Run] = {"attend": run(lambda: attend(q, k, v)), "dense": run(dense)}
    if not training:
        contenders["choose"] = lambda: attend.chosen(q, k, v)
    with torch.set_grad_enabled(training):
        found = _interleaved(setting, contenders)
    row: Row = {"topk": topk, "n": n, "direction": "forward+backward" if training else "forward"}
    row |= {f"{name}_ms": timing.as_json(one) for name, one in found.items()}
    row["dense_over_attnc"] = found["dense"].median / found["attend"].median
    if n in LENGTHS:
        row["published"] = {
            name: figures[LENGTHS.index(n)]
            for name, figures in PUBLISHED.items()
            if name.startswith(("FlashAttention", f"top-{topk} ")) and (training or name.endswith("forward"))
        }
    return row


def _interleaved(setting: Setting, contenders: Mapping[str, Run]) -> dict[str, Timing]:
    """Milliseconds, in turns."""
    if not setting.cuda:
        return timing.interleaved(contenders, rounds=1, warm_up=0)
    return timing.interleaved_on_gpu(contenders, ROUNDS, WARM_UP, L2_BYTES)


PARTS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {"correct": correct, "steps": steps, "speed": speed}

if __name__ == "__main__":
    raise SystemExit(main())
