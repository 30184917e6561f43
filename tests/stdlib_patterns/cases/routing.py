"""Cases of patterns whose content selects blocks or tokens, from `routing/`; see `clusters` for the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from cases.case import Case, Parts, Shape, Tensors, inputs_of, real
from reference import clusters, routing
from reference.attention import positions
from reference.dhsa import dhsa
from reference.flash_moba import flash_moba
from reference.flux import flux
from reference.hip import hip
from reference.mminference_boundary import mminference_boundary
from reference.mminference_grid import mminference_grid
from reference.rectified import rectified
from reference.routing import blocks_of, hybrid_forcing_frames
from reference.sparsifiner import sparsifiner
from reference.ssa_random import ssa_random
from reference.superlinear import superlinear
from reference.temp_cache import temp_cache

BY_NAME: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "dhsa": dhsa,
    "flash_moba": flash_moba,
    "flux": flux,
    "hip": hip,
    "mminference_boundary": mminference_boundary,
    "mminference_grid": mminference_grid,
    "rectified": rectified,
    "sparsifiner": sparsifiner,
    "ssa_random": ssa_random,
    "superlinear": superlinear,
    "temp_cache": temp_cache,
}
"""Patterns whose cases are in another file."""

REFERENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {**routing.REFERENCES, **clusters.REFERENCES, **BY_NAME}

HEADS, KV_HEADS, DK, DV = 4, 2, 5, 3
Inputs = dict[str, Any]
"""Tensors by name."""


def reference_of(name: str) -> Callable[..., Any]:
    """Return the reference of a family, or the function of this name in its own module; it returns mask and output."""
    if name in REFERENCES:
        return REFERENCES[name]
    return getattr(importlib.import_module(f"reference.{name}"), name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Routed:
    """A pattern with parameters, and the numbers of queries and keys of a call of two sequences."""

    name: str
    n_q: int
    n_k: int
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, int], Inputs] = lambda n_q, n_k: {}
    """Arguments of the reference, in addition to the pattern's parameters or instead of them."""

    def __repr__(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}({settings})-{self.n_q}-{self.n_k}".replace(" ", "")

    def compiled(self) -> Attention:
        return compile_attention(self.name, **self.params)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = reference_of(self.name)(q, k, v, **inputs, **self.params)
        return result

    def drawn(self) -> tuple[list[Tensor], Inputs]:
        qkv = [real(2, HEADS, self.n_q, DK), real(2, KV_HEADS, self.n_k, DK), real(2, KV_HEADS, self.n_k, DV)]
        return qkv, self.inputs(self.n_q, self.n_k)


def native_gate(n_q: int, n_k: int) -> Inputs:
    return {"gate": torch.rand(2, n_q, HEADS, 3, dtype=torch.float64)}


def indexer(n_q: int, n_k: int) -> Inputs:
    return {"iq": real(2, n_q, 3, 4), "ik": real(2, n_k, 4), "w": real(2, n_q, 3)}


def seer_gates(n_q: int, n_k: int) -> Inputs:
    """Draw gates with more rows and columns than there are blocks of 8."""
    return {"gq": real(2, HEADS, blocks_of(n_q, 8) + 2, 6), "gk": real(2, HEADS, blocks_of(n_k, 8) + 1, 6)}


def seer_gate(n_q: int, n_k: int) -> Inputs:
    return {"gate": real(2, KV_HEADS, n_q, blocks_of(n_k, 8) + 1)}


def key_bias(n_q: int, n_k: int) -> Inputs:
    return {"bias": real(2, KV_HEADS, n_k)}


def vsa_gate(n_q: int, n_k: int) -> Inputs:
    return {"gate": real(2, HEADS, n_q, DV)}


def maps_of(block: int) -> Callable[[int, int], Inputs]:
    def draw(n_q: int, n_k: int) -> Inputs:
        return {"map": torch.rand(2, HEADS, blocks_of(n_q, block), blocks_of(n_k, block)) > 0.6}

    return draw


def cache(n_q: int, n_k: int) -> Inputs:
    """Draw positions before and after `since`, with duplicates, and positions out of range."""
    return {"cached": torch.randint(-2, n_k + 2, (2, KV_HEADS, 9)), "since": torch.tensor([n_k - 7, n_k - 2])}


VIDEO: dict[str, Any] = {"frames": 3, "height": 5, "width": 7}


def vmoba(topk: int, layer: int, **params: Any) -> Routed:
    settings = {**VIDEO, "chunk": [2, 2, 3], "topk": topk, "layer": layer, **params}
    n = settings["frames"] * settings["height"] * settings["width"]
    return Routed("vmoba", n, n, settings)


