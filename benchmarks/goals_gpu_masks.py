"""The goals for masks on a GPU, forward and backward (PERFORMANCE 8, G1a to G2).

If a rival did not run, its published figure stands in for it, provided that it is from the machine of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmark_part import Row
from goals import Goal
from measures import each, median, over, speedup

DENSE = ("gpu-dense-128", "gpu-dense-64", "gpu-dense-256")
BLOCKS = ("gpu-blocks-video", "gpu-blocks-other")
WINDOWS = ("gpu-windows-text", "gpu-windows-video")
BACKWARD_SPARSE = (
    "gpu-backward-text",
    "gpu-backward-video",
    "gpu-backward-blocks-video",
    "gpu-backward-blocks-other",
)
BACKWARD = (*BACKWARD_SPARSE, "gpu-backward-dense")


def best(*rivals: str) -> Callable[[Row], float | None]:
    """Return the speed over the fastest of the rivals that ran."""

    def value(row: Row) -> float | None:
        gains = [x for x in (speedup(row, rival) for rival in rivals) if x is not None]
        return min(gains, default=None)

    return value


def stood_in(measured: str, published: str, *, n: int | None = None) -> Callable[[Row], float | None]:
    """Return the speed over a rival that ran, else over its published figure for this row on this machine."""

    def value(row: Row) -> float | None:
        if n is not None and row["n"] != n:
            return None
        if (ran := speedup(row, measured)) is not None:
            return ran
        return _over_published(row, published)

    return value


def _over_published(row: Row, rival: str) -> float | None:
    for figure in row.get("published", ()):
        if figure["published"] == rival and figure["machine"].lower() == row.get("machine"):
            return float(figure["value"]) / float(row["ms"]["attnc"]["median"])
    return None


def percent(key: str) -> Callable[[Row], float | None]:
    """Return an entry of a row in percent, None if the row has none."""
    return lambda row: None if row.get(key) is None else 100 * float(row[key])


def _of_case(case: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["case"] == case)


def _mostly_full(row: Row) -> bool:
    return bool(row.get("full_tiles", 0) >= 0.5)


def _partial(row: Row) -> bool:
    return not _mostly_full(row)


# --- forward ---------------------------------------------------------------------------------------------------------

G1A, G1B, G1C, G2 = (f"PERFORMANCE 8, {name}" for name in ("G1a", "G1b", "G1c", "G2"))
_dense = partial(Goal, where="gpu", suite="dense", least=True, unit="×", source=G1A, parts=DENSE)
_blocks = partial(Goal, where="gpu", suite="block_sparse", least=True, unit="×", source=G1B, parts=BLOCKS)
_windows = partial(Goal, where="gpu", suite="windows", least=True, unit="×", source=G1C, parts=WINDOWS)

FORWARD = (
    _dense(
        key="G1a.flex",
        asks="times tuned FlexAttention's speed, full and causal",
        target=1.1,
        floor=1.0,
        read=over("flex"),
    ),
    _dense(
        key="G1a.dense",
        asks="times the speed of the best of cuDNN and FlashAttention",
        target=0.75,
        floor=None,
        read=each(best("sdpa_cudnn", "flash_attention")),
    ),
    _blocks(
        key="G1b.flex", asks="times tuned FlexAttention's speed, whole blocks", target=1.3, floor=1.1, read=over("flex")
    ),
    _blocks(
        key="G1b.bound",
        asks="share of the tile bound over attnc's dense kernel, which includes the 85 % asked with permutes",
        target=95,
        floor=90,
        read=each(percent("of_bound")),
        how="median",
        unit="%",
    ),
    _blocks(
        key="G1b.natten",
        asks="times the speed of NATTEN's kernel alone, FLUX and HunyuanVideo with strides, and lines",
        target=0.8,
        floor=None,
        read=each(stood_in("natten", "NATTEN kernel")),
        how="least",
    ),
    _blocks(
        key="G1b.natten.permuted",
        asks="times the speed of NATTEN with its permutes",
        target=1.0,
        floor=None,
        read=each(lambda row: _over_published(row, "NATTEN with permutes")),
        how="least",
    ),
    _windows(
        key="G1c.flex",
        asks="times tuned FlexAttention's speed, partial tiles",
        target=1.3,
        floor=None,
        read=over("flex"),
    ),
    _windows(
        key="G1c.bound.full",
        asks="share of the tile bound over attnc's dense kernel, half of the tiles or more full",
        target=92,
        floor=85,
        read=each(percent("of_bound"), _mostly_full),
        how="median",
        unit="%",
    ),
    _windows(
        key="G1c.bound.partial",
        asks="share of the tile bound over attnc's dense kernel, less than half of the tiles full",
        target=85,
        floor=85,
        read=each(percent("of_bound"), _partial),
        how="median",
        unit="%",
    ),
    *(
        _windows(
            key=f"G1c.natten.{name}",
            asks=f"times the speed of NATTEN's kernel alone, {case}",
            target=target,
            floor=None,
            read=each(stood_in("natten", "NATTEN kernel"), _of_case(case)),
            how="one value",
        )
        for name, case, target in (
            ("1D", "1D window 2048", 1.1),
            ("FLUX", "FLUX 80×80", 1.0),
            ("Hunyuan", "Hunyuan 18×24×24", 1.2),
        )
    ),
)

# --- backward --------------------------------------------------------------------------------------------------------


def _over_forward(row: Row) -> float | None:
    training, forward = median(row), median(row, "attnc_forward")
    return None if training is None or forward is None else training / forward


def _slower(row: Row) -> float | None:
    gain = speedup(row, "attnc_deterministic")
    return None if gain is None else 100 * (gain - 1)


_backward = partial(Goal, where="gpu", suite="backward", floor=None, least=True, unit="×", source=G2, parts=BACKWARD)
GRADIENTS = (
    _backward(key="G2.flex", asks="times tuned FlexAttention's gradients", target=1.3, floor=1.0, read=over("flex")),
    _backward(
        key="G2.dense",
        asks="times the speed of the best gradients of FlashAttention and cuDNN, dense",
        target=0.75,
        read=each(best("flash_attention", "sdpa_cudnn")),
        parts=("gpu-backward-dense",),
    ),
    _backward(
        key="G2.ratio", asks="times the forward's time", target=2.8, read=each(_over_forward), least=False, how="median"
    ),
    _backward(
        key="G2.deterministic",
        asks="slowdown under torch's deterministic algorithms",
        target=10,
        read=each(_slower),
        least=False,
        how="most",
        unit="%",
        parts=("gpu-deterministic",),
    ),
    _backward(
        key="G2.bound",
        asks="share of the tile bound over attnc's dense gradients",
        target=90,
        read=each(percent("of_bound")),
        how="median",
        unit="%",
        parts=BACKWARD_SPARSE,
    ),
)
