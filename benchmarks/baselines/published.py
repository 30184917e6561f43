"""Published figures of rivals that are not installed: not measured here, and marked so wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""The lengths in NSA-Triton's table."""


@dataclass(frozen=True)
class Published:
    """One published figure: the length is exact, the rest is in the source's words."""

    rival: str
    case: str
    """The `case` of the attnc row to which the figure belongs."""
    direction: str
    n: int
    value: float
    unit: str
    configuration: str
    machine: str
    source: str

    def row(self) -> dict[str, str | int | float]:
        """Return the figure for a result file."""
        return {
            "published": self.rival,
            "value": self.value,
            "unit": self.unit,
            "configuration": self.configuration,
            "machine": self.machine,
            "source": self.source,
        }


def figures(case: str, direction: str, n: int) -> list[Published]:
    """Return the published figures for a row."""
    return [figure for figure in PUBLISHED if (figure.case, figure.direction, figure.n) == (case, direction, n)]


NATTEN = "SHI-Labs/NATTEN, docs/sample-outputs, snapshot 2026-07-23"
_NATTEN_CASES = (
    # case of ours, tokens, configuration, cuDNN ms, kernel ms, kernel with permutes ms
    ("1D window 2048", 32768, "B1 H1 d128 w2048 s1", 0.7874, 0.0948, 0.0948),
    ("1D window 2048 stride 256", 32768, "B1 H1 d128 w2048 s256", 0.7874, 0.0627, 0.0627),
    ("1D window 2048 stride 2048", 32768, "B1 H1 d128 w2048 s2048", 0.7874, 0.0593, 0.0593),
    ("FLUX 80×80", 65536, "B1 H24 d128 256×256 w80×80 s1", 97.435, 16.201, 18.603),
    ("FLUX 80×80 stride 16", 65536, "B1 H24 d128 256×256 w80×80 s16×16", 97.435, 7.914, 10.601),
    ("Hunyuan 18×24×24", 115200, "B1 H24 d128 30×48×80 w18×24×24 s1", 283.327, 79.043, 84.417),
    ("Hunyuan 18×24×24 stride 16×8×8", 115200, "B1 H24 d128 30×48×80 w18×24×24 s16×8×8", 283.327, 23.359, 29.109),
)

SPEEDUPS = {
    "Hunyuan 18×24×24": 3.3,
    "Hunyuan 18×24×24 stride 16×8×8": 11.1,
    "Cosmos 16×32×48": 4.1,
    "Cosmos 16×32×48 stride 1×8×16": 9.2,
    "FLUX 80×80": 5.5,
    "FLUX 80×80 stride 16": 10.2,
}
"""Speedups of NATTEN's kernels over CUTLASS FMHA on an H100, read from docs/assets/hopper-fna-perf.png (± 1–2 %)."""


def _natten() -> Iterator[Published]:
    for case, n, configuration, cudnn, kernel, total in _NATTEN_CASES:
        for rival, value in (("cuDNN", cudnn), ("NATTEN kernel", kernel), ("NATTEN with permutes", total)):
            yield Published(rival, case, "forward", n, value, "ms", configuration, "H100", NATTEN)


NSA = "XunhaoLai/native-sparse-attention-triton, README, 2025-05"
_NSA_CASES = (
    ("FlashAttention 2", "dense", (0.260, 0.847, 3.04, 11.74, 45.97, 187.2, 810.9), "forward"),
    ("FlashAttention 2", "dense", (0.799, 2.55, 9.03, 34.1, 135.7, 541.0, 2140.0), "backward"),
    ("NSA-Triton", "top-8", (0.585, 1.09, 2.13, 4.19, 7.61, 14.8, 29.5), "forward"),
    ("NSA-Triton", "top-8", (1.12, 1.67, 2.77, 5.20, 9.97, 21.1, 54.9), "backward"),
    ("NSA-Triton", "top-16", (0.918, 1.75, 3.40, 6.70, 12.4, 24.5, 49.0), "forward"),
    ("NSA-Triton", "top-16", (1.38, 2.21, 3.95, 7.54, 15.2, 33.8, 93.8), "backward"),
)