def vmoba_threshold(tau: float, layer: int, **params: Any) -> Routed:
    settings = {**VIDEO, "chunk": [2, 2, 3], "tau": tau, "layer": layer, **params}
    n = settings["frames"] * settings["height"] * settings["width"]
    return Routed("vmoba_threshold", n, n, settings)


def vsa(density: float, frames: int, height: int, width: int) -> Routed:
    n = frames * height * width
    settings = {"frames": frames, "height": height, "width": width, "tile": [2, 2, 3], "density": density}
    return Routed("vsa", n, n, settings, vsa_gate)


# For two lengths, the second leaves a short last block; if the first is smaller, the queries are the last ones.
ROUTED = [
    *[Routed("moba", n_q, 37, {"block": 8, "topk": topk}) for n_q in (37, 11) for topk in (1, 3, 9)],
    Routed("moba", 5, 5, {"block": 8, "topk": 3}),
    *[
        Routed("native_sparse", n_q, 45, {"block": 8, "topk": topk, "window": 11}, native_gate)
        for n_q in (45, 13)
        for topk in (3, 4, 16)
    ],
    *[
        Routed("landmark_retrieval", n_q, n_k, {"block": block, "topk": topk})
        for n_q, n_k, block, topk in ((45, 45, 6, 2), (13, 45, 6, 1), (20, 20, 1, 50), (45, 45, 50, 4))
    ],
    Routed("native_sparse", 6, 6, {"block": 8, "topk": 4, "window": 3}, native_gate),
    *[vmoba(2, layer) for layer in range(4)],
    *[vmoba(topk, 2) for topk in (1, 3, 31)],
    *[vmoba(2, layer, frames=4, height=3, width=4) for layer in (0, 2)],
    vmoba(1, 1, frames=2, height=6, width=5),
    *[vmoba_threshold(0.25, layer) for layer in range(4)],
    *[vmoba_threshold(tau, 2) for tau in (0, 0.6, 0.95)],
    *[vmoba_threshold(0.3, layer, frames=4, height=3, width=4) for layer in (0, 2)],
    vmoba_threshold(0.5, 1, frames=2, height=6, width=5),
    *[Routed("deepseek_sparse", n_q, 33, {"topk": topk}, indexer) for n_q in (33, 9) for topk in (1, 5, 50)],
    Routed("deepseek_sparse", 57, 57, {"topk": 5}, indexer),
    *[
        Routed("seer", n, n, {"block": 8, "threshold": threshold, "dense_rows": rows}, seer_gates)
        for n in (37, 27, 64)
        for threshold, rows in ((0.2, 1), (0.3, 0), (0.002, 2), (0.9, 9))
    ],
    *[
        Routed("seer_decode", n_q, n_k, {"block": 8, "budget": budget}, seer_gate)
        for n_q, n_k in ((37, 37), (7, 37), (64, 64))
        for budget in (8, 23, 90)
    ],
    *[Routed("dynamic_mask", n_q, 33, {"keys_kept": kept}, key_bias) for n_q in (33, 9) for kept in (1, 5, 50)],
    Routed("dynamic_mask", 57, 57, {"keys_kept": 5}, key_bias),
    *[
        Routed(
            "minference_vertical_slash", n_q, 150, {"columns": columns, "slashes": slashes, "block": 16, "probe": 20}
        )
        for n_q, columns, slashes in ((150, 35, 105), (43, 41, 103), (150, 7, 60), (150, 1000, 6096))
    ],
    *[
        Routed("minference_vertical_slash", n_q, 37, {"columns": 2, "slashes": 3, "block": 8, "probe": probe})
        for n_q, probe in ((37, 1), (9, 9))
    ],
    *[Routed("minference_blocks", n_q, 53, {"block": 8, "topk": topk}) for n_q in (53, 20) for topk in (1, 2, 100)],
    Routed("minference_blocks", 32, 32, {"block": 8, "topk": 2}),
    *[
        Routed("anchor", n, n, {"block": 4, "group": 3, "theta": theta})
        for n, theta in ((53, 1), (53, 0.25), (48, 0), (9, 1), (53, -0.5))
    ],
    *[vsa(density, 4, 5, 6) for density in (0, 0.1, 0.5, 1)],
    vsa(0.25, 3, 3, 7),
    vsa(0.25, 2, 5, 3),
    Routed("sparse_d", 18, 18, {"block": 4}, maps_of(4)),
    Routed("sparse_d", 20, 20, {"block": 4}, maps_of(4)),
    Routed("sparse_d", 45, 45, {"block": 8}, maps_of(8)),
    *[
        Routed("token_sparse", n, n, {"window": 5, "pool": pool, "tau": tau})
        for n, pool, tau in ((29, 3, 0.1), (29, 1, 0.3), (29, 7, 0.005), (29, 3, 2), (5, 3, 0.1), (6, 9, 0.1))
    ],
    *[Routed("recycled", n_q, 40, inputs=cache) for n_q in (40, 1, 6)],
]


