"""The goals for a GPU on rows as a GPU would give them: each value by hand, and both verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import causes
import goals
import goals_gpu
import pytest
from baselines import published
from benchmark_part import Row

MILLION = 1 << 20


def row(ms: Mapping[str, float], **more: Any) -> Row:
    """A right row with medians."""
    label = " ".join(str(more.get(name, "")) for name in ("case", "system", "n", "direction"))
    return {"key": label, "ok": True, "ms": {name: {"median": x} for name, x in ms.items()}, **more}


def masked(case: str, n: int, ms: Mapping[str, float], **more: Any) -> Row:
    shown = [one.row() for one in published.figures(case, "forward", n)]
    return row(ms, case=case, n=n, machine="h100", published=shown, **more)


def listed(ms: Mapping[str, float], **more: Any) -> Row:
    return row(
        ms, **{"affine": False, "profiled": True, "list_bytes": 0, "other_kernels": 0, "live_tiles": 1.0, **more}
    )


def recurrent(ms: Mapping[str, float], shape: tuple[int, int, int, int], **more: Any) -> Row:
    return row(ms, **{"system": "gla", "shape": shape, "n": shape[1], "apart": False, **more})


FLUX, HUNYUAN = "FLUX 80×80", "Hunyuan 18×24×24"
ROUTED = {"case": "top-16", "direction": "forward", "machine": "h100", "published": []}
STEP = {"case": "decode", "cache_bytes": 1 << 30, "batch": 1}
TRIALS = [
    {"knob": "forward", "option": "model", "predicted": 1.0, "median": 1.0},
    {"knob": "forward", "option": "a", "predicted": 2.0, "median": 3.0},
    {"knob": "dq", "option": "model", "predicted": 1.0, "median": 2.0},
    {"knob": "dq", "option": "b", "predicted": 2.0, "median": 1.0},
]

CASES: Sequence[tuple[str, str, list[Row], float, str]] = (
    # goal, part, rows, value, verdict
    ("G1a.flex", "gpu-dense-64", [row({"attnc": 1, "flex": 4}), row({"attnc": 1, "flex": 1})], 2, "ahead"),
    (
        "G1a.dense",
        "gpu-dense-64",
        [row({"attnc": 2, "sdpa_cudnn": 1.2, "flash_attention": 1.0, "sdpa_flash": 0.1})],
        0.5,
        "behind",
    ),
    ("G1b.flex", "gpu-blocks-other", [row({"attnc": 1, "flex": 1.2})], 1.2, "behind"),
    (
        "G1b.bound",
        "gpu-blocks-other",
        [row({"attnc": 1}, of_bound=0.96), row({"attnc": 1}, of_bound=0.98)],
        97,
        "ahead",
    ),
    ("G1b.natten", "gpu-blocks-video", [masked(f"{FLUX} stride 16", 65536, {"attnc": 7.914})], 1, "ahead"),
    ("G1b.natten", "gpu-blocks-video", [masked(f"{FLUX} stride 16", 65536, {"attnc": 2, "natten": 1})], 0.5, "behind"),
    ("G1b.natten.permuted", "gpu-blocks-video", [masked(f"{FLUX} stride 16", 65536, {"attnc": 21.202})], 0.5, "behind"),
    ("G1c.flex", "gpu-windows-text", [row({"attnc": 1, "flex": 2})], 2, "ahead"),
    ("G1c.bound.full", "gpu-windows-text", [row({"attnc": 1}, of_bound=0.9, full_tiles=0.5)], 90, "behind"),
    ("G1c.bound.partial", "gpu-windows-text", [row({"attnc": 1}, of_bound=0.9, full_tiles=0.4)], 90, "ahead"),
    ("G1c.natten.1D", "gpu-windows-video", [masked("1D window 2048", 32768, {"attnc": 0.0948})], 1, "behind"),
    ("G1c.natten.FLUX", "gpu-windows-video", [masked(FLUX, 65536, {"attnc": 8.1005})], 2, "ahead"),
    ("G1c.natten.Hunyuan", "gpu-windows-video", [masked(HUNYUAN, 115200, {"attnc": 79.043})], 1, "behind"),
    ("G2.flex", "gpu-backward-text", [row({"attnc": 1, "flex": 1.5})], 1.5, "ahead"),
    ("G2.dense", "gpu-backward-dense", [row({"attnc": 1, "flash_attention": 0.8})], 0.8, "ahead"),
    ("G2.ratio", "gpu-backward-text", [row({"attnc": 3, "attnc_forward": 1})], 3, "behind"),
    ("G2.deterministic", "gpu-deterministic", [row({"attnc": 1, "attnc_deterministic": 1.05})], 5, "ahead"),
    ("G2.bound", "gpu-backward-text", [row({"attnc": 1}, of_bound=0.85)], 85, "behind"),
    ("G3.copy", "gpu-decode", [row({"attnc": 1}, of_copy_speed=0.9, **STEP)], 90, "ahead"),
    ("G3.copy", "gpu-decode", [row({"attnc": 1}, of_copy_speed=0.8, **STEP)], 80, "behind"),
    ("G3.dense", "gpu-decode", [row({"attnc": 1, "flashinfer": 2, "flash_attention": 1.1}, **STEP)], 1.1, "ahead"),
    ("G3.flex", "gpu-decode", [row({"attnc": 1, "flex": 1.2}, **STEP)], 1.2, "behind"),
    (
        "G3.sparse",
        "gpu-decode",
        [row({"attnc": 1, "attnc_window": 0.3}, live={"attnc": 1.0, "attnc_window": 0.25}, **STEP)],
        5,
        "ahead",
    ),
    ("G3.graph", "gpu-decode", [row({"attnc": 0.011}, n=1024, captured=["attnc"], **STEP)], 11, "ahead"),
    ("G4.fla", "gpu-recurrence-gates", [recurrent({"attnc": 1, "fla": 1.4}, (1, 8192, 96, 128))], 1.4, "behind"),
    ("G4.fla.few", "gpu-recurrence-gates", [recurrent({"attnc": 1, "fla": 3}, (2, 16384, 16, 128))], 3, "ahead"),
    ("G4.memory", "gpu-recurrence-gates", [recurrent({"attnc": 1}, (1, 8192, 96, 128), of_hbm=0.6)], 60, "ahead"),
    (
        "G4.tokens",
        "gpu-recurrence-lengths",
        [
            recurrent({"attnc": 1}, (1, 8192, 16, 128), tokens_per_second=100),
            recurrent({"attnc": 1}, (1, 16384, 16, 128), tokens_per_second=80),
        ],
        20,
        "behind",
    ),
    (
        "G4.lightning",
        "gpu-recurrence-authors",
        [recurrent({"attnc": 1, "lightning": 5}, (4, 8192, 32, 128), system="lightning")],
        5,
        "ahead",
    ),
    (
        "G4.ssd",
        "gpu-recurrence-authors",
        [recurrent({"attnc": 1, "mamba": 1.2}, (8, 4096, 64, 64), system="mamba2_ssd")],
        1.2,
        "behind",
    ),
    ("G4b.fla", "gpu-training-gates", [recurrent({"attnc": 1, "fla": 2}, (1, 8192, 96, 128))], 2, "ahead"),
    (
        "G4b.least",
        "gpu-training-gates",
        [
            recurrent({"attnc": 1, "fla": 0.9}, (1, 8192, 96, 128)),
            recurrent({"attnc": 1, "fla": 0.1}, (8, 2048, 32, 256), apart=True),
        ],
        0.9,
        "behind",
    ),
    ("G5.nsa", "gpu-routing-16", [masked("top-16", 32768, {"attnc": 6.2}, direction="forward")], 2, "ahead"),
    (
        "G5.nsa.backward.128K",
        "gpu-routing-backward",
        [row({"attnc": 1, "nsa_triton": 1.9}, **{**ROUTED, "direction": "backward"}, n=131072)],
        1.9,
        "behind",
    ),
    ("G5.dense", "gpu-routing-16", [row({"attnc": 1, "sdpa_flash": 26}, n=131072, **ROUTED)], 26, "ahead"),
    (
        "G5.break_even",
        "gpu-routing-16",
        [row({"attnc": 2, "sdpa_flash": 1}, n=8192, **ROUTED), row({"attnc": 1, "sdpa_flash": 2}, n=32768, **ROUTED)],
        16384,
        "behind",
    ),
    ("G5.choice", "gpu-routing-16", [row({"attnc": 1}, choice_share=0.2, n=8192, **ROUTED)], 20, "ahead"),
    ("G6.bytes", "gpu-plan-lines", [listed({"attnc": 1}, affine=True, n=8192, list_bytes=8)], 8, "behind"),
    ("G6.kernels", "gpu-plan-lines", [listed({"attnc": 1}, affine=True, n=8192)], 0, "ahead"),
    ("G6.share", "gpu-plan-lines", [listed({"attnc": 1, "attnc_forward": 100}, n=32768)], 1, "ahead"),
    ("G6.share.8K", "gpu-plan-lines", [listed({"attnc": 1, "attnc_forward": 10}, n=8192)], 10, "behind"),
    (
        "G6.memory",
        "gpu-plan-lines",
        [
            listed({"attnc": 1}, case="power", n=8192, list_bytes=100, live_tiles=10.0),
            listed({"attnc": 1}, case="power", n=MILLION, list_bytes=4000, live_tiles=200.0),
        ],
        2,
        "behind",
    ),
    ("G6.flex", "gpu-plan-lines", [listed({"attnc": 1, "flex_mask": 30}, n=32768)], 30, "ahead"),
    ("G6.flex.eager", "gpu-plan-lines", [listed({"attnc": 1, "flex_mask_eager": 30}, n=32768)], 30, "behind"),
    ("G6.million", "gpu-plan-lines", [listed({"attnc": 51}, n=MILLION)], 51, "behind"),
    ("G6.million.memory", "gpu-plan-lines", [listed({"attnc": 1}, n=MILLION, list_bytes=1 << 20)], 1 << 20, "ahead"),
    (
        "G6.waits",
        "gpu-steps",
        [{"key": "a", "watched": True, "waits": ""}, {"key": "b", "watched": True, "waits": "it does"}],
        50,
        "behind",
    ),
    ("G7.cold", "gpu-compile", [row({"attnc_cold": 2500}, direction="forward")], 2.5, "ahead"),
    ("G7.cold.training", "gpu-compile", [row({"attnc_cold": 7000}, direction="forward+backward")], 7, "behind"),
    ("G7.cold.flex", "gpu-compile", [row({"attnc_cold": 1, "flex_cold": 4}, direction="forward")], 0.25, "ahead"),
    ("G7.warm", "gpu-compile", [row({"attnc_warm": 400}, direction="forward")], 0.4, "behind"),
    ("G7.warm.flex", "gpu-compile", [row({"attnc_warm": 1, "flex_warm": 5}, direction="forward")], 0.2, "ahead"),
    ("G7.recompiled", "gpu-compile-shapes", [{"key": "new shapes", "recompiled": {"attnc": 1}}], 1, "behind"),
    ("G7.tried", "gpu-tune", [{"key": "causal", "trials": TRIALS}], 2, "ahead"),
    ("G7.tuned", "gpu-tune", [{"key": "causal", "trials": TRIALS}], 50, "behind"),
    ("G8.points", "gpu-simulator-forward", [row({"attnc": 1}, predicted={"attnc": 1})] * 3, 3, "behind"),
    ("G8.error", "gpu-simulator-forward", [row({"attnc": 1}, predicted={"attnc": 1.04})], 4, "ahead"),
    ("G8.error.95", "gpu-simulator-forward", [row({"attnc": 1}, predicted={"attnc": 0.8})], 20, "behind"),
    ("G8.bound", "gpu-simulator-forward", [row({"attnc": 1}, over_ideal=4.0, bound=4.0)], 0, "ahead"),
    ("G8.tau", "gpu-tune", [{"key": "causal", "trials": TRIALS}], 0, "behind"),
    ("G8.chosen", "gpu-tune", [{"key": "causal", "trials": TRIALS[:2]}], 100, "ahead"),
    (
        "G8.natten",
        "gpu-simulator-natten",
        [{"key": FLUX, "predicted_speedup": 6.6, "published_speedup": 5.5}],
        20,
        "behind",
    ),
)


@pytest.mark.parametrize(("key", "part", "rows", "value", "word"), CASES, ids=[case[0] for case in CASES])
def test_a_goal(key: str, part: str, rows: list[Row], value: float, word: str) -> None:
    (goal,) = [goal for goal in goals_gpu.GOALS if goal.key == key]
    assert part in goal.parts
    found = goals.verdict(goal, {part: rows}, causes.why)
    assert found.value == pytest.approx(value)
    assert found.word == word
    assert bool(found.behind) or word == "ahead"


def test_every_goal_is_tried_and_from_a_target() -> None:
    keys = {goal.key for goal in goals_gpu.GOALS}
    assert len(keys) == len(goals_gpu.GOALS)
    assert keys - {case[0] for case in CASES} <= {"G5.nsa.backward.32K"}
    assert {goal.source.split()[-1] for goal in goals_gpu.GOALS} == {
        *("G1a", "G1b", "G1c", "G2", "G3", "G4", "G4b", "G5", "G6", "G7", "G8")
    }


def test_what_was_published_for_another_machine_does_not_stand_in() -> None:
    (goal,) = [goal for goal in goals_gpu.GOALS if goal.key == "G1c.natten.FLUX"]
    on_h200 = masked(FLUX, 65536, {"attnc": 1}) | {"machine": "h200"}
    assert goals.verdict(goal, {"gpu-windows-video": [on_h200]}, causes.why).word == "not measured here"