def _nsa() -> Iterator[Published]:
    for rival, case, times, direction in _NSA_CASES:
        for n, ms in zip(LENGTHS, times, strict=True):
            words = "B1 Hq64 Hkv4 d128 block 64 bf16 causal, blocks given"
            yield Published(rival, case, direction, n, ms, "ms", words, "H100", NSA)


LIGHTNING = "OpenNLPLab/lightning-attention, README, 2025-02"
_LIGHTNING = {
    "forward": ((1024, 0.586), (4096, 2.24), (8192, 4.41), (16384, 8.83), (32768, 17.66)),
    "backward": ((1024, 2.33), (4096, 9.31), (8192, 18.62), (16384, 37.2), (32768, 74.6)),
}


def _lightning() -> Iterator[Published]:
    for direction, rows in _LIGHTNING.items():
        for n, ms in rows:
            words, machine = "B4 H32 d128 bf16 causal", "not stated; by its FlashAttention 2 figures an A100"
            yield Published("Lightning Attention-2", "lightning", direction, n, ms, "ms", words, machine, LIGHTNING)


HELION = "pytorch/helion commit fea89d20, fla's times in its table"
_FLA_H100 = (
    # batch, tokens, heads, width, retention forward and forward with backward, ms
    ((1, 8192, 96, 128), 0.961, 3.426),
    ((2, 16384, 16, 128), 0.868, 2.776),
    ((4, 2048, 16, 128), 0.358, 1.225),
    ((4, 4096, 64, 128), 1.147, 4.52),
    ((8, 2048, 32, 256), 1.598, 9.08),
)


def _fla() -> Iterator[Published]:
    for (b, t, h, d), forward, training in _FLA_H100:
        for direction, ms in (("forward", forward), ("forward+backward", training)):
            words, case = f"B{b} T{t} H{h} D{d} bf16", f"retention {b}×{t}×{h}×{d}"
            yield Published("flash-linear-attention", case, direction, t, ms, "ms", words, "H100", HELION)


DECODE = "tile-ai/TileOPs"


def _decode() -> Iterator[Published]:
    for rival, microseconds in (("FlashAttention 3", 16.2), ("FlashInfer", 9.5)):
        words = "B1 H32/4 d128 fp16, one token against 1,024 keys"
        yield Published(rival, "decode 1", "forward", 1024, microseconds / 1e3, "ms", words, "H200, 1500 MHz", DECODE)


MASKS = "Tencent-Hunyuan/flex-block-attn, benchmark CSVs: create_block_mask, not compiled"


def _masks() -> Iterator[Published]:
    lengths = (11520, 19200, 30720, 38400, 46080, 53760, 61440)
    for n, ms in zip(lengths, (3.0, 7.8, 19.5, 30.3, 43.4, 59.2, 77.2), strict=True):
        yield Published("create_block_mask", "block mask", "list", n, ms, "ms", "B1 H1 d128 bf16", "H800", MASKS)


FIRST = "pytorch issue #172547; FlashAttention 4 blog; pytorch/helion"


def _compile() -> Iterator[Published]:
    for rival, seconds, words in (
        ("torch.compile, cold", 3.36, "a small function"),
        ("torch.compile, warm cache", 1.03, "a small function"),
        ("FlashAttention 4, cold", 2.5, "forward"),
        ("Helion, tuned", 600.0, "a matrix product; about ten minutes are typical"),
    ):
        yield Published(rival, "first call", "forward", 4096, seconds, "s", words, "H100 or B200", FIRST)


PUBLISHED: tuple[Published, ...] = (
    *_natten(),
    *_nsa(),
    *_lightning(),
    *_fla(),
    *_decode(),
    *_masks(),
    *_compile(),
)
