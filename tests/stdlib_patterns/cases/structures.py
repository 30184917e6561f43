"""Cases of patterns with their own views, keys or branches, from `structures/` and other families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases.case import Shape, Tensors, real
from cases.scores import CAUSAL, FULL
from cases.system import FEWER, LINES, WIDE, Mask, System, rows, scaled, square, unscaled
from reference import grids, masks, structures
from reference.combiner import combiner_axial, combiner_log_sparse, combiner_mixture

# --- tokens of a sequence ---------------------------------------------------------------------------------------------


def _residual(q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, w: Tensor, scale: float) -> Tensor:
    return structures.attention_residual(x, w=w, scale=scale, heads=q.shape[1])


def _differential(q: Tensor, k: Tensor, v: Tensor, *, lambda_: Tensor, init: float) -> Tensor:
    return structures.differential(q, k, v, weight=lambda_, init=init)


def _combiner(q: Tensor, k: Tensor, v: Tensor, *, scale: float, segment: int) -> Tensor:
    return structures.combiner(q, k, v, scale=scale, segment=segment)[0]


def combiner(segment: int, shapes: list[Shape]) -> System:
    params = {"segment": segment}
    return System("combiner", scaled(_combiner, **params), shapes, params, mask=CAUSAL)


def _second(reference: Callable[..., tuple[None, Tensor]]) -> Callable[..., Tensor]:
    """Return the output of a reference that returns the mask, too."""
    return lambda *args, **arguments: reference(*args, **arguments)[1]


def in_rows(width: int, seen: Callable[[Any, Any], Any]) -> Mask:
    """Return the mask from how many rows and columns the key is before the query (negative: after it)."""

    def pairs(n: int) -> Any:
        y, x = np.divmod(np.arange(n), width)
        return seen(y[:, None] - y, x[:, None] - x)

    return rows(pairs)


def axial(width: int, *tokens: int) -> System:
    """A query sees its whole row; in each earlier row it sees its own column through that row's summary."""
    params = {"width": width}
    mask = in_rows(width, lambda up, left: (up == 0) | (left == 0) & (up > 0))
    dense = scaled(_second(combiner_axial), **params)
    return System("combiner_axial", dense, list(map(square, tokens)), params, mask=mask)


def mixture(width: int, tokens: int) -> System:
    """A query sees its row and column, the row above by column summaries, adjacent columns by row summaries."""
    params = {"width": width}
    mask = in_rows(width, lambda up, left: (up == 0) | (up == 1) | (up > 0) & (abs(left) <= 1))
    dense = scaled(_second(combiner_mixture), **params)
    return System("combiner_mixture", dense, [square(tokens)], params, mask=mask)


def log_sparse(levels: int, shapes: list[Shape]) -> System:
    """A query sees itself, and the token before it if that token is a span; longer spans are summaries."""
    params = {"levels": levels}
    single = rows(lambda n: np.eye(n, dtype=bool) | np.eye(n, k=-1, dtype=bool) & (np.arange(n)[:, None] % 2 == 1))
    dense = scaled(_second(combiner_log_sparse), **params)
    return System("combiner_log_sparse", dense, shapes, params, mask=single)


def longformer(window: int, dilation: list[int]) -> System:
    def inputs(s: Shape) -> dict[str, Tensor]:
        return {
            "is_global": torch.rand(s.batch, s.n_k) > 0.8,
            "qg": real(s.batch, s.heads, s.n_q, s.dk),
            "kg": real(s.batch, s.heads, s.n_k, s.dk),
            "vg": real(s.batch, s.heads, s.n_k, s.dv),
        }

    def mask(operands: Tensors) -> Tensor:
        tokens = operands["is_global"].tolist()
        n = len(tokens[0])
        mask_list = [
            [masks.longformer_mask(n, window, step, globals_of_entry) for step in dilation]
            for globals_of_entry in tokens
        ]
        return torch.from_numpy(np.array(mask_list))

    params = {"window": window, "dilation": dilation}
    shapes = [square(1), square(31), square(18, batch=1)]
    return System("longformer", scaled(masks.longformer, **params), shapes, params, inputs, mask)


def _lags(s: Shape) -> dict[str, Tensor]:
    return {"lag": torch.randint(0, s.n_k, (s.batch, 3))}


IN_LINE = [
    System(
        "differential",
        unscaled(_differential, init=0.8),
        [*LINES, *FEWER],
        inputs=lambda s: {"lambda_": real(s.heads)},
        mask=CAUSAL,
    ),
    System("hierarchical", unscaled(structures.hierarchical, group=4), [*LINES[1:], WIDE], {"group": 4}, mask=FULL),
    System(
        "attention_residual",
        scaled(_residual),
        [square(1), square(14), square(37, heads=2, kv_heads=2, batch=1)],
        inputs=lambda s: {"x": real(s.batch, s.n_k, 5, s.dv), "w": real(s.dv)},
    ),
    System("davit_channel", scaled(structures.davit_channel), [square(1), square(20), square(33, dk=3, dv=3)]),
    combiner(4, [*LINES, WIDE]),
    combiner(7, [square(40)]),
    *(axial(w, n, 2 * w) for n, w in ((20, 5), (21, 7), (9, 1), (5, 5))),
    *(mixture(w, n) for n, w in ((20, 5), (21, 7), (3, 1), (5, 5))),
    log_sparse(6, [*LINES, WIDE]),
    log_sparse(4, [square(16), square(13)]),
    longformer(2, [1, 2, 1, 3]),
    longformer(0, [1, 1, 1, 1]),
    System(
        "autoformer_lags",
        unscaled(structures.autoformer_lags),
        [square(1), square(17), square(40, heads=3, kv_heads=3)],
        inputs=_lags,
    ),
    System("sqa", scaled(structures.sqa), [*LINES, *FEWER, WIDE, square(11, heads=2, kv_heads=2)], mask=CAUSAL),
]

