"""Calls of drawn attentions: compiled results against closures, forward and all gradients."""

from __future__ import annotations

import math
import random
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from attnc import AttncError, compile_attention
from attnc.runtime.api.attention import Attention
from attnc.runtime.executors.cpu import masked
from hunting.attentions import Drawn
from hunting.scene import Scene

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5}
"""Allowed errors, relative to the largest true entry or to 1."""
OWN_ERRORS = 16
"""Allowed multiple of the error that the closure itself makes in the precision of the call, if that is more."""
LSE_ERRORS = 4
"""Allowed multiple of the machine epsilon by the largest LSE, for gradients by kernels, relative as `TOLERANCE`.

Kernels compute weights as exp(score - LSE) from a score and a stored LSE. With one rounding of the score, two of
powers of 2 and two of the LSE, each of half an epsilon, the exponent and so the weight err by 2.5 epsilons of the LSE.
"""


class Mismatch(Exception):  # noqa: N818  a finding, not an error
    """A call whose results differ from the closure's; the message says how."""


@dataclass
class Call:
    """One call: its leaves, and how tensors are made from them."""

    leaves: dict[str, Tensor]
    views: Mapping[str, str]
    inputs: dict[str, Tensor]
    grads: tuple[Tensor, Tensor]
    heads: tuple[int, int]
    lengths: tuple[int, int]
    cu_seqlens: list[int] | None
    hidden_nan: bool
    words: str
    scale: float | None = None
    by_kernels: bool = False
    """Whether kernels compute the call, whose LSE is in fp32."""

    def tensors(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return q, k, v and the inputs as passed to the call."""
        return {name: self._seen(name, x) for name, x in {**self.inputs, **leaves}.items()}

    def _seen(self, name: str, x: Tensor) -> Tensor:
        match self.views.get(name):
            case "transposed":
                return x.transpose(1, 2)
            case "expanded":
                return x.expand(self.batch, *[-1] * (x.ndim - 1))
            case "by two":
                return x[..., ::2]
            case "part":
                return x[..., : x.shape[-1] // 2]
            case _:
                return x

    @property
    def batch(self) -> int:
        """The number of batch entries."""
        return self.grads[0].shape[0]


def draw_call(drawn: Drawn, rng: random.Random, longest: int) -> Call:
    """Draw a call of a random shape."""
    generator = torch.Generator().manual_seed(rng.randrange(2**40))
    n_q, n_k = _lengths(drawn, rng, longest)
    batch = rng.choice([1, 1, 2, 3, 0] if rng.random() < 0.3 else [1, 2])
    kv_heads, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
    dk, dv = rng.choice([1, 3, 4, 8, 16, 5]), rng.choice([1, 3, 4, 8, 16, 7])
    if "normalised" in drawn.text:
        dk = max(dk, 4)  # gradients of short vectors have no bound
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    heads = (kv_heads * group, kv_heads)
    shapes = {"q": (batch, heads[0], n_q, dk), "k": (batch, kv_heads, n_k, dk), "v": (batch, kv_heads, n_k, dv)}
    leaves, views = {}, {}
    for name, (entries, count, tokens, width) in shapes.items():
        shape, view = (entries, count, tokens, width), rng.choice(["", "", "transposed", "expanded", "by two", "part"])
        if view == "transposed":
            shape = (entries, tokens, count, width)
        elif view == "expanded" and batch > 1:
            shape = (1, count, tokens, width)
        elif view in ("by two", "part"):
            shape = (entries, count, tokens, 2 * width)
        else:
            view = ""
        if view:
            views[name] = view
        leaves[name] = _vectors(shape, generator, drawn.ties is not None and name != "v").to(dtype)
    if drawn.recurrent:
        leaves["k"] = torch.nn.functional.normalize(leaves["k"], dim=-1)
    sizes = {"batch": batch, "head": heads[0], "kv_head": kv_heads, "query": n_q, "key": n_k, "token": n_k}
    sizes |= {"dk": dk, "dv": dv}
    inputs = {item.name: item.drawn(sizes, generator) for item in drawn.inputs}
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for item in drawn.inputs:
        inputs[item.name], view = _viewed(inputs[item.name], item.dims, rng)
        if view:
            views[item.name] = view
    leaves |= {name: x for name, x in inputs.items() if x.is_floating_point()}
    grads = (
        torch.randn(batch, heads[0], n_q, dv, generator=generator, dtype=torch.float64),
        torch.randn(batch, heads[0], n_q, generator=generator, dtype=torch.float64),
    )
    packed = n_q == n_k > 0 and drawn.documents is None and drawn.grid is None and rng.random() < 0.15
    packed = packed and not any("query" in item.dims and "key" in item.dims for item in drawn.inputs)
    cuts = sorted(rng.randint(0, n_k) for _ in range(rng.randint(1, 3))) if packed else []
    scale = rng.choice([0.3, -0.7, 1.0]) if rng.random() < 0.15 else None
    words = f"q {shapes['q']}, k {shapes['k']}, v {shapes['v']}, {dtype}, views {views or 'none'}"
    return Call(
        leaves,
        views,
        {name: x for name, x in inputs.items() if name not in leaves},
        grads,
        heads,
        (n_q, n_k),
        [0, *cuts, n_k] if packed else None,
        rng.random() < 0.3 and "k" not in views and "v" not in views,
        words + (f", cu_seqlens {[0, *cuts, n_k]}" if packed else "") + (f", scale {scale}" if scale else ""),
        scale,
    )


def _viewed(x: Tensor, dims: tuple[str | int, ...], rng: random.Random) -> tuple[Tensor, str]:
    """Return the tensor that an input is a view of, and the kind of view."""
    view = rng.choice(["", "", "", "expanded", "by two", "part"])
    if view == "expanded" and dims[:1] == ("batch",) and x.shape[0] > 1:
        return x[:1].clone(), view
    if view == "by two" and x.ndim:
        return x.repeat_interleave(2, -1), view
    if view == "part" and x.ndim:
        return torch.cat([x, x.flip(-1)], -1), view
    return x, ""


def _vectors(shape: tuple[int, ...], generator: torch.Generator, ties: bool) -> Tensor:
    if ties:
        return torch.randint(-1, 2, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _lengths(drawn: Drawn, rng: random.Random, longest: int) -> tuple[int, int]:
    if drawn.grid is not None:
        return math.prod(drawn.grid), math.prod(drawn.grid)
    n_k = rng.choice([1, 2, rng.randint(1, longest), rng.randint(1, longest), longest])
    if drawn.ties is not None:
        n_k = -(-n_k // drawn.ties) * drawn.ties
    if drawn.recurrent or drawn.documents is not None or any("token" in item.dims for item in drawn.inputs):
        return n_k, n_k
    if drawn.align is not None and rng.random() < 0.3:
        return rng.randint(1, n_k), n_k
    if drawn.align == "end" and rng.random() < 0.1:
        return n_k + rng.randint(1, 5), n_k
    return n_k, n_k


# --- the closure ---


def _scenes(drawn: Drawn, call: Call, tensors: Mapping[str, Tensor]) -> list[Scene]:
    group = call.heads[0] // call.heads[1]
    q, k, v = tensors["q"], *(tensors[name].repeat_interleave(group, 1) for name in "kv")
    inputs = {item.name: tensors[item.name] for item in drawn.inputs}
    cuts = call.cu_seqlens or [0, call.lengths[1]]
    scenes = []
    for start, end in pairwise(cuts):
        rows = slice(start, end) if call.cu_seqlens else slice(None)
        part = {item.name: _slice(inputs[item.name], item.dims, rows) for item in drawn.inputs}
        scenes.append(_scene(drawn, q[:, :, rows], k[:, :, rows], v[:, :, rows], part, call.heads[1]))
    return [replace(scene, scale=call.scale) for scene in scenes]


def _slice(x: Tensor, dims: tuple[str | int, ...], rows: slice) -> Tensor:
    return x[tuple(rows if dim in ("query", "key", "token") else slice(None) for dim in dims)]


def _scene(drawn: Drawn, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], kv_heads: int) -> Scene:
    n_q, n_k = q.shape[2], k.shape[2]
    offset = n_k - n_q if drawn.align == "end" else 0
    q_at, k_at = (torch.arange(n_q) + offset).view(1, 1, -1, 1), torch.arange(n_k).view(1, 1, 1, -1)
    together = None
    if drawn.documents is not None and not drawn.recurrent:
        ids = inputs[drawn.documents]
        new = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
        places = torch.arange(n_k).expand_as(ids)
        starts = torch.where(new, places, 0).cummax(1).values
        local, together = places - starts, starts[:, None, :, None] == starts[:, None, None, :]
        q_at, k_at = local[:, None, :, None], local[:, None, None, :]
    return Scene(q_at, k_at, torch.arange(q.shape[1]).view(1, -1, 1, 1), q, k, v, inputs, kv_heads, together)


def _dense(drawn: Drawn, call: Call, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    outs, lses = [], []
    for scene in _scenes(drawn, call, tensors):
        out, lse, _ = drawn.dense(scene)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), None if lses[0] is None else torch.cat([x for x in lses if x is not None], 2)


# --- comparing ---


def _grads(outputs: list[Tensor], grads: list[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _results(run: object, call: Call, leaves: Mapping[str, Tensor], with_lse: bool) -> dict[str, Tensor]:
    assert callable(run)
    copies = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out, lse = run(call.tensors(copies))
    results = {"out": out.detach()}
    outputs, grads = [out], [call.grads[0].to(out.dtype)]
    if with_lse and lse is not None:
        results["lse"] = lse.detach()
        outputs.append(lse)
        grads.append(torch.where(torch.isfinite(lse), call.grads[1], 0).to(lse.dtype))
    if any(x.requires_grad for x in outputs):
        results |= {f"d{name}": x for name, x in _grads(outputs, grads, copies).items()}
    return results


def check_call(attend: Attention, drawn: Drawn, call: Call) -> str:
    """Compare a call with the closure; return "agreed" or why the call was refused. Raise Mismatch."""
    exact_leaves = {name: x.double() for name, x in call.leaves.items()}
    leaves = dict(call.leaves)
    if call.hidden_nan and not drawn.recurrent and call.cu_seqlens is None:
        leaves, exact_leaves = _poisoned(drawn, call, leaves, exact_leaves)

    def dense(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return _dense(drawn, call, tensors)

    exact = _results(dense, call, exact_leaves, True)
    same = _results(dense, call, {name: x.to(call.leaves["q"].dtype) for name, x in exact_leaves.items()}, True)
    with_lse = "lse" in exact

    def compiled(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        more: dict[str, Any] = {**tensors, **({"cu_seqlens": torch.tensor(call.cu_seqlens)} if call.cu_seqlens else {})}
        more |= {} if call.scale is None else {"scale": call.scale}
        return attend(**more, return_lse=True) if with_lse else (attend(**more), None)

    try:
        actual = _results(compiled, call, leaves, with_lse)
    except AttncError as error:
        if "A901" in str(error):
            raise Mismatch(f"an error of attnc itself: {error}") from error
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    _compare(actual, exact, same, call.leaves["q"].dtype, by_kernels=call.by_kernels)
    return _check_decode(attend, drawn, call, leaves, exact, same)


def _check_decode(
    attend: Attention,
    drawn: Drawn,
    call: Call,
    leaves: Mapping[str, Tensor],
    exact: dict[str, Tensor],
    same: dict[str, Tensor],
) -> str:
    """Compare the last rows with the results of decode, for calls of plain tokens."""
    n_q, n_k = call.lengths
    plain = not drawn.recurrent and drawn.documents is None and drawn.grid is None and call.cu_seqlens is None
    if not plain or n_q > n_k or not call.batch or (drawn.align == "start" and n_q < n_k):
        return "agreed"
    tensors: dict[str, Any] = {name: x.detach() for name, x in call.tensors(leaves).items()}
    last = min(n_q, 1 + n_k % 3)
    rows = slice(n_q - last, n_q)
    q, k, v = tensors.pop("q")[:, :, rows], tensors.pop("k"), tensors.pop("v")
    decode: Any = attend.decode
    for item in drawn.inputs:
        by_row = tuple(rows if dim == "query" else slice(None) for dim in item.dims)
        tensors[item.name] = tensors[item.name][by_row]
    try:
        out = decode(q, k, v, kv_len=n_k, scale=call.scale, **tensors)
    except AttncError as error:
        if "A901" in str(error):
            raise Mismatch(f"decode: an error of attnc itself: {error}") from error
        return f"decode: {type(error).__name__}: {str(error).splitlines()[0]}"
    names = {"out": out}
    try:
        _compare(names, {"out": exact["out"][:, :, rows]}, {"out": same["out"][:, :, rows]}, q.dtype)
    except Mismatch as difference:
        raise Mismatch(f"decode: {difference}") from None
    return "agreed"


def _compare(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],
    same: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    by_kernels: bool = False,
) -> None:
    lse = exact["lse"][exact["lse"].isfinite()].abs() if "lse" in exact else torch.zeros(0)
    of_lse = LSE_ERRORS * torch.finfo(dtype).eps * float(lse.max()) if by_kernels and lse.numel() else 0.0
    for name, true in exact.items():
        if name not in actual:
            raise Mismatch(f"{name} is missing")
        ours = actual[name].double()
        if ours.shape != true.shape:
            raise Mismatch(f"{name} has shape {tuple(ours.shape)}, not {tuple(true.shape)}")
        finite = torch.isfinite(true)
        if not torch.equal(torch.where(finite, 0, true), torch.where(finite, 0, ours)):
            raise Mismatch(f"{name} is infinite or NaN where the closure is not, or the other way round")
        if not finite.any():
            continue
        largest = max(1.0, float(true[finite].abs().max()))
        own_error = float((same[name].double() - true)[finite].abs().max())
        relative = max(TOLERANCE[dtype], of_lse if name.startswith("d") else 0.0)
        allowed = max(relative * largest, OWN_ERRORS * own_error if math.isfinite(own_error) else 0.0)
        error = float((ours - true)[finite].abs().max())
        if not error <= allowed:
            raise Mismatch(f"{name} differs by {error:.3g} (allowed {allowed:.3g}; largest entry {largest:.3g})")


def _poisoned(
    drawn: Drawn, call: Call, leaves: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put NaN into keys and values that no query sees; the closure gets zeros there."""
    (scene,) = _scenes(drawn, call, call.tensors(exact))
    seen = drawn.dense(scene)[2].any(2)  # (B, H, Nk)
    seen = seen.view(seen.shape[0], call.heads[1], call.heads[0] // call.heads[1], seen.shape[-1]).any(2)
    if "select" in drawn.text or "* v" in drawn.text:
        return leaves, exact  # a hidden key still ranks its block, or is multiplied before it is masked
    ours = {name: torch.where(seen[..., None], leaves[name], math.nan) for name in "kv"}
    zero = {name: torch.where(seen[..., None], exact[name], 0) for name in "kv"}
    return {**leaves, **ours}, {**exact, **zero}


def check_case(drawn: Drawn, rng: random.Random, backend: str, longest: int, calls: int = 3) -> list[str]:
    """Compile a drawn text and compare several calls; repeat the last calls from two threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attend = compile_attention(drawn.text, backend=backend)  # type: ignore[arg-type]
        except AttncError as error:
            return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        made = [draw_call(drawn, rng, longest) for _ in range(calls)]
        if backend == "triton":  # kernels multiply hidden values by 0, which keeps NaN
            made = [replace(call, hidden_nan=False, by_kernels=True) for call in made]
        outcomes = []
        again = made[:1] if rng.random() < 0.2 else []  # after calls of other lengths
        for call in [*made, *again]:
            try:
                outcomes.append(check_call(attend, drawn, call))
                if "select" in drawn.text and backend != "triton":  # these calls are small: run them as large ones too
                    with patch.object(masked, "WORK", 0):
                        check_call(attend, drawn, call)
            except Mismatch as difference:
                raise Mismatch(f"{call.words}\n  {difference}") from None
            except Exception as error:
                raise Mismatch(f"{call.words}\n  {type(error).__name__}: {error}") from error
        if backend != "triton" and rng.random() < 0.2:
            _in_threads(attend, drawn, made)
    return outcomes


def _in_threads(attend: Attention, drawn: Drawn, calls: list[Call]) -> None:
    failed: list[str] = []

    def again(call: Call) -> None:
        try:
            check_call(attend, drawn, call)
        except Exception as error:
            failed.append(f"{call.words}\n  in one of several threads: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=again, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise Mismatch(failed[0])
