"""Recurrences on this machine: in chunks, against a loop over tokens and against others' chunk forms in torch.

`loop` is written directly from the equations: a state (B, H, dk, dv), a few torch operations per token; values that do
not depend on the state are computed before. `fla` is flash-linear-attention's own chunk form in torch (`naive.py`), if
it has an equal one (Comba's corrects the state before its decay) and is installed: `pip install --no-deps
fla-core==0.6.0 einops`; its files are loaded one by one, as the package itself needs a GPU. Every contender is compared
with the loop before it is timed. Rows at 8192 and 65536 tokens show whether tokens per second stay
constant.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import exact
import torch
from benchmark_part import Row, Setting
from recurrence_loops import LEAN, LOOPS
from timing import as_json, interleaved
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention

HEADS, DIM, STATE, CHECKED = 8, 64, 16, 1024
LENGTHS = (8192, 65536)
TOLERANCE = 1e-4
"""Tolerance of sums over hundreds of tokens in fp32, relative to the largest true entry."""


# --- cases -----------------------------------------------------------------------------------------------------------


def _gate(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(1, *shape) + 2)


def _unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(1, *shape), dim=-1)


SHORTER = {"mesa": 8}
"""Divisors of the lengths of slow recurrences: Mesa takes 30 solver steps per token."""


def _inputs(name: str, n: int) -> dict[str, Tensor]:
    h, d = HEADS, DIM
    removal = _unit(n, h, d)
    drawn: dict[str, Callable[[], dict[str, Tensor]]] = {
        "mamba2_ssd": lambda: {"g": _gate(n, h), "dt": torch.rand(1, n, h), "D": torch.randn(h)},
        "gla": lambda: {"g": _gate(n, h, d)},
        "rwkv6": lambda: {"g": _gate(n, h, d), "u": torch.randn(h, d)},
        "gsa": lambda: {"g": _gate(n, h, d), "s": torch.randn(1, n, h, d)},
        "delta_net": lambda: {"beta": torch.rand(1, n, h)},
        "gated_delta_net": lambda: {"g": _gate(n, h), "beta": torch.rand(1, n, h)},
        "kimi_delta": lambda: {"g": _gate(n, h, d), "beta": torch.rand(1, n, h)},
        "comba": lambda: {
            **{"g": _gate(n, h), "beta": torch.rand(1, n, h)},
            **{"decay": torch.randn(h), "D": torch.randn(h)},
        },
        "gated_delta_product": lambda: {
            **{"g": _gate(n, h), "beta": torch.rand(1, n, h, 2)},
            **{"ks": _unit(n, h, 2, d), "vs": torch.randn(1, n, h, 2, d)},
        },
        "rwkv7": lambda: {
            **{"w": torch.rand(1, n, h, d), "a": -removal, "b": removal * torch.rand(1, n, h, d)},
            **{"r_k": torch.randn(h, d)},
        },
        "mamba1": lambda: {
            **{"dt": 0.1 * torch.rand(1, n, h, d), "A": -torch.rand(h, STATE, d) * STATE},
            **{"D": torch.randn(h, d)},
        },
        "aaren": lambda: {"w": torch.randn(h, d)},
        "s5": lambda: {
            **{"L": torch.complex(-torch.rand(h, d) - 0.1, 6 * torch.randn(h, d)), "dt": 0.1 * torch.rand(h, d) + 0.01},
            **{"B": torch.randn(h, d, d, dtype=torch.complex64), "C": torch.randn(h, d, d, dtype=torch.complex64)},
            **{"D": torch.randn(h, d)},
        },
        "mesa": lambda: {"g": _gate(n, h), "beta": torch.rand(1, n, h), "ridge": torch.rand(h, d) + 0.5},
        "titans_linear": lambda: {
            **{"rate": 0.5 * torch.rand(1, n, h), "hold": torch.rand(1, n, h)},
            **{"forget": 0.1 * torch.rand(1, n, h)},
        },
    }
    return drawn.get(name, dict)()


def _tensors(name: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    width = STATE if name == "mamba1" else DIM
    q, k = torch.randn(1, HEADS, n, width), torch.randn(1, HEADS, n, width)
    return q, k if name in ("aaren", "mamba1") else F.normalize(k, dim=-1), torch.randn(1, HEADS, n, DIM)


# --- flash-linear-attention ------------------------------------------------------------------------------------------


def _fla(operation: str) -> ModuleType | None:
    """Return one of fla's modules of chunk forms in torch, loaded by itself."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(next(iter(package.submodule_search_locations)), "ops", operation, "naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{operation.replace('/', '_')}", file)
    if spec is None or spec.loader is None or not file.exists():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _naive(name: str, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor]) -> Callable[[], Any] | None:
    """Return the chunk form in torch of a recurrence."""
    by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    match name:
        case "mamba2_ssd" if (module := _fla("simple_gla")) is not None:
            call, (own_q, own_k, own_v) = module.naive_chunk_simple_gla, by_token
            dt, D = inputs["dt"][..., None], inputs["D"][:, None, None]
            return lambda: call(own_q, own_k * dt, own_v, inputs["g"], scale=1.0)[0].transpose(1, 2) + D * v
        case "delta_net" if (module := _fla("delta_rule")) is not None:
            beta = inputs["beta"].transpose(1, 2).contiguous()
            call = module.delta_rule_chunkwise
            return lambda: call(q, k, v, beta)[0]
        case "gated_delta_net" if (module := _fla("gated_delta_rule")) is not None:
            call = module.naive_chunk_gated_delta_rule
            return lambda: call(*by_token, inputs["g"], inputs["beta"])[0].transpose(1, 2)
        case "kimi_delta" if (module := _fla("kda")) is not None:
            call = module.naive_chunk_kda
            return lambda: call(*by_token, inputs["g"], inputs["beta"])[0].transpose(1, 2)
    return None


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each recurrence and length."""
    for name in LOOPS:
        for whole in (128,) if setting.toy else LENGTHS:
            n = whole // SHORTER.get(name, 1)
            key = f"{name} n={n} d={DIM} float32"
            if key not in setting.done:
                yield {"key": key} | _row(name, n, 1 if setting.toy else 3 if whole == LENGTHS[0] else 2)


def _row(name: str, n: int, rounds: int) -> Row:
    torch.manual_seed(0)
    attend = compile_attention(name)
    q, k, v = _tensors(name, n)
    inputs = _inputs(name, n)
    naive = _naive(name, q, k, v, inputs)
    row: Row = {"pattern": name, "n": n, "d": DIM, "dk": q.shape[-1], "dtype": "float32", "heads": HEADS}
    row["direction"] = "forward"
    with torch.no_grad():
        error_by_name = _errors(name, attend, (q, k, v), inputs)
        if naive is not None:
            error_by_name |= {
                "fla": exact.errors({"out": naive()}, {"out": attend(q, k, v, **_any(inputs)).double()})["out"]
            }
        row |= {"errors": error_by_name, "ok": max(error_by_name.values()) <= TOLERANCE}
        if not row["ok"]:
            return row
        contenders: dict[str, Callable[[], object]] = {"attnc": lambda: attend(q, k, v, **_any(inputs))}
        if n <= 8192:
            contenders["loop"] = lambda: LOOPS[name](q, k, v, **inputs)
            if name in LEAN:
                contenders["lean loop"] = lambda: LEAN[name](q, k, v, **inputs)
        if naive is not None:
            contenders["fla"] = naive
        times = interleaved(contenders, rounds, warm_up=1)
    times |= interleaved({"attnc, backward": _backward(attend, (q, k, v), inputs)}, rounds, warm_up=1)
    return row | {"ms": {key: as_json(timing) for key, timing in times.items()}}


def _any(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return dict(inputs)


def _errors(name: str, attend: Attention, tensors: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Return the errors of the first tokens against the loop in fp64."""
    q, k, v = (x[:, :, :CHECKED] for x in tensors)
    n = tensors[0].shape[2]
    first_inputs = {key: x[:, :CHECKED] if x.ndim > 1 and x.shape[:2] == (1, n) else x for key, x in inputs.items()}
    wide = {key: x.to(torch.promote_types(x.dtype, torch.float64)) for key, x in first_inputs.items()}
    true = LOOPS[name](q.double(), k.double(), v.double(), **wide)
    return exact.errors({"out": attend(q, k, v, **_any(first_inputs))}, {"out": true})


def _backward(attend: Attention, tensors: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    leaf_inputs = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    out = attend(leaves[0], leaves[1], leaves[2], **_any(leaf_inputs))
    wanted, weight = [*leaves, *leaf_inputs.values()], torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, weight, retain_graph=True, allow_unused=True)
