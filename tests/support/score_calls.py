"""Calls of the patterns with scores of their own, and what their results are held against: `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from attnc.runtime.accuracy import TIMES, UNITS
from reference import attention, normalisers, scores

Inputs = Mapping[str, Tensor]
Run = Callable[..., attention.Result]


@dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    n_q: int
    n_k: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    dk: int = 8
    dv: int = 5

    def __repr__(self) -> str:
        return f"{self.n_q}x{self.n_k},heads={self.heads}/{self.kv_heads}"


@dataclass(frozen=True)
class System:
    """A pattern with parameters, its dense reference, and inputs for a shape."""

    name: str
    reference: Run
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Shape], dict[str, Tensor]] = lambda shape: {}
    aligned: bool = True
    """Whether there may be fewer queries than keys."""

    def __repr__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.name}({given})".replace(" ", "")

    def compiled(self) -> Attention:
        return compile_attention(self.name, **self.params)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **inputs: Tensor) -> attention.Result:
        return self.reference(q, k, v, **inputs, **self.params)

    def operands(self, shape: Shape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """q, k, v and the inputs; the real ones want gradients."""
        s = shape
        sizes = {
            "q": (s.batch, s.heads, s.n_q, s.dk),
            "k": (s.batch, s.kv_heads, s.n_k, s.dk),
            "v": (s.batch, s.kv_heads, s.n_k, s.dv),
        }
        drawn = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()} | self.inputs(shape)
        return {name: leaf(x, dtype) for name, x in drawn.items()}


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x


def real(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


DISTANCES = 6


def t5(**params: Any) -> System:
    def inputs(shape: Shape) -> dict[str, Tensor]:
        return {"table": real(shape.heads, params.get("buckets", 32))}

    return System("t5", scores.t5, params, inputs, aligned=False)


SYSTEMS = [
    System("alibi", scores.alibi),
    System("music_relative", scores.music_relative, {}, lambda s: {"E": real(s.heads, s.n_k + 3, s.dk)}),
    System(
        "graphormer",
        scores.graphormer,
        {},
        lambda s: {
            "distance": torch.randint(0, DISTANCES, (s.batch, s.n_q, s.n_k)),
            "table": real(s.heads, DISTANCES),
        },
        aligned=False,
    ),
    System("softcap", scores.softcap),
    System("softcap", scores.softcap, {"cap": 1.5, "window": 20}),
    System("softcap", scores.softcap, {"cap": 0.25, "window": 1}),
    System("fox", scores.fox, {}, lambda s: {"f": -real(s.batch, s.n_k, s.heads).abs()}),
    System("gpt_oss", normalisers.gpt_oss, {}, lambda s: {"sink": real(s.heads)}),
    System("gpt_oss", normalisers.gpt_oss, {"window": 17}, lambda s: {"sink": real(s.heads)}),
    System("gpt_oss", normalisers.gpt_oss, {"window": 1}, lambda s: {"sink": real(s.heads)}),
    t5(),
    t5(causal=True),
    t5(buckets=8, far=20),
    t5(buckets=12, far=100, causal=True),
]
DEFAULTS = [system for system in SYSTEMS if not system.params or system.params == {"causal": True}]

EXECUTORS = ["cpu", "reference"]


def named(name: str) -> System:
    return next(system for system in DEFAULTS if system.name == name)


def executor(attend: Attention, name: str) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> attention.Result:
        if name == "cpu":
            return attend(q, k, v, return_lse=True, **inputs)
        return attend.reference(q, k, v, return_lse=True, **inputs)

    return run


def results(run: Run, operands: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """out, lse and the gradient of every real operand, under `grads` of out and lse."""
    out, lse = run(**operands)
    wanted = {name: x for name, x in operands.items() if x.requires_grad}
    heads = tuple(grad.to(x.dtype) for grad, x in zip(grads, (out, lse), strict=True))
    found = torch.autograd.grad((out, lse), tuple(wanted.values()), heads)
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": x for name, x in zip(wanted, found, strict=True)}


def grads_for(operands: Inputs) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse, rounded to their dtypes."""
    rows, dtype = operands["q"].shape[:3], operands["q"].dtype
    grad_out, grad_lse = real(*rows, operands["v"].shape[-1]), real(*rows)
    return grad_out.to(dtype), grad_lse.to(torch.promote_types(dtype, torch.float32))


def assert_equals(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].shape == x.shape, name
        assert torch.allclose(found[name], x, rtol=1e-10, atol=1e-10), f"{name}: off by {distance(found[name], x):.3g}"


def check(run: Run, dense: Run, operands: Inputs) -> dict[str, Tensor]:
    """The results of a run in fp64, equal to the reference's."""
    grads = grads_for(operands)
    found = results(run, operands, grads)
    assert_equals(found, results(dense, operands, grads))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinities must be equal."""
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0, (a - b).abs()).max())


def check_twice(run: Run, dense: Run, operands: Inputs) -> None:
    """The rule of `runtime/accuracy.py`, for every real operand: twice the dense error, plus a few units."""
    grads = grads_for(operands)
    wanted = results(dense, {name: leaf(x, torch.float64) for name, x in operands.items()}, grads)
    plain, found = results(dense, operands, grads), results(run, operands, grads)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in plain.items()}
    errors = {}
    for name, x in wanted.items():
        dtype = operands["q"].dtype if name in ("out", "lse") else operands[name[1:]].dtype
        largest = float(torch.where(torch.isfinite(x), x, 0).abs().max())
        allowed = TIMES * distance(plain[name], x) + UNITS[dtype] * torch.finfo(dtype).eps * largest
        error = distance(found[name], x)
        if not error <= allowed:
            errors[name] = f"{error:.3g}, allowed {allowed:.3g}"
    assert not errors, errors


def check_nothing_seen(found: Mapping[str, Tensor], seeing: Tensor) -> None:
    """Rows (B, Hq, Nq) that see nothing are exactly nothing, and everything else is finite."""
    assert torch.equal(found["lse"] == -math.inf, ~seeing)
    assert not found["out"][~seeing].any()
    assert not found["dq"][~seeing].any()
    assert all(bool(x.isfinite().all()) for name, x in found.items() if name != "lse")
    assert bool(found["lse"][seeing].isfinite().all())
