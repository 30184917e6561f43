"""Calls of the patterns with weights, keys or branches of their own, held against `weight_references.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

import weight_references as truth
from attnc import Attention, compile_attention
from attnc.runtime.accuracy import TIMES, UNITS
from reference.combiner import combiner_axial, combiner_log_sparse, combiner_mixture
from score_calls import assert_equals, distance, leaf, real

Inputs = Mapping[str, Tensor]
Dense = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a call; dv is dk unless it is given."""

    n_q: int
    n_k: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    dk: int = 4
    dv: int = 4

    def __repr__(self) -> str:
        return f"{self.n_q}x{self.n_k},heads={self.heads}/{self.kv_heads}"


def square(n: int, **rest: int) -> Shape:
    return Shape(n, n, **rest)


@dataclass(frozen=True)
class System:
    """A pattern with parameters, its dense reference, its inputs for a shape, and shapes to call it with."""

    name: str
    dense: Dense
    """(q, k, v, scale = …, inputs) → out"""
    shapes: Sequence[Shape]
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Shape], dict[str, Tensor]] = lambda shape: {}
    half: bool = True
    """Whether torch has the formula in bf16 and fp16; if not, it is computed in fp32 and rounded."""

    def __repr__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.name}({given})".replace(" ", "")

    def compiled(self, **options: Any) -> Attention:
        return compile_attention(self.name, **self.params, **options)

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


def scaled(reference: Callable[..., Tensor], **fixed: Any) -> Dense:
    """A reference that takes the scale."""

    def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: Tensor) -> Tensor:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference(q, k, v, scale=factor, **fixed, **inputs)

    return dense


def unscaled(reference: Callable[..., Tensor], **fixed: Any) -> Dense:
    """A reference whose scores do not know the scale."""

    def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: Tensor) -> Tensor:
        return reference(q, k, v, **fixed, **inputs)

    return dense


def _residual(q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, w: Tensor, scale: float) -> Tensor:
    return truth.attention_residual(x, w=w, scale=scale, heads=q.shape[1])


def _differential(q: Tensor, k: Tensor, v: Tensor, *, lambda_: Tensor, init: float) -> Tensor:
    return truth.differential(q, k, v, weight=lambda_, init=init)


def _combiner(q: Tensor, k: Tensor, v: Tensor, *, scale: float, segment: int) -> Tensor:
    return truth.combiner(q, k, v, scale=scale, segment=segment)[0]


def _second(reference: Callable[..., tuple[None, Tensor]]) -> Dense:
    """Of a reference that gives what is seen, too, its output."""
    return lambda *args, **given: reference(*args, **given)[1]


LINES = [square(1), square(2), square(23), square(40, heads=3, kv_heads=3, batch=1)]
FEWER = [Shape(1, 19), Shape(17, 30, batch=1)]
WIDE = square(9, dk=3, dv=7)


def grids(height: int, width: int) -> list[Shape]:
    return [square(height * width), square(height * width, heads=2, kv_heads=1, batch=1)]


def _windows(window: list[int], layer: int, name: str, reference: Callable[..., Tensor]) -> System:
    params = {"frames": 3, "height": 4, "width": 5, "window": window, "layer": layer}
    return System(name, scaled(reference, **params), [square(60)], params)


def _halo(height: int, width: int, block: int, halo: int) -> System:
    params = {"height": height, "width": width, "block": block, "halo": halo}
    span = 2 * (block + halo) - 1
    inputs = {"row": span, "col": span}
    return System(
        "halo",
        scaled(truth.halo, **params),
        grids(height, width),
        params,
        lambda s: {name: real(size, s.dk) for name, size in inputs.items()},
    )


def _longformer(window: int, dilation: list[int]) -> System:
    def inputs(s: Shape) -> dict[str, Tensor]:
        return {
            "is_global": torch.rand(s.batch, s.n_k) > 0.8,
            "qg": real(s.batch, s.heads, s.n_q, s.dk),
            "kg": real(s.batch, s.heads, s.n_k, s.dk),
            "vg": real(s.batch, s.heads, s.n_k, s.dv),
        }

    params = {"window": window, "dilation": dilation}
    return System("longformer", scaled(truth.longformer, **params), [square(1), square(31)], params, inputs)


def _lags(s: Shape) -> dict[str, Tensor]:
    return {"lag": torch.randint(0, s.n_k, (s.batch, 3))}


