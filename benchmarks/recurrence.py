"""Recurrences on this machine: by chunks against a loop over tokens, and against the chunk forms of others in torch.

`loop` is what one writes from the equations: a state (B, H, dk, dv), a few operations of torch a token, what reads no
state computed before. `fla` is flash-linear-attention's own chunk form in torch (`naive.py`), where one exists that
computes the same (Comba's corrects the state before its decay) and the package is there: `pip install --no-deps
fla-core==0.6.0 einops`; its files are loaded one by one, as the package itself wants a GPU. Every contender is checked
against the loop before it is timed. Rows at 8192 and 65536 tokens tell whether tokens per
second hold.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import exact
import torch
from part import Row, Setting
from timing import as_json, interleaved
from torch import Tensor
from torch.nn import functional as F

from attnc import Attention, compile_attention

Loop = Callable[..., Tensor]

HEADS, DIM, STATE, CHECKED = 8, 64, 16, 1024
LENGTHS, ROUNDS = (8192, 65536), 3
TOLERANCE = 1e-4
"""Of sums over hundreds of tokens in fp32, relative to the largest true entry."""


# --- loops -----------------------------------------------------------------------------------------------------------


def _looped(step: Callable[[Tensor, int], Tensor], q: Tensor, state: Tensor, *, before: bool = False) -> Tensor:
    """What tokens read: qᵀ S after the step, or before it."""
    outs = []
    for t in range(q.shape[2]):
        seen = state
        state = step(state, t)
        outs.append((q[:, :, t, None] @ (seen if before else state))[:, :, 0])
    return torch.stack(outs, 2)


def _empty(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def _sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    out = _looped(lambda S, t: S + fk[:, :, t, :, None] * v[:, :, t, None], fq, _empty(k, v))
    return out / (fq * fk.cumsum(2)).sum(-1, keepdim=True)


def _decayed(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, before: bool = False) -> Tensor:
    """`decay` (B, H, T, …) broadcasts to the state."""

    def step(S: Tensor, t: int) -> Tensor:
        return decay[:, :, t] * S + k[:, :, t, :, None] * v[:, :, t, None]

    return _looped(step, q, _empty(k, v), before=before)


def _constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = (1 - 2.0 ** (-5 - torch.arange(q.shape[1])))[:, None, None, None].to(q)
    return _decayed(q * q.shape[-1] ** -0.5, k, v, decay[None].expand(1, -1, q.shape[2], 1, 1))


def _scalar(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    decay, given = g.transpose(1, 2).exp()[..., None, None], dt.transpose(1, 2)[..., None] * k
    return _decayed(q, given, v, decay) + D[:, None, None] * v


def _rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _decayed(q * q.shape[-1] ** -0.5, k, v, g.transpose(1, 2).exp()[..., None])


def _before(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Tensor:
    scaled = q * q.shape[-1] ** -0.5
    own: Tensor = (scaled * u[:, None] * k).sum(-1, keepdim=True) * v
    return _decayed(scaled, k, v, g.transpose(1, 2).exp()[..., None], before=True) + own


def _slots(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    decay, slot = g.transpose(1, 2).exp(), s.transpose(1, 2)
    weights = _decayed(q * q.shape[-1] ** -0.5, k, slot, decay[..., None, :]).softmax(-1)
    return _decayed(weights, slot, v, decay[..., None])


def _corrected(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, p: Tensor | None = None) -> Tensor:
    read, beta = k if p is None else p, beta.transpose(1, 2)[..., None]

    def step(S: Tensor, t: int) -> Tensor:
        S = S if decay is None else decay[:, :, t] * S
        rest = beta[:, :, t] * (v[:, :, t] - (read[:, :, t, None] @ S)[:, :, 0])
        return S + k[:, :, t, :, None] * rest[:, :, None]

    return _looped(step, q, _empty(k, v))


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return _corrected(q * q.shape[-1] ** -0.5, k, v, beta, None)


def _gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return _corrected(q * q.shape[-1] ** -0.5, k, v, beta, g.transpose(1, 2).exp()[..., None, None])


def _kimi(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return _corrected(q * q.shape[-1] ** -0.5, k, v, beta, g.transpose(1, 2).exp()[..., None])


def _comba(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, decay: Tensor, D: Tensor) -> Tensor:
    p = decay.sigmoid()[:, None, None] * k
    scaled = (q - D[:, None, None] * p) * q.shape[-1] ** -0.5
    return _corrected(scaled, k, v, beta, g.transpose(1, 2).exp()[..., None, None], p)


def _product(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    decay, beta = g.transpose(1, 2).exp()[..., None, None], beta.transpose(1, 2)[..., None]
    ks, vs = ks.transpose(1, 2), vs.transpose(1, 2)

    def step(S: Tensor, t: int) -> Tensor:
        S = decay[:, :, t] * S
        for j in range(ks.shape[3]):
            rest = beta[:, :, t, j] * (vs[:, :, t, j] - (ks[:, :, t, j, None] @ S)[:, :, 0])
            S = S + ks[:, :, t, j, :, None] * rest[:, :, None]
        return S

    return _looped(step, q * q.shape[-1] ** -0.5, _empty(k, v))


def _rank_one(q: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor, r_k: Tensor) -> Tensor:
    w, a, b = (x.transpose(1, 2) for x in (w, a, b))

    def step(S: Tensor, t: int) -> Tensor:
        seen = a[:, :, t, None] @ S
        return w[:, :, t, :, None] * S + b[:, :, t, :, None] * seen + k[:, :, t, :, None] * v[:, :, t, None]

    return _looped(step, q, _empty(k, v)) + (q * r_k[:, None] * k).sum(-1, keepdim=True) * v


def _entries(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """As Mamba's own (`selective_scan_ref` of state-spaces/mamba): decays and writes of all tokens first."""
    dt = dt.transpose(1, 2)
    decay, given = (dt[..., None, :] * A[:, None]).exp(), k[..., :, None] * (dt * v)[..., None, :]
    return _looped(lambda S, t: decay[:, :, t] * S + given[:, :, t], q, _empty(k, v)) + D[:, None] * v


