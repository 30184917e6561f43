"""Cases of the library's sequence masks in `masks/`, and the reference masks they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases.case import Case, Parts, Shape, Tensors, described, with_lse
from reference import masks
from reference.attention import products, scale_of, weighted
from reference.masks import Mask

Inputs = Mapping[str, Any]


MOST = 300
"""Maximum number of tokens for which outputs are compared as well as masks."""


@dataclass(frozen=True)
class Masked:
    """A pattern with parameters, the numbers of keys to test, and its mask by (keys, batch entry, head).

    `queries`: the number of queries for a number of keys; equal, except for a tree, whose nodes are the queries.
    `aligned`: whether the last query is at the last key, so that a call of fewer queries has the last rows of the mask.
    """

    name: str
    lengths: tuple[int, ...]
    mask: Callable[[int, int, int], Mask]
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], Inputs] = lambda n: {}
    heads: int = 1
    kv_heads: int | None = None
    batch: int | None = None
    """None if no input has a batch dimension."""
    queries: Callable[[int], int] = lambda n: n
    aligned: bool = False

    def __repr__(self) -> str:
        return described(self.name, self.params)

    def masks(self, n: int) -> Mask:
        """Return the masks, (batch, heads, queries, keys)."""
        return np.stack(
            [np.stack([self.mask(n, b, h) for h in range(self.heads)]) for b in range(self.batch or 1)],
        )

    def cases(self, *, outputs: bool = True) -> Iterator[Case]:
        """Yield a case for each length, and a case of fewer queries if the pattern aligns them to the end."""
        for n in self.lengths:
            yield self._case(self.queries(n), n, outputs=outputs)
        if self.aligned:
            n = self.lengths[-1]
            yield self._case(n // 3, n, outputs=outputs)

    def _case(self, n_q: int, n_k: int, *, outputs: bool) -> Case:
        masks: list[Tensor] = []

        def mask(operands: Tensors) -> Tensor:
            if not masks:
                masks.append(torch.from_numpy(self.masks(n_k)[:, :, -n_q:]))
            return masks[0]

        def output(operands: Tensors) -> Parts:
            q, k, v = (operands[name] for name in "qkv")
            return weighted(scale_of(q) * products(q, k), mask(operands), v)

        shape = Shape(n_q, n_k, self.heads, self.kv_heads or self.heads, self.batch or 2)
        inputs, small = self.inputs(n_k), outputs and n_k <= MOST
        return Case(self.name, shape, self.params, lambda s: inputs, mask, output if small else None, call=with_lse)


def simple(
    name: str, lengths: tuple[int, ...], mask: Callable[..., Mask], *settings: Mapping[str, Any], aligned: bool = False
) -> list[Masked]:
    """Return cases of a pattern whose reference mask takes the length and the parameters by their names."""

    def case(setting: Mapping[str, Any]) -> Masked:
        return Masked(name, lengths, lambda n, b, h: mask(n, **setting), setting, aligned=aligned)

    return [case(setting) for setting in settings]


LINES = (1, 31, 129)

# --- basic masks ------------------------------------------------------------------------------------------------------

PREFIXES = (0, 1, 15, 31)
DOCUMENTS = ((3, 3, 3, 0, 7, 7), (1, 1, 2, 2, 2, 2))


def ids(n: int) -> list[list[int]]:
    """Return document ids in runs; the last document takes the remaining tokens."""
    return [[*documents[:n], *[documents[-1]] * (n - len(documents))] for documents in DOCUMENTS]


PLAIN = [
    Masked("full", LINES, lambda n, b, h: masks.full(n)),
    Masked("causal", LINES, lambda n, b, h: masks.causal(n), aligned=True),
    *simple("sliding_window", LINES, masks.sliding_window, {"window": 9}, {"window": 1}, aligned=True),
    *simple("sliding_window", LINES, masks.sliding_window, {"window": 5, "sinks": 3}, aligned=True),
    Masked("sliding_window", LINES, lambda n, b, h: masks.sliding_window(n, 2000, 4), {"preset": "streaming"}),
    *simple("blocked", LINES, masks.blocked, {"block": 12}, aligned=True),
    Masked(
        "prefix_lm",
        LINES,
        lambda n, b, h: masks.prefix_lm(n, min(PREFIXES[b], n)),
        inputs=lambda n: {"prefix": torch.tensor(PREFIXES).clamp(max=n)},
        batch=len(PREFIXES),
        aligned=True,
    ),
    Masked(
        "document",
        (1, 11, 67),
        lambda n, b, h: masks.document(n, ids(n)[b]),
        inputs=lambda n: {"doc": torch.tensor(ids(n))},
        batch=len(DOCUMENTS),
        aligned=True,
    ),
]

# --- causal sequences -------------------------------------------------------------------------------------------------


def sparse_transformer(stride: int) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.sparse_transformer(n, stride, head)

    return Masked("sparse_transformer", LINES, mask, {"stride": stride}, heads=3)


def sparse_fixed(segment: int, block: int, blocks: int, groups: int) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.sparse_fixed(n, segment, block, blocks, head, groups)

    return Masked(
        "sparse_fixed", LINES, mask, {"segment": segment, "summary": block * blocks, "groups": groups}, heads=3
    )


def s2_attention(kv_heads: int, block: int, local: int, stride: int, offset: int = 0, dense: int = 0) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.s2_attention(n, block, local, stride, head * kv_heads // 4, kv_heads, offset, dense)

    params = {"block": block, "local_blocks": local, "vertical_stride": stride, "offset": offset, "dense_heads": dense}
    return Masked("s2_attention", LINES, mask, params, heads=4, kv_heads=kv_heads)


def moa(alpha: list[int], beta: list[str]) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.moa(n, alpha[head], Fraction(beta[head]), 8)

    return Masked(
        "moa", LINES, mask, {"alpha": alpha, "beta": [Fraction(x) for x in beta], "block": 8}, heads=len(alpha)
    )


def streaming(sinks: int, window: int, last: int = 0, **params: Any) -> Masked:
    params = params or {"sinks": sinks, "window": window, "last": last}
    return Masked("streaming", LINES, lambda n, b, h: masks.streaming(n, n, sinks, window, last), params)


def long_lora(groups: int, heads: int) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.long_lora(n, groups, head, heads)

    return Masked("long_lora", tuple(groups * size for size in (1, 7, 12, 31)), mask, {"groups": groups}, heads=heads)


def sink_lora(groups: int, heads: int, sinks: int) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.sink_lora(n, groups, head, heads, sinks)

    lengths = tuple(groups * size for size in (1, 7, 12, 31))
    return Masked("sink_lora", lengths, mask, {"groups": groups, "sinks": sinks}, heads=heads)


CAUSAL = [
    *simple(
        "dilated_window",
        LINES,
        masks.dilated_window,
        {"window": 5, "dilation": 3},
        {"window": 1, "dilation": 7},
        {"window": 40, "dilation": 1},
        {"window": 3, "dilation": 64},
        aligned=True,
    ),
    *simple(
        "strided",
        LINES,
        masks.strided,
        {"stride": 8, "local": 8},
        {"stride": 1, "local": 1},
        {"stride": 33, "local": 2},
        {"stride": 5, "local": 64},
        aligned=True,
    ),
    *simple(
        "power",
        LINES,
        masks.power,
        {"window": 2, "block": 3},
        {"window": 1, "block": 8, "sink": 0},
        {"window": 5, "block": 1, "sink": 4},
        {"window": 1, "block": 200},
        aligned=True,
    ),
    *simple(
        "log_sparse",
        (*LINES, 200),
        masks.log_sparse,
        {"segment": 16, "window": 0},
        {"segment": 16, "window": 64},
        {"segment": 7, "window": 29},
        {"segment": 2, "window": 3},
        {"segment": 65, "window": 500},
        aligned=True,
    ),
    *map(sparse_transformer, (1, 8, 30)),
    sparse_fixed(16, 4, 1, 1),
    sparse_fixed(16, 4, 1, 3),
    sparse_fixed(24, 2, 3, 2),
    sparse_fixed(5, 5, 1, 1),
    sparse_fixed(7, 1, 1, 7),
    s2_attention(4, 4, 2, 4),
    s2_attention(2, 3, 1, 5, offset=1),
    s2_attention(4, 5, 3, 3, dense=1),
    s2_attention(4, 3, 1, 8, dense=2),
    s2_attention(2, 1, 1, 2, dense=2),
    Masked(
        "s2_attention",
        LINES,
        lambda n, b, h: masks.s2_attention(n, 4, 2, 3, 0, 2),
        {"block": 4, "local_blocks": 2, "vertical_stride": 3, "homogeneous": True},
        heads=2,
    ),
    moa([16, 0, -40], ["0", "1/2", "1"]),
    moa([1, 200, -7], ["1/4", "0", "1/8"]),
    streaming(4, 9),
    streaming(0, 1, 5),
    streaming(3, 8, 40),
    streaming(128, 3968, preset="a_shape"),
    streaming(128, 3968, 100, preset="tri_shape"),
    sink_lora(4, 4, 5),
    sink_lora(3, 2, 0),
    long_lora(4, 4),
    long_lora(1, 2),
    long_lora(3, 3),
    long_lora(5, 1),
]

# --- bidirectional sequences ------------------------------------------------------------------------------------------


def flags(n: int, batch: int) -> list[list[bool]]:
    """Draw a few global tokens for each batch entry; the last entry has none."""
    return [[b < batch - 1 and (7 * i + b) % 11 == 3 for i in range(n)] for b in range(batch)]


def tables(n: int, block: int, heads: int) -> list[list[list[int]]]:
    """Draw two random blocks per head and block, some -1, some visible anyway, and one row too many."""
    blocks = -(-n // block)
    drawn = [[(3 * i % (blocks + 1) - 1, i * i % blocks) for i in range(blocks + 1)] for _ in range(heads)]
    return [[[a if a < 0 else (a + h) % blocks, (b + h) % blocks] for a, b in row] for h, row in enumerate(drawn)]


PICTURES = [(0, 0, 0), (2, 9, 20), (0, 31, 31), (5, 11, 12), (3, 20, 400)]
TREES = [(6, [-1, 0, 0, 1, 1, 2, 5]), (0, [-1, -1, 1, 2, 0, 4, 4]), (9, [-1, 0, 1, 2, 3, 4, 5])]


def ancestors(parents: list[int]) -> torch.Tensor:
    return torch.from_numpy(masks.tree_verify(0, parents, len(parents)))


def longformer(window: int, dilation: list[int]) -> Masked:
    def mask(n: int, entry: int, head: int) -> Mask:
        return masks.longformer_mask(n, window, dilation[head], flags(n, 3)[entry])

    def inputs(n: int) -> Inputs:
        return {"is_global": torch.tensor(flags(n, 3))}

    return Masked("longformer", LINES, mask, {"window": window, "dilation": dilation}, inputs, len(dilation), batch=3)


def bigbird(block: int) -> Masked:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.bigbird(n, block, tables(n, block, 2)[head])

    def inputs(n: int) -> Inputs:
        return {"random": torch.tensor(tables(n, block, 2))}

    return Masked("bigbird", LINES, mask, {"block": block}, inputs, heads=2)


BOTH_WAYS = [
    longformer(4, [1, 3]),
    longformer(0, [1, 1]),
    longformer(50, [2, 5]),
    *map(bigbird, (1, 4, 13)),
    *simple("block_diffusion", (2, 30, 62, 130), masks.block_diffusion, {"block": 4}, {"block": 1}, {"block": 100}),
    Masked(
        "modality_mutual",
        LINES,
        lambda n, b, h: masks.modality_mutual(n, *PICTURES[b]),
        {},
        lambda n: {
            name: torch.tensor(column)
            for name, column in zip(("image_start", "text_start", "text_end"), zip(*PICTURES, strict=True), strict=True)
        },
        batch=len(PICTURES),
    ),
    Masked(
        "tree_verify",
        (16, 18, 25),
        lambda n, b, h: masks.tree_verify(*TREES[b], n),
        {},
        lambda n: {
            "prefix": torch.tensor([prefix for prefix, _ in TREES]),
            "ancestor": torch.stack([ancestors(parents) for _, parents in TREES]),
        },
        batch=len(TREES),
        queries=lambda n: len(TREES[0][1]),
    ),
]

MASKED = [*PLAIN, *CAUSAL, *BOTH_WAYS]
CASES = [case for masked in MASKED for case in masked.cases(outputs=masked.name != "longformer")]
"""The cases of sequence masks; the outputs of longformer, which has extra projections, are in `cases.structures`."""
