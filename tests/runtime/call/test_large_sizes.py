"""Many documents, large tables and many batch entries: memory and work grow no faster than these sizes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from attnc import compile_attention
from attnc.compiler.analysis.range_table import RangeTable
from attnc.compiler.ir import Data
from attnc.compiler.lowering.specialise import alone
from attnc.compiler.planning.schedule import visible_pairs
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.planning.plans import runs_in

MIB = 1 << 20


def test_many_documents_plan_in_32_mib() -> None:
    attend = compile_attention("document")
    doc = torch.arange(8192).repeat_interleave(1024)[None]
    attend.plan(64, doc=doc[:, :64])  # allocate what is cached once per process
    tracemalloc.start()
    plan = attend.plan(doc.shape[1], doc=doc)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 32 * MIB, f"{peak / MIB:.1f} MiB"
    assert plan.visible == 8192 * 1024 * 1025 // 2


def test_plans_do_not_hold_ids_of_documents() -> None:
    """Plans do not change either when the caller changes the ids."""
    attend = compile_attention("document")
    doc = torch.arange(10).repeat_interleave(100)[None]
    plan = attend.plan(1000, doc=doc)
    before = plan.visible
    mask = attend.mask(1000, doc=doc.clone())
    doc.zero_()
    assert (plan.visible, int(mask.sum())) == (before, before)
    assert attend.plan(1000, doc=doc).visible == 1000 * 1001 // 2


def test_documents_are_named_by_their_runs() -> None:
    ids = np.arange(100).repeat(50)
    assert runs_in(ids) == runs_in(ids + 7) == runs_in((ids * 3).astype(np.int32))
    assert runs_in(ids) != runs_in(np.arange(100).repeat(50)[::-1] // 2)
    assert runs_in(ids) != runs_in(ids % 99), "the last id comes back"
    both = np.stack([ids, ids + 1])
    assert runs_in(both) == runs_in(np.stack([ids, ids]))
    assert runs_in(both) != runs_in(both.reshape(1, -1))
    assert runs_in(both) != runs_in(np.stack([ids, np.roll(ids, 1)]))


def test_scattered_documents_are_refused_after_valid_ones() -> None:
    attend = compile_attention("document")
    ids = torch.arange(100).repeat_interleave(50)[None]
    attend.plan(5000, doc=ids)
    with pytest.raises(ArgumentError, match="id 0 reappears at position 4950"):
        attend.plan(5000, doc=ids % 99)


@pytest.mark.parametrize("name", ["causal", "sliding_window", "alibi"])
def test_plan_and_mask_take_lengths_of_sequences(name: str) -> None:
    params: dict[str, Any] = {"window": 20} if name == "sliding_window" else {}
    attend = compile_attention(name, **params)
    lengths = [70, 0, 30, 92]
    ends = torch.tensor([0, *np.cumsum(lengths)])
    expected = attend.mask(192, cu_seqlens=ends, heads=4)
    wanted = torch.zeros(192, 192, dtype=torch.bool)
    for start, n in zip(ends.tolist(), lengths, strict=False):
        wanted[start : start + n, start : start + n] = attend.mask(n, heads=4) if n else False
    assert torch.equal(expected, wanted)
    plan = attend.plan(192, cu_seqlens=ends, heads=4)
    assert plan.visible is None or plan.visible == 4 * int(wanted.sum())


def test_lengths_of_sequences_beside_documents_are_refused() -> None:
    attend = compile_attention("document")
    for ask in (attend.plan, attend.mask):
        with pytest.raises(ArgumentError, match="pass `doc` instead"):
            ask(8, doc=torch.zeros(1, 8, dtype=torch.long), cu_seqlens=torch.tensor([0, 8]))


TABLE = "pattern p\n    align end\n    input seen: bool[rows, columns]\n    visible seen[q // 64, k // 64] and k <= q\n"


def test_large_tables_are_not_copied_as_integers() -> None:
    """Eight bytes per entry made a process run out of memory at 46,341 rows and columns."""
    attend = compile_attention(TABLE)
    mask = torch.arange(2048)[:, None] % 3 == torch.arange(2048) % 3
    attend.plan(64, seen=mask[:1, :1])
    tracemalloc.start()
    plan = attend.plan(512, seen=mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 3 * mask.numel(), f"{peak / mask.numel():.1f} bytes an entry"
    assert plan.visible == int((mask[:8, :8].repeat_interleave(64, 0).repeat_interleave(64, 1)).tril().sum())


def test_a_tables_minimum_and_maximum_are_computed_once() -> None:
    """A search in each portion of tiles cost as much again for every portion."""
    searched: list[str] = []

    class Watched(np.ndarray):
        def min(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            searched.append("min")
            return np.asarray(self).min()

        def max(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            searched.append("max")
            return np.asarray(self).max()

    table = RangeTable(Data("seen", np.eye(300, dtype=np.bool_).view(Watched)))
    wide = (np.array([0, 5]), np.array([200, 7]))
    for _ in range(3):
        low, high = table.bounds([wide, wide])
        assert (low.tolist(), high.tolist()) == ([0, 0], [1, 1])
    assert sorted(searched) == ["max", "min"]


def radial(frame: str, place: str) -> str:
    """Return radial attention of single tokens; `frame` and `place` are templates of a token's frame and position."""
    t, s = frame.format, place.format
    return (
        "pattern p(frames: int, per_frame: int, decay: real = 1)\n"
        + ("    tokens  video(t: frames, s: per_frame)\n" if ".t" in frame else "    require frames > 0\n")
        + f"    let gap = abs({t('q')} - {t('k')})\n"
        "    let reach = 2 ** (bitlen(per_frame) - bitlen(gap))\n"
        f"    let near = gap <= 1 or abs({s('q')} - {s('k')}) <= max(reach * decay, 128)\n"
        "    let kept = reach >= 128 or gap % (128 // reach) == 0\n"
        f"    visible {t('k')} == 0 or near and kept\n"
    )


AXES = radial("{}.t", "{}.s")
DIVIDED = radial("({} // per_frame)", "({} % per_frame)")


@pytest.mark.parametrize(("frames", "per_frame"), [(18, 3840), (22, 3600)])
def test_pairs_are_counted_in_many_distinct_tiles(frames: int, per_frame: int) -> None:
    """3,600 is no multiple of a tile of 128, so most tiles at the borders of frames differ from each other."""
    sizes: dict[str, Any] = {"frames": frames, "per_frame": per_frame, "decay": 0.95}
    by_axes, by_division = (compile_attention(text, **sizes).plan(frames * per_frame) for text in (AXES, DIVIDED))
    assert by_division.visible == by_axes.visible
    assert by_division.visible is not None


@pytest.mark.parametrize("per_frame", [33, 48, 100])
def test_counted_pairs_agree_with_the_mask(per_frame: int) -> None:
    n = 7 * per_frame
    attend = compile_attention(DIVIDED, frames=7, per_frame=per_frame)
    relation = alone(attend._pattern.attend.visible, n)
    assert visible_pairs(relation, n, n, {}) == int(attend.mask(n).sum())