def _entries_at_once(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """The same with everything made where it is used, which keeps to the cache."""
    dt = dt.transpose(1, 2)
    given = dt * v

    def step(S: Tensor, t: int) -> Tensor:
        return (dt[:, :, t, None] * A).exp() * S + k[:, :, t, :, None] * given[:, :, t, None]

    return _looped(step, q, _empty(k, v)) + D[:, None] * v


def _softmax(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    scores = (k * w[:, None]).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    top, total, mean = scores.new_full(scores[:, :, 0].shape, -math.inf), scores[:, :, 0] * 0, v[:, :, 0] * 0
    outs = []
    for t in range(v.shape[2]):
        new = torch.maximum(top, scores[:, :, t])
        keep, own = (top - new).exp(), (scores[:, :, t] - new).exp()
        total, mean, top = keep * total + own, keep * mean + own * v[:, :, t], new
        outs.append(mean / total)
    return torch.stack(outs, 2)


def _slopes(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, hold: Tensor, forget: Tensor) -> Tensor:
    """Titans: momentum P of slopes at the first weights of each 64 tokens."""
    P = first = M = _empty(k, v)
    rate, hold, forget = (x.transpose(1, 2)[..., None, None] for x in (rate, hold, forget))
    outs, keys, keep = [], -2 * rate * k[..., None], 1 - forget
    for t in range(q.shape[2]):
        first = M if t % 64 == 0 else first
        P = hold[:, :, t] * P + keys[:, :, t] * (k[:, :, t, None] @ first - v[:, :, t, None])
        M = keep[:, :, t] * M + P
        outs.append((q[:, :, t, None] @ M)[:, :, 0])
    return torch.stack(outs, 2)


def _complex(q: Tensor, k: Tensor, v: Tensor, L: Tensor, dt: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    decay = (L * dt).exp()
    given = torch.einsum("hnv,bhtv->bhtn", B * ((decay - 1) / L)[..., None], v.to(B.dtype))
    x, states = torch.zeros_like(given[:, :, 0]), []
    for t in range(v.shape[2]):
        x = decay * x + given[:, :, t]
        states.append(x)
    return 2 * torch.einsum("hvn,bhtn->bhtv", C, torch.stack(states, 2)).real + D[:, None] * v


def _solved(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, ridge: Tensor) -> Tensor:
    decay, share = g.transpose(1, 2).exp()[..., None, None], beta.transpose(1, 2)[..., None, None] * k[..., None]
    A, S = _empty(k, k), _empty(k, v)
    outs = []
    for t in range(q.shape[2]):
        A = decay[:, :, t] * A + share[:, :, t] * k[:, :, t, None]
        S = decay[:, :, t] * S + share[:, :, t] * v[:, :, t, None]
        outs.append((_descended(A, ridge, q[:, :, t])[:, :, None] @ S)[:, :, 0])
    return torch.stack(outs, 2)


def _descended(A: Tensor, ridge: Tensor, q: Tensor) -> Tensor:
    """30 steps of conjugate gradients."""
    x, rest = torch.zeros_like(q), q
    direction, size = q, (q * q).sum(-1, keepdim=True)
    for _ in range(30):
        ahead = (A @ direction[..., None])[..., 0] + ridge * direction
        step = size / (direction * ahead).sum(-1, keepdim=True).clamp(min=1e-30)
        x, rest = x + step * direction, rest - step * ahead
        smaller = (rest * rest).sum(-1, keepdim=True)
        direction, size = rest + smaller / size.clamp(min=1e-30) * direction, smaller
    return x


# --- cases -----------------------------------------------------------------------------------------------------------


def _gate(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(1, *shape) + 2)


def _unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(1, *shape), dim=-1)


LOOPS: dict[str, Loop] = {
    "linear_attention": _sum,
    "retention": _constant,
    "mamba2_ssd": _scalar,
    "gla": _rows,
    "rwkv6": _before,
    "gsa": _slots,
    "delta_net": _delta,
    "gated_delta_net": _gated_delta,
    "kimi_delta": _kimi,
    "comba": _comba,
    "gated_delta_product": _product,
    "rwkv7": _rank_one,
    "mamba1": _entries,
    "aaren": _softmax,
    "titans_linear": _slopes,
    "s5": _complex,
    "mesa": _solved,
}
"""A recurrence of each class, with a loop over its tokens."""

LEAN: dict[str, Loop] = {"mamba1": _entries_at_once}
"""Loops that do without tensors over all tokens."""

SHORTER = {"mesa": 8}
"""Lengths are divided by this: 30 solves a token."""


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
    """One of its files of chunk forms in torch, loaded by itself."""
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


def _naive(name: str, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor]) -> Callable[[], Any] | None:
    """The chunk form in torch of a recurrence."""
    by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    match name:
        case "mamba2_ssd" if (module := _fla("simple_gla")) is not None:
            call, (own_q, own_k, own_v) = module.naive_chunk_simple_gla, by_token
            dt, D = given["dt"][..., None], given["D"][:, None, None]
            return lambda: call(own_q, own_k * dt, own_v, given["g"], scale=1.0)[0].transpose(1, 2) + D * v
        case "delta_net" if (module := _fla("delta_rule")) is not None:
            beta = given["beta"].transpose(1, 2).contiguous()
            call = module.delta_rule_chunkwise
            return lambda: call(q, k, v, beta)[0]
        case "gated_delta_net" if (module := _fla("gated_delta_rule")) is not None:
            call = module.naive_chunk_gated_delta_rule
            return lambda: call(*by_token, given["g"], given["beta"])[0].transpose(1, 2)
        case "kimi_delta" if (module := _fla("kda")) is not None:
            call = module.naive_chunk_kda
            return lambda: call(*by_token, given["g"], given["beta"])[0].transpose(1, 2)
    return None


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(setting: Setting) -> Iterator[Row]:
    """A row for each recurrence and length."""
    for name in LOOPS:
        for whole in (128,) if setting.toy else LENGTHS:
            n = whole // SHORTER.get(name, 1)
            key = f"{name} n={n} d={DIM} float32"
            if key not in setting.done:
                yield {"key": key} | _row(name, n, 1 if setting.toy else ROUNDS)


def _row(name: str, n: int, rounds: int) -> Row:
    torch.manual_seed(0)
    attend = compile_attention(name)
    q, k, v = _tensors(name, n)
    given = _inputs(name, n)
    naive = _naive(name, q, k, v, given)
    row: Row = {"pattern": name, "n": n, "d": DIM, "dk": q.shape[-1], "dtype": "float32", "heads": HEADS}
    row["direction"] = "forward"
    with torch.no_grad():
        found = _errors(name, attend, (q, k, v), given)
        if naive is not None:
            found |= {"fla": exact.errors({"out": naive()}, {"out": attend(q, k, v, **_any(given)).double()})["out"]}
        row |= {"errors": found, "ok": max(found.values()) <= TOLERANCE}
        if not row["ok"]:
            return row
        contenders: dict[str, Callable[[], object]] = {"attnc": lambda: attend(q, k, v, **_any(given))}
        if n <= 8192:
            contenders["loop"] = lambda: LOOPS[name](q, k, v, **given)
            if name in LEAN:
                contenders["lean loop"] = lambda: LEAN[name](q, k, v, **given)
        if naive is not None:
            contenders["fla"] = naive
        times = interleaved(contenders, rounds, warm_up=1)
    times |= interleaved({"attnc, backward": _backward(attend, (q, k, v), given)}, rounds, warm_up=1)
    return row | {"ms": {key: as_json(timing) for key, timing in times.items()}}


def _any(given: dict[str, Tensor]) -> dict[str, Any]:
    return dict(given)


def _errors(name: str, attend: Attention, tensors: tuple[Tensor, ...], given: dict[str, Tensor]) -> dict[str, float]:
    """The first tokens against the loop in 64 bits."""
    q, k, v = (x[:, :, :CHECKED] for x in tensors)
    n = tensors[0].shape[2]
    own = {key: x[:, :CHECKED] if x.ndim > 1 and x.shape[:2] == (1, n) else x for key, x in given.items()}
    wide = {key: x.to(torch.promote_types(x.dtype, torch.float64)) for key, x in own.items()}
    true = LOOPS[name](q.double(), k.double(), v.double(), **wide)
    return exact.errors({"out": attend(q, k, v, **_any(own))}, {"out": true})


def _backward(attend: Attention, tensors: tuple[Tensor, ...], given: dict[str, Tensor]) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    own = {key: x.detach().requires_grad_() for key, x in given.items()}
    out = attend(leaves[0], leaves[1], leaves[2], **_any(own))
    wanted, weight = [*leaves, *own.values()], torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, weight, retain_graph=True, allow_unused=True)