# --- tokens of a grid -------------------------------------------------------------------------------------------------


def pictures(height: int, width: int) -> list[Shape]:
    return [square(height * width), square(height * width, heads=2, kv_heads=1, batch=1)]


def product_of(extents: tuple[int, ...], sees: Callable[[int, int], Any]) -> Mask:
    """Return the mask of a grid whose axes see by `sees`."""
    return rows(lambda n: grids.grid(extents, sees))


def windows(size: tuple[int, int, int], window: list[int], layer: int, name: str) -> System:
    params = {**dict(zip(("frames", "height", "width"), size, strict=True)), "window": window, "layer": layer}
    moved = layer % 2 * np.array([length // 2 for length in window])
    moved = moved * ([1, 0, 0] if name == "lingen_temporal" else [1, 1, 1])
    mask = product_of(size, lambda axis, x: grids.beside(x, size[axis], window[axis], int(moved[axis])))
    reference = {"lingen_temporal": grids.lingen_temporal, "videofactory": grids.videofactory}[name]
    return System(name, scaled(reference, **params), [square(prod(size))], params, mask=mask)


def davit_window(height: int, width: int, window: int) -> System:
    params = {"height": height, "width": width, "window": window}
    size = (height, width)
    mask = product_of(size, lambda axis, x: grids.beside(x, size[axis], window))
    return System("davit_window", scaled(grids.davit_window, **params), pictures(height, width), params, mask=mask)


def halo(height: int, width: int, block: int, halo: int) -> System:
    params = {"height": height, "width": width, "block": block, "halo": halo}
    span, size = 2 * (block + halo) - 1, (height, width)
    return System(
        "halo",
        scaled(grids.halo, **params),
        pictures(height, width),
        params,
        lambda s: {name: real(span, s.dk) for name in ("row", "col")},
        product_of(size, lambda axis, x: grids.around(x, size[axis], block, halo)),
    )


def of_grid(extents: Mapping[str, int], seen: Callable[[Any], Any]) -> Mask:
    """Return a mask from coordinates; `seen` gets, for each axis, which pairs have equal coordinates, (N, N)."""
    places = np.indices(tuple(extents.values())).reshape(len(extents), -1)
    return rows(lambda n: seen(places[:, :, None] == places[:, None]))


def monarch(grid: dict[str, int], shapes: list[Shape]) -> System:
    """Return the system of one of the two factors, which sees a query's own row or its own column."""
    return System(
        "monarch", scaled(structures.monarch, **grid), shapes, grid, mask=of_grid(grid, lambda same: same[0] | same[1])
    )


def monarch_rt(grid: dict[str, int]) -> System:
    """A query sees its own row in every frame, which the inner factor scores; the outer factor scores no tokens."""
    shapes = [square(prod(grid.values()))]
    return System(
        "monarch_rt", scaled(structures.monarch_rt, **grid), shapes, grid, mask=of_grid(grid, lambda same: same[1])
    )


OF_GRIDS = [
    *(davit_window(*sizes) for sizes in ((9, 8, 7), (6, 4, 2), (1, 5, 3))),
    halo(5, 7, 3, 2),
    halo(4, 4, 2, 1),
    halo(3, 3, 4, 0),
    windows((3, 4, 5), [2, 3, 2], 0, "lingen_temporal"),
    windows((3, 4, 5), [2, 3, 2], 1, "lingen_temporal"),
    windows((5, 2, 3), [3, 2, 2], 1, "lingen_temporal"),
    windows((2, 3, 7), [2, 2, 3], 0, "lingen_temporal"),
    windows((3, 4, 5), [2, 2, 3], 0, "videofactory"),
    windows((3, 4, 5), [2, 2, 3], 3, "videofactory"),
    windows((2, 5, 3), [2, 3, 2], 1, "videofactory"),
    windows((2, 3, 7), [2, 2, 3], 0, "videofactory"),
    monarch({"rows": 4, "cols": 6}, pictures(4, 6)),
    monarch({"rows": 1, "cols": 5}, pictures(1, 5)),
    monarch_rt({"frames": 3, "height": 2, "width": 4}),
    monarch_rt({"frames": 1, "height": 1, "width": 5}),
    monarch_rt({"frames": 2, "height": 3, "width": 3}),
]
SYSTEMS = [*IN_LINE, *OF_GRIDS]
CASES = [case for system in SYSTEMS for case in system.cases()]
