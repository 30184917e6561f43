"""Plans of a million tokens: visible pairs counted against the closure, within a time limit."""

from __future__ import annotations

import random
import time
import warnings

import torch

from attnc import AttncError, compile_attention
from attnc.compiler.lowering.float_tables import _table
from hunting.calls import Mismatch
from hunting.relations import condition
from hunting.scene import Draft, Scene, Term

TOKENS = 1_000_000
HEADS = 2
SECONDS = 2.0
"""CPU time that a plan may take, in seconds."""
SMALL = 700
CHUNK = 1 << 15


def check_plan(seed: int) -> list[str]:
    """Check a relation of positions and heads: a band at a million tokens, or any at a few hundred. Raise Mismatch."""
    rng = random.Random(f"plans {seed}")
    draft = Draft(rng, align="end", indexed=False)
    kept = condition(draft, 2)
    reach = rng.choice([3, 6, 11]) if rng.random() < 0.7 else None
    text = kept.text if reach is None else f"abs(q - k) < {reach} and {kept.text}"
    source = f"pattern drawn\n    align end\n    visible {text}\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = None if reach is not None else _all(kept)
            n = SMALL if reach is None else TOKENS
            counted, took = _planned(source, n)
            for again in range(2):  # a busy machine takes longer, so the shortest time counts
                other = source.replace("drawn", f"drawn_{again}")  # planned from scratch
                took = min(took, _planned(other, n)[1]) if took > SECONDS else took
        except AttncError as error:
            return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    if reach is not None:
        wanted = _in_band(kept, reach)
    if counted is not None and counted != wanted:
        raise Mismatch(f"{source}\n  {n} tokens, {HEADS} heads: the plan has {counted} visible pairs, not {wanted}")
    if took > SECONDS:
        raise Mismatch(f"{source}\n  the plan of {n} tokens took {took:.1f} s of CPU time, more than {SECONDS}")
    return ["agreed" if counted is not None else "not counted"]


def _planned(source: str, n: int) -> tuple[int | None, float]:
    """Return the visible pairs that a new plan counts, and the CPU time that it took."""
    _table.cache_clear()
    attend = compile_attention(source)
    started = time.process_time()
    visible = attend.plan(n, heads=HEADS).visible
    return visible, time.process_time() - started


def _scene(q_at: torch.Tensor, k_at: torch.Tensor) -> Scene:
    vectors = torch.zeros(1, HEADS, 1, 1)
    return Scene(q_at, k_at, torch.arange(HEADS).view(1, -1, 1, 1), vectors, vectors, vectors, {}, HEADS)


def _all(kept: Term) -> int:
    positions = torch.arange(SMALL)
    return _count(
        kept, positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1), torch.ones(1, 1, SMALL, SMALL, dtype=torch.bool)
    )


def _in_band(kept: Term, reach: int) -> int:
    total = 0
    for start in range(0, TOKENS, CHUNK):
        q_at = torch.arange(start, min(start + CHUNK, TOKENS)).view(1, 1, -1, 1)
        k_at = q_at + torch.arange(1 - reach, reach)
        total += _count(kept, q_at, k_at, (k_at >= 0) & (k_at < TOKENS))
    return total


def _count(kept: Term, q_at: torch.Tensor, k_at: torch.Tensor, exist: torch.Tensor) -> int:
    visible = kept.value(_scene(q_at, k_at)) & exist
    return int(visible.expand(1, HEADS, *visible.shape[2:]).sum())