def visible_in_other_branches(name: str, case: Routed, operands: Tensors) -> Tensor:
    """Return the mask of the branches other than the selecting one."""
    query, key = positions(operands["q"], operands["k"])
    if name in ("vsa", "rectified"):  # every tile or block sees every other through their means
        return torch.ones(len(query), len(key), dtype=torch.bool)
    block, window = int(case.params["block"]), int(case.params["window"])
    return ((key // block + 1) * block <= query + 1) | ((key <= query) & (query - key < window))


OF_BRANCHES = ("native_sparse", "vsa", "rectified")
BY_INPUTS = ("sparse_d", "recycled", "flux", "temp_cache", "mminference_boundary")
"""Patterns whose selection the caller passes as an input."""


def case_of(routed: Routed, fixed: frozenset[str] = frozenset()) -> Case:
    """Return a case that compares mask and output for random vectors."""

    def seen(operands: Tensors) -> Tensor:
        q, k, v = (operands[name] for name in "qkv")
        mask, _ = routed.reference(q, k, v, inputs_of(operands))
        if routed.name in OF_BRANCHES:
            mask = mask | visible_in_other_branches(routed.name, routed, operands)
        return mask

    def output(operands: Tensors) -> Parts:
        q, k, v = (operands[name] for name in "qkv")
        return (routed.reference(q, k, v, inputs_of(operands))[1],)

    def drawn(shape: Shape) -> Tensors:
        (q, k, v), inputs = routed.drawn()
        return {"q": q, "k": k, "v": v, **inputs}

    shape = Shape(routed.n_q, routed.n_k, HEADS, KV_HEADS, 2, DK, DV)
    content = routed.name not in BY_INPUTS
    return Case(routed.name, shape, routed.params, drawn, seen, output, content=content, fixed=fixed)


# --- a softmax with a state -------------------------------------------------------------------------------------------


def hybrid(n_q: int, n_k: int, larger: float = 1.0, **params: Any) -> Case:
    """Return a case of Hybrid Forcing; vectors `larger` times as long make its constant 1e-6 negligible."""
    settings = {"frame": 4, "sinks": 1, "local": 7, "ratio": 0.5, "block": 4, **params}
    scale = 0.5 / larger**2

    def drawn(shape: Shape) -> Tensors:
        q, k, v = real(2, 2, n_q, 4), real(2, 2, n_k, 4), real(2, 2, n_k, 4)
        q, k = torch.cat([q[..., :-1], q[..., -1:].abs()], -1) * larger, k * larger
        return {"q": q, "k": k, "v": v, "rq": real(2, 2, n_q, 4), "rk": real(2, 2, n_k, 4), "mix": real(2, 4)}

    def mask(operands: Tensors) -> Tensor:
        """Return the mask of the selected kept keys and of all evicted keys."""
        seen, _ = routing.hybrid_forcing(**operands, **settings)
        query, _ = positions(operands["q"], operands["k"])
        chunk = query[:, 0] // (3 * settings["frame"])
        sizes = {name: settings[name] for name in ("frame", "sinks", "local")}
        evicted = [hybrid_forcing_frames(n_k, 3 * (c + 1), **sizes)[1] for c in chunk.tolist()]
        return seen | torch.stack(evicted)

    def output(operands: Tensors) -> Parts:
        return (routing.hybrid_forcing(**operands, scale=scale, **settings)[1],)

    def call(attend: Attention, operands: Tensors) -> Parts:
        return (attend(**operands, scale=scale),)

    shape = Shape(n_q, n_k, 2, 2, 2, 4, 4)
    return Case("hybrid_forcing", shape, settings, drawn, mask, output, call, content=True, tolerance=1e-7)


HYBRID = [
    # before anything is evicted
    *[hybrid(12, n_k, block=block, local=10) for n_k, block in ((12, 4), (12, 3), (12, 5), (24, 6), (36, 4))],
    # the last chunk with all blocks: 0 and 6 to 11 of 12 frames are visible, 1 to 5 evicted; 1e-6 negligible, and not
    hybrid(12, 48, 100.0, ratio=1),
    hybrid(12, 48, ratio=1),
    # several chunks, of which none sees a later one
    hybrid(24, 24, ratio=1),
    # half of the 7 blocks of the sink and the recent frames, whichever frames are evicted
    hybrid(12, 48, 100.0),
    # half of 2 blocks, with 8 and 4 tokens, is 1 block
    hybrid(12, 12, block=8),
]
CASES = [*map(case_of, ROUTED), *HYBRID]
