"""Cases of patterns with weights other than a plain softmax, from `normalisers/`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cases.case import Shape, real
from cases.scores import CAUSAL, near, scored
from cases.system import FEWER, LINES, WIDE, System, rows, scaled, square, unscaled
from reference import masks, normalisers
from reference.masks import Mask


def sink(s: Shape) -> dict[str, Tensor]:
    return {"sink": real(s.heads)}


def gpt_oss(window: int | None = None) -> System:
    params = {} if window is None else {"window": window}
    return scored("gpt_oss", normalisers.gpt_oss, params, sink, near(window or 128))


def without_doors(block: int, n: int) -> Mask:
    """Return the causal mask without the landmark of a query's own block, which is hidden from its own row too."""
    own_block = np.arange(n)[:, None] // (block + 1) == np.arange(n) // (block + 1)
    mark = np.arange(n) % (block + 1) == block
    seen: Mask = masks.causal(n) & ~(own_block & mark)
    return seen


def landmark(block: int, shapes: list[Shape]) -> System:
    mask = rows(lambda n: without_doors(block, n))
    params = {} if block == 50 else {"block": block}
    return System("landmark", scaled(normalisers.landmark, block=block), shapes, params, mask=mask)


def row_factors(s: Shape) -> dict[str, Tensor]:
    return {name: real(s.batch, s.heads, s.n_q) for name in ("alpha", "beta")}


SINKS = [gpt_oss(), gpt_oss(17), gpt_oss(1)]
SHARP = {"power": 2, "offset": 0}
RIDGE = {"ridge": 0.5}
SYSTEMS = [
    System("softplus_lssa", unscaled(normalisers.softplus_lssa), [*LINES, *FEWER, WIDE], mask=CAUSAL),
    System(
        "softplus_lssar",
        unscaled(normalisers.softplus_lssar, power=15, offset=1),
        [*LINES, *FEWER, WIDE],
        mask=CAUSAL,
    ),
    System("softplus_lssar", unscaled(normalisers.softplus_lssar, **SHARP), [square(12)], SHARP, mask=CAUSAL),
    System(
        "affine_scaled",
        scaled(normalisers.affine_scaled),
        [*LINES, *FEWER, WIDE],
        inputs=row_factors,
        mask=CAUSAL,
    ),
    landmark(50, [square(40), square(130, batch=1)]),
    landmark(3, [*LINES, *FEWER, WIDE]),
    System(
        "local_linear",
        scaled(normalisers.local_linear, ridge=0.01),
        [square(1), square(23), *FEWER],
        mask=CAUSAL,
        half=False,
    ),
    System(
        "local_linear",
        scaled(normalisers.local_linear, **RIDGE),
        [square(9, dk=3, dv=7)],
        RIDGE,
        mask=CAUSAL,
        half=False,
    ),
]
CASES = [case for system in [*SINKS, *SYSTEMS] for case in system.cases()]