SYSTEMS = [
    System(
        "differential",
        unscaled(_differential, init=0.8),
        [*LINES, *FEWER],
        inputs=lambda s: {"lambda_": real(s.heads)},
    ),
    System("softplus_lssa", unscaled(truth.softplus_lssa), [*LINES, *FEWER, WIDE]),
    System("softplus_lssar", unscaled(truth.softplus_lssar, power=15, offset=1), [*LINES, *FEWER, WIDE]),
    System(
        "softplus_lssar", unscaled(truth.softplus_lssar, power=2, offset=0), [square(12)], {"power": 2, "offset": 0}
    ),
    System(
        "affine_scaled",
        scaled(truth.affine_scaled),
        [*LINES, *FEWER, WIDE],
        inputs=lambda s: {name: real(s.batch, s.heads, s.n_q) for name in ("alpha", "beta")},
    ),
    System("landmark", scaled(truth.landmark, block=50), [square(40), square(130, batch=1)]),
    System("landmark", scaled(truth.landmark, block=3), [*LINES, *FEWER, WIDE], {"block": 3}),
    System("hierarchical", unscaled(truth.hierarchical, group=4), [*LINES[1:], WIDE], {"group": 4}),
    System(
        "attention_residual",
        scaled(_residual),
        [square(1), square(14)],
        inputs=lambda s: {"x": real(s.batch, s.n_k, 5, s.dv), "w": real(s.dv)},
    ),
    *(
        System(
            "davit_window",
            scaled(truth.davit_window, height=h, width=w, window=window),
            grids(h, w),
            {"height": h, "width": w, "window": window},
        )
        for h, w, window in ((9, 8, 7), (6, 4, 2), (1, 5, 3))
    ),
    System("davit_channel", scaled(truth.davit_channel), [square(1), square(20)]),
    _halo(5, 7, 3, 2),
    _halo(4, 4, 2, 1),
    _halo(3, 3, 4, 0),
    _windows([2, 3, 2], 0, "lingen_temporal", truth.lingen_temporal),
    _windows([2, 3, 2], 1, "lingen_temporal", truth.lingen_temporal),
    _windows([2, 2, 3], 0, "videofactory", truth.videofactory),
    _windows([2, 2, 3], 3, "videofactory", truth.videofactory),
    System("local_linear", scaled(truth.local_linear, ridge=0.01), [square(1), square(23), *FEWER], half=False),
    System("local_linear", scaled(truth.local_linear, ridge=0.5), [square(9, dk=3, dv=7)], {"ridge": 0.5}, half=False),
    System("combiner", scaled(_combiner, segment=4), [*LINES, WIDE], {"segment": 4}),
    System("combiner", scaled(_combiner, segment=7), [square(40)], {"segment": 7}),
    *(
        System("combiner_axial", scaled(_second(combiner_axial), width=w), [square(n), square(2 * w)], {"width": w})
        for n, w in ((20, 5), (21, 7), (9, 1), (5, 5))
    ),
    *(
        System("combiner_mixture", scaled(_second(combiner_mixture), width=w), [square(n)], {"width": w})
        for n, w in ((20, 5), (21, 7), (3, 1), (5, 5))
    ),
    *(
        System("combiner_log_sparse", scaled(_second(combiner_log_sparse), levels=levels), shapes, {"levels": levels})
        for levels, shapes in ((6, [*LINES, WIDE]), (4, [square(16), square(13)]))
    ),
    System("monarch", scaled(truth.monarch, rows=4, cols=6), grids(4, 6), {"rows": 4, "cols": 6}),
    System("monarch", scaled(truth.monarch, rows=1, cols=5), grids(1, 5), {"rows": 1, "cols": 5}),
    *(
        System("monarch_rt", scaled(truth.monarch_rt, **grid), [square(prod(grid.values()))], grid)
        for grid in ({"frames": 3, "height": 2, "width": 4}, {"frames": 1, "height": 1, "width": 5})
    ),
    _longformer(2, [1, 2, 1, 3]),
    _longformer(0, [1, 1, 1, 1]),
    System("autoformer_lags", unscaled(truth.autoformer_lags), [square(1), square(17)], inputs=_lags),
    System("sqa", scaled(truth.sqa), [*LINES, *FEWER, WIDE, square(11, heads=2, kv_heads=2)]),
]


def results(run: Dense, operands: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """out and the gradient of every real operand, 0 where it has none, under a gradient of out."""
    out = run(**operands)
    wanted = {name: x for name, x in operands.items() if x.requires_grad}
    some: Any = torch.autograd.grad(out, tuple(wanted.values()), grad.to(out.dtype), allow_unused=True)
    grads = {
        f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(wanted.items(), some, strict=True)
    }
    return {"out": out.detach()} | grads


def grad_for(operands: Inputs) -> Tensor:
    q, v = operands["q"], operands["v"]
    return real(*q.shape[:3], v.shape[-1])


def check(run: Dense, dense: Dense, operands: Inputs) -> dict[str, Tensor]:
    """The results of a run in fp64, equal to the reference's."""
    grad = grad_for(operands)
    found = results(run, operands, grad)
    assert_equals(found, results(dense, operands, grad))
    return found


def check_twice(run: Dense, system: System, operands: Inputs) -> None:
    """The rule of `runtime/accuracy.py`: twice the error of the same formula in that dtype, plus a few units."""
    grad, dense = grad_for(operands), system.dense
    exact = {name: leaf(x, torch.float64) for name, x in operands.items()}
    wanted, found = results(dense, exact, grad), results(run, operands, grad)
    near = operands if system.half else {name: leaf(x, torch.float32) for name, x in operands.items()}
    plain = {name: x.to(operands["q"].dtype) for name, x in results(dense, near, grad).items()}
    dtype, errors = operands["q"].dtype, {}
    for name, x in wanted.items():
        assert found[name].dtype == dtype, name
        largest = float(torch.where(torch.isfinite(x), x, 0).abs().max()) if x.numel() else 0.0
        allowed = TIMES * distance(plain[name], x) + UNITS[dtype] * torch.finfo(dtype).eps * largest
        if not distance(found[name], x) <= allowed:
            errors[name] = f"{distance(found[name], x):.3g}, allowed {allowed:.3g}"
    assert not errors, errors
